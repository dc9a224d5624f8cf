"""The communicator of the stand-in's ranks. They run in containers on different hosts, and so share no memory."""

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class StandinCommunicator(CpuCommunicator):
    """Uses Gloo. The CPU's own communicator would use shared memory."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
