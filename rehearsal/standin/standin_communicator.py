"""Ranks of one stand-in cluster: in containers on different hosts, so without memory in common."""

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class StandinCommunicator(CpuCommunicator):
    """Talks through Gloo where the CPU's own communicator would open shared memory."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False
