"""Run inside the head's container: looks at MemAvailable on every node, through Ray.

`python3 FILE guard PID_FILE LOW_FILE GIB`: each second until the server is gone, and ends the server when any node has
less than GIB left: unified memory that runs out hangs the whole machine, so nothing else would end it in time. What
each node had left at its lowest is kept in LOW_FILE as JSON, address to bytes.
`python3 -c SOURCE watch SECONDS`: prints the same JSON every so many seconds, until standard input is closed.
"""

import json
import os
import select
import signal
import sys
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

GIB = 2**30


class Gauge:
    def available(self):
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def gauges():
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
    pinned = {
        node["NodeManagerAddress"]: NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in ray.nodes()
        if node["Alive"]
    }
    gauge = ray.remote(num_cpus=0)(Gauge)
    return {address: gauge.options(scheduling_strategy=place).remote() for address, place in pinned.items()}


def sample(asked, seconds):
    """Bytes available by address; None for a node that does not answer in time."""
    answers = {address: gauge.available.remote() for address, gauge in asked.items()}
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=seconds)
    told = {}
    for address, answer in answers.items():
        try:
            told[address] = ray.get(answer, timeout=0.01)
        except Exception:
            told[address] = None
    return told


def runs(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end(group):
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 0)):
        if runs(group):
            os.killpg(group, number)
        deadline = time.monotonic() + seconds
        while runs(group) and time.monotonic() < deadline:
            time.sleep(0.2)


def say(text):
    print(f"memory guard: {text}", flush=True)


def keep(low_file, lows):
    with open(f"{low_file}.new", "w") as file:
        json.dump(lows, file)
    os.replace(f"{low_file}.new", low_file)


def guard(pid_file, low_file, least):
    with open(pid_file) as file:
        group = int(file.read())
    lows, silent = {}, set()
    keep(low_file, lows)
    asked = gauges()
    sample(asked, 30)  # the first answer waits for the gauges' own processes
    say(f"watching {', '.join(sorted(asked))}; the server is ended below {least:g} GiB (MEM_ABORT_GIB)")
    while runs(group):
        told = sample(asked, 3)
        for address in {address for address, left in told.items() if left is None} - silent:
            say(f"{address} does not answer; its memory is not watched")
        silent = {address for address, left in told.items() if left is None}
        known = {address: left for address, left in told.items() if left is not None}
        lows |= {address: min(left, lows.get(address, left)) for address, left in known.items()}
        keep(low_file, lows)
        for address, left in known.items():
            if left < least * GIB:
                say(f"{address} has {left / GIB:.1f} GiB left, less than MEM_ABORT_GIB ({least:g}): ending the server")
                return end(group)
        time.sleep(1)


def watch(seconds):
    asked = gauges()
    sample(asked, 30)
    while True:
        print(json.dumps(sample(asked, 3)), flush=True)
        if select.select([sys.stdin], [], [], seconds)[0]:
            return


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        guard(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        watch(float(sys.argv[2]))
