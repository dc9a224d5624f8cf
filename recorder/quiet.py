"""For how long nothing has moved that moves while work is done, or while a model loads."""

import http.client
import os
import threading
import time
import urllib.error
import urllib.request

from gauge import processes, seconds

# What counts as having moved: a share of one processor, of the GPU in percent, bytes. An idle rank stays below.
BUSY_CPU, BUSY_GPU, MOVED_BYTES = 0.1, 5, 64 * 2**20
CPU_S, METRICS_S = 4, 15
MOVING = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:kv_cache_usage", "vllm:gpu_cache_usage")
REQUESTS = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Quiet:
    """For how many seconds each thing was seen not to move; what could not be seen has not been quiet."""

    def __init__(self):
        self.marks, self.moved, self.seen = {}, {}, {}

    def see(self, thing, value, least):
        """A thing has moved if its value is at least so far from the last one that counted; None: it was not seen."""
        now = time.monotonic()
        if value is None or thing not in self.marks or abs(value - self.marks[thing]) >= least:
            self.marks[thing], self.moved[thing] = value or 0, now
        self.seen[thing] = now

    def rate(self, thing, value):
        """The same for the seconds of processors: what counts is how many in a second, over CPU_S at least."""
        now = time.monotonic()
        before, then = self.marks.get(thing, (None, 0))
        if value is None or before is None or value < before:
            self.marks[thing], self.moved[thing], self.seen[thing] = (value, now), now, now
        elif now - then >= CPU_S:
            self.moved[thing] = now if (value - before) / (now - then) >= BUSY_CPU else self.moved[thing]
            self.marks[thing], self.seen[thing] = (value, now), now

    def seconds(self):
        return {thing: self.seen[thing] - moved for thing, moved in self.moved.items()}


class Counters:
    """The API's own counters, read in a thread of its own every METRICS_S: a server that hangs does not answer.

    `waiting` is for how long requests have been seen to wait, or nobody answered: an idle server has nothing to move.
    """

    def __init__(self, url):
        self.url, self.lines = url, None
        self.moved = self.idle = self.seen = time.monotonic()
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(f"{self.url}/metrics", timeout=3) as answer:
                    self.read(answer.read().decode())
            except urllib.error.HTTPError:
                self.note(self.lines, False)  # it answers, and tells nothing
            except (OSError, http.client.HTTPException, ValueError):
                self.note(self.lines, True)  # not up yet, or it hangs
            time.sleep(METRICS_S)

    def read(self, text):
        lines = [line for line in text.splitlines() if line.startswith(MOVING)]
        asked = sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(REQUESTS))
        self.note(lines, asked > 0)

    def note(self, lines, waits):
        now = time.monotonic()
        self.moved = now if lines != self.lines else self.moved
        self.idle = self.idle if waits else now
        self.lines, self.seen = lines, now

    def seconds(self):
        return {"counters": max(0, self.seen - self.moved), "waiting": max(0, self.seen - self.idle)}


def note(quiet, told, group, log):
    """Compare what was just seen with what was seen before."""
    for address, node in told.items():
        quiet.see(f"memory {address}", node and node["available"], MOVED_BYTES)
        quiet.rate(f"cpu {address}", node and node["cpu"])
    # Every look at a GPU that works is another change; one that is not told is no reason to call it busy.
    working = any(node and (node["gpu"] or 0) >= BUSY_GPU for node in told.values())
    quiet.see("gpu", quiet.marks.get("gpu", 0) + working, 1)
    quiet.rate("server_cpu", seconds(processes(lambda _, fields: int(fields[2]) == group)))
    quiet.see("log", os.path.getsize(log) if os.path.exists(log) else 0, 1)
