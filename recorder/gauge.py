"""What one node of the cluster has and does: an actor on each, asked from the head through Ray."""

import contextlib
import glob
import os
import subprocess
import sys
import threading
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TICKS = os.sysconf("SC_CLK_TCK")
GPU_S = 5
ROCE = "/sys/class/infiniband"


def read(path):
    with open(path) as file:
        return file.read()


def processes(wanted, children=True):
    """The fields behind the name in the `stat` line of each process that is wanted, by its id; of what it started, too.

    A rank that waits for a compiler of its own is at work.
    """
    lines = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone while we looked
            line = read(path)
            lines[path.split("/")[2]] = line[line.index("(") + 1 : line.rindex(")")], line.rpartition(")")[2].split()
    chosen = {pid for pid, (name, fields) in lines.items() if wanted(name, fields)}
    while children and (more := {pid for pid, (_, fields) in lines.items() if fields[1] in chosen} - chosen):
        chosen |= more
    return {pid: lines[pid][1] for pid in chosen}


def seconds(found):
    """Processor time of these processes and of those that they have waited for (proc(5): utime to cstime)."""
    return sum(sum(map(int, fields[11:15])) for fields in found.values()) / TICKS


def is_rank(name, _):
    """vLLM's Ray executors call a rank RayWorkerWrapper (the older) or RayWorkerProc; Ray makes that its title."""
    return name.startswith("ray::RayWorker")


class Gauge:
    """What one node has and does; an actor on it."""

    def __init__(self):
        names = ",".join(os.environ.get(name, "") for name in ("NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"))
        hcas = os.environ.get("NCCL_IB_HCA", "").split(",")
        halves = [os.path.basename(path) for hca in hcas for path in glob.glob(f"{ROCE}/{hca}/device/net/*") if hca]
        self.netdevs = sorted({name for name in [*names.split(","), *halves] if name})
        self.gpu, self.told = None, 0.0
        threading.Thread(target=self.follow_gpu, daemon=True).start()

    def available(self):
        lines = read("/proc/meminfo").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))

    def look(self):
        return {
            "available": self.available(),
            "ranks": len(processes(is_rank, children=False)),
            "cpu": seconds(processes(is_rank)),
            "gpu": self.gpu if time.monotonic() - self.told < 3 * GPU_S else None,
            "down": [netdev for netdev in self.netdevs if not self.is_up(netdev)],
        }

    def is_up(self, netdev):
        try:
            return read(f"/sys/class/net/{netdev}/operstate").strip() == "up"
        except OSError:
            return False

    def follow_gpu(self):
        # In a thread of its own: a driver that hangs must not keep anybody from looking at the memory.
        while True:
            self.gpu, self.told = self.utilization(), time.monotonic()
            time.sleep(GPU_S)

    def utilization(self):
        """The GPU's in percent; None if nvidia-smi does not tell."""
        words = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        try:
            return int(subprocess.run(words, capture_output=True, text=True, timeout=GPU_S).stdout.split()[0])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None


def gauges():
    # Sent whole: no other node has this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
    pinned = {
        node["NodeManagerAddress"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in ray.nodes()
        if node["Alive"]
    }
    # One that dies, as when memory runs out, comes back: a node without one is neither guarded nor seen to move.
    gauge = ray.remote(num_cpus=0, max_restarts=-1)(Gauge)
    return {address: gauge.options(scheduling_strategy=place).remote() for address, place in pinned.items()}


def sample(asked, method, wait_s):
    """What each node's gauge says, by address; None for a node that does not answer in time."""
    answers = {address: getattr(gauge, method).remote() for address, gauge in asked.items()}
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=wait_s)
    told = {}
    for address, answer in answers.items():
        try:
            told[address] = ray.get(answer, timeout=0.01)
        except Exception:
            told[address] = None
    return told
