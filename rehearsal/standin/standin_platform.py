"""A vLLM platform for stand-in Sparks: the CPU, scheduled by Ray as if it were the host's GPU."""

from vllm.platforms.cpu import CpuPlatform


def register() -> str:
    """vLLM's entry point: the name of the platform class."""
    return f"{__name__}.StandinPlatform"


class StandinPlatform(CpuPlatform):
    """The CPU platform refuses Ray unless its workers ask for a resource."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "standin_communicator.StandinCommunicator"
