"""Guard the memory of this node, without Ray. start.sh starts this script in every container.

Ten times a second the guard reads /proc/meminfo and writes one line of JSON to FILE: `at` in seconds since 1970;
`available`, `free`, `cached` and `swap` (used) in bytes; `lowest`, the lowest `available` of the last five seconds; and
`killed`, which is null or has `at` and `available` of the last kill. The recorder reads this line.

Below MEM_ABORT_GIB (0: never) the guard kills the ranks of this container and their descendants, which are compilers.
On the head it also kills the server's process group. Unified memory that runs out would hang the whole machine.

A host that starves may need seconds to read a page from its disk, or to list its processes. So the files are opened
beforehand, the guard's own memory is locked, and the processes are known before they must be killed.
"""

import collections
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import time

FILE, PROC, SERVER, ENDED = "/dev/shm/node-memory.json", "/proc", "/run/vllm-serve.pid", "/var/log/node-ray/ended.json"
LINE_BYTES = 400  # more than the longest line, so that each line covers the one before
GIB = 2**30
PAUSE_S, SCAN_S, LOWEST_S = 0.1, 1, 5
FIELDS = re.compile(rb"^(MemFree|MemAvailable|Cached|SwapTotal|SwapFree): +(\d+)", re.M)
LOCK = 1 | 2 | 4  # linux/mman.h: MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT


def say(text):
    print(f"memory guard: {text}", file=sys.stderr, flush=True)


def find_ranks():
    """Return the ids of the ranks and of all their descendants. A process that is dead, but still listed, is left out.

    A rank's class in vLLM is RayWorkerWrapper (the older) or RayWorkerProc, and Ray names the process after it.
    """
    parents, family = {}, set()
    for name in filter(str.isdigit, os.listdir(PROC)):
        with contextlib.suppress(OSError), open(f"{PROC}/{name}/stat", "rb", buffering=0) as opened:
            command, _, rest = opened.read().rpartition(b") ")
            state, parent = rest.split(maxsplit=2)[:2]
            if state not in (b"Z", b"X"):
                parents[int(name)] = int(parent)
                if command.partition(b" (")[2].startswith(b"ray::RayWorker"):
                    family.add(int(name))
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


class Guard:
    """The memory of one node. `gone` has what was killed since memory became short, a process group as -GROUP."""

    def __init__(self, address, least):
        self.address, self.least, self.killed, self.gone = address, least, None, set()
        self.meminfo = os.open(f"{PROC}/meminfo", os.O_RDONLY)
        self.file = os.open(FILE, os.O_RDWR | os.O_CREAT, 0o644)
        self.recent = collections.deque(maxlen=round(LOWEST_S / PAUSE_S))
        self.scan()

    def scan(self):
        """Note the ranks with their descendants, and on the head the server's process group."""
        self.scanned, self.family, self.group = time.monotonic(), find_ranks(), []
        with contextlib.suppress(OSError, ValueError), open(SERVER) as opened:
            self.group = [-int(opened.read())]  # the server's first process has the number of its group

    def look(self):
        """Read the memory, kill if it is short, and write the line."""
        began, now = time.monotonic(), time.time()
        kib = {name.decode(): int(value) for name, value in FIELDS.findall(os.pread(self.meminfo, 4096, 0))}
        available, swap = kib["MemAvailable"] * 1024, (kib["SwapTotal"] - kib["SwapFree"]) * 1024
        if available < self.least * GIB:
            self.kill_all(began, now, available)
        else:
            self.gone.clear()
            if began - self.scanned >= SCAN_S:
                self.scan()
        self.recent.append(available)
        told = {"at": now, "available": available, "free": kib["MemFree"] * 1024, "cached": kib["Cached"] * 1024}
        line = json.dumps(told | {"swap": swap, "lowest": min(self.recent), "killed": self.killed})
        os.pwrite(self.file, line.encode().ljust(LINE_BYTES - 1) + b"\n", 0)

    def kill_all(self, began, now, available):
        """Kill the processes of the last scan at once. Then scan again, and kill what has started since.

        A killed rank keeps its descendants until its memory is freed, so the second scan still finds them.
        """
        server, known, first = self.kill(self.group), self.kill(self.family), time.monotonic()
        self.scan()
        late = self.kill(self.family)
        if not server + known + late:
            return
        self.killed, had = {"at": now, "available": available}, f"{self.address} had {available / GIB:.1f} GiB"
        took_ms = ((first if server + known else time.monotonic()) - began) * 1000
        whom = f"{known + late} of its processes{' and the server' if server else ''}"
        say(f"{had}, less than MEM_ABORT_GIB ({self.least:g}): killed {whom}, the first after {took_ms:.1f} ms")
        if server:
            with contextlib.suppress(OSError), open(ENDED, "w") as opened:
                json.dump({"at": now, "why": f"ended by the memory guard: {had}", "by": "memory guard"}, opened)

    def kill(self, numbers):
        """Send SIGKILL to these processes and groups. Return how many of them were not killed before."""
        before = len(self.gone)
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
                self.gone.add(number)
        return len(self.gone) - before


def lock_memory():
    """Keep the guard's pages in memory, each from its first use on."""
    if ctypes.CDLL(None, use_errno=True).mlockall(LOCK):
        say(f"its own memory is not locked: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    lock_memory()
    guard = Guard(os.environ.get("VLLM_HOST_IP"), float(os.environ.get("MEM_ABORT_GIB") or 0))
    say(f"kills the ranks on this node below {guard.least:g} GiB (MEM_ABORT_GIB; 0: never)")
    while True:
        guard.look()
        time.sleep(PAUSE_S)
