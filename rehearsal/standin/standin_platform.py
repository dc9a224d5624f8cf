"""A vLLM platform for stand-in Sparks. vLLM runs on the CPU, and Ray schedules the CPU as the host's GPU."""

from vllm.platforms.cpu import CpuPlatform


def register() -> str:
    """Return the name of the platform class. This is the entry point for vLLM."""
    return f"{__name__}.StandinPlatform"


class StandinPlatform(CpuPlatform):
    """The CPU platform, with the Ray resource of a worker. Without a resource vLLM refuses Ray."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "standin_communicator.StandinCommunicator"
