"""The old names of cluster/health.py, for the modules that are not yet rewritten."""

from cluster.health import gpu_command as gpu
from cluster.health import report_health as report
from cluster.node import CONTAINER


def gpu_inside():
    return gpu(CONTAINER)
