#!/usr/bin/env python3
"""`inv up` on two stand-in Sparks against the same docker and ray commands typed by hand, waiting included, in pairs.

Usage, as root: bench/up.py [PAIRS]. By hand: what `inv --dry head`, `worker` and `launch` print, pasted into a bash on
its node, each once the one before it is seen to be up: Ray's own line, `ray status` with two nodes, the API's /health.
`up` does the same over ssh, checks both nodes, and answers a first request. Both end when the server is ready; taking
it down is not measured. Exits 1 when the median of the paired ratios is above RATIO.

Then what health costs: `inv health` on the last of these clusters, and so many chat requests with and without a health
each second, in pairs.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rehearsal.flow import ALLOW, IMAGE, Flow
from rehearsal.hosts import INV, Host
from rehearsal.rig import Rig
from rehearsal.shell import wait
from rehearsal.shells import Shells

RATIO = 1.05
PAIRS = 5
READY_S = 240
ENV = {"VLLM_IMAGE": IMAGE, "VLLM_API_KEY": "sk-bench", "WORKER_HOSTS": "spark-2"}
CLIENT = str(Path(__file__).resolve().parent.parent / "tests/rehearsal/client.py")
REQUESTS, HEALTHS = 100, 10


def up(hosts: list[Host]) -> float:
    """Seconds that `inv up` takes."""
    return _seconds(lambda: _inv(hosts[0], "up", "--model", "rehearsal", "--allow", ALLOW))


def by_hand(hosts: list[Host]) -> float:
    """Seconds that a person takes who types without a pause, and looks every half second."""
    roles = {1: "head", 2: "worker"}
    lines = {host.number: _inv(host, "--dry", roles[host.number], "--model", "rehearsal") for host in hosts}
    launch = _inv(hosts[0], "--dry", "launch", "--model", "rehearsal").split("\n\n")
    start = next(command for command in launch if "vllm serve" in command)
    return _seconds(lambda: _typed(hosts, lines, start))


def _typed(hosts: list[Host], lines: dict[int, str], launch: str) -> None:
    head, worker = hosts
    _paste(head, f"{lines[1].strip()} &")
    _until(lambda: "1 node_" in _status(head), "the head is up")
    _paste(worker, f"{lines[2].strip()} &")
    _until(lambda: _status(head).count("1 node_") == 2, "Ray has both")
    _paste(head, launch)
    url = "http://10.0.0.1:8000/health"
    _until(lambda: head.run("curl", "--fail", "--silent", url).returncode == 0, "the API is up")


def _status(head: Host) -> str:
    return head.run("docker", "exec", "node-ray", "ray", "status", "--address", "10.0.0.1:6379").stdout


def _paste(host: Host, text: str) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "capture_output": False}
    host.run("bash", "-c", text, env=ENV, **quiet).check_returncode()


def _inv(host: Host, *words: str) -> str:
    done = host.run(*INV, *words, env=ENV, timeout=READY_S)
    if done.returncode:
        sys.exit(f"inv {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _seconds(do: Callable[[], object]) -> float:
    start = time.monotonic()
    do()
    return time.monotonic() - start


def _until(condition: Callable[[], bool], what: str) -> None:
    if not wait(condition, READY_S, pause=0.5):
        sys.exit(f"Not within {READY_S} s: {what}.")


def _clear(hosts: list[Host]) -> None:
    for host in hosts:
        host.run("docker", "rm", "--force", "node-ray")


def bring_up(hosts: list[Host], pairs: int) -> float:
    """The median of the paired ratios of `up` over by hand, taking turns at being first, after one that warms up."""
    up(hosts)
    ratios = []
    for number in range(pairs):
        taken = {}
        for way in (up, by_hand) if number % 2 else (by_hand, up):
            _clear(hosts)
            time.sleep(2)
            taken[way] = way(hosts)
        ratios.append(taken[up] / taken[by_hand])
        print(f"up {taken[up]:5.1f} s, by hand {taken[by_hand]:5.1f} s, {ratios[-1]:.3f}", flush=True)
    return median(ratios)


def requests(hosts: list[Host], asked: bool) -> float:
    """Seconds of REQUESTS chat requests at once, with a health each second if asked."""
    words = [sys.executable, CLIENT, "http://10.0.0.1:8000", str(REQUESTS)]
    start = time.monotonic()
    client = hosts[1].popen(*words, env={"KEY": ENV["VLLM_API_KEY"]}, stdout=subprocess.PIPE, text=True)
    while client.poll() is None:
        if asked:
            hosts[0].run(*INV, "health", env=ENV)
        time.sleep(1 if asked else 0.05)
    took = time.monotonic() - start
    if {status for status, _ in json.loads(client.stdout.read())} != {200}:
        sys.exit("A request was not answered.")
    return took


def health(hosts: list[Host], pairs: int) -> None:
    """Print what one health takes, and what a health each second costs the requests of others."""
    if hosts[0].run(*INV, "health", env=ENV).returncode:
        _clear(hosts)
        up(hosts)
    requests(hosts, False)
    alone = median(_seconds(lambda: hosts[0].run(*INV, "health", env=ENV)) for _ in range(HEALTHS))
    pairs_taken = [(requests(hosts, True), requests(hosts, False)) for _ in range(pairs)]
    ratio = median(asked / not_asked for asked, not_asked in pairs_taken)
    print(f"health          {alone:5.2f} s, the median of {HEALTHS}; within 5 is wanted")
    print(f"{REQUESTS} requests    {ratio:5.2f} times as long with a health each second, the median of {pairs} pairs")


def main(pairs: str = str(PAIRS)) -> int:
    """Print ratios; the exit status says whether `up` keeps to RATIO."""
    with Rig(2, say=lambda line: print(line, file=sys.stderr)) as rig:
        Flow(rig, rig.say).build()
        rig.copy(IMAGE)
        Shells(rig.hosts).start(rig.hosts[1])
        ratio = bring_up(rig.hosts, int(pairs))
        print(f"up over by hand {ratio:5.3f}, the median of {pairs} pairs; at most {RATIO} is wanted", flush=True)
        health(rig.hosts, int(pairs))
    return int(ratio > RATIO)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
