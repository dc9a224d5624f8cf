#!/usr/bin/env python3
"""How long the probe of `inv check` takes on two nodes and on eight, in pairs: plain Ray in network namespaces.

Usage, as root: bench/check.py [PAIRS] [PYTHON]; PYTHON is one that has Ray, else one is made in a temporary folder.
Exits 1 when two nodes take more than LIMIT seconds, or eight more than RATIO times two: medians, and the median of the
paired ratios. All nodes share this machine's processors, on which eight Sparks would have eight times as many.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

PROBE = (Path(__file__).resolve().parent.parent / "checks/probe.py").read_text()
RAY = "ray==2.60.0"
LIMIT = 4.0
RATIO = 1.5
PAIRS = 10
START_S = 120
PREFIX = "bench-check"
SWITCH = f"{PREFIX}-switch"
# A node has processes and a Ray folder of its own, and ends with this process, whatever ends it.
CONTAINED = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
OWN_FOLDER = 'mount -t tmpfs tmpfs "$0" && exec "$@"'


@dataclass(frozen=True)
class Place:
    """Where the nodes run: the Python that has Ray, and the folder that each node has for itself."""

    python: Path
    folder: Path

    @property
    def ray(self) -> tuple[str, ...]:
        """Words that run Ray's command line."""
        return (str(self.python), "-m", "ray.scripts.scripts")


@dataclass(frozen=True)
class Cluster:
    """So many nodes of one Ray; the first of them is the head."""

    nodes: Sequence[int]
    place: Place
    head: subprocess.Popen

    def probe(self) -> tuple[float, list[dict]]:
        """Seconds until the probe has answered, and its answer."""
        inside = _run("pgrep", "--parent", str(self.head.pid))
        words = ("nsenter", "--target", inside, "--mount", "--pid", "--net", str(self.place.python), "-c", PROBE)
        start = time.perf_counter()
        answer = _run(*words, secrets.token_hex(16), env=_environment(self.nodes[0]))
        return time.perf_counter() - start, json.loads(answer.splitlines()[-1])

    def answered(self) -> bool:
        """Whether every node tells its facts."""
        try:
            _, told = self.probe()
        except subprocess.CalledProcessError:
            return False
        return len(told) == len(self.nodes) and not any("unknown" in node["facts"] for node in told)


def main(pairs: str = str(PAIRS), python: str = "") -> int:
    """Print both medians and the ratio; the exit status says whether both limits are kept."""
    with TemporaryDirectory(prefix=f"{PREFIX}-") as folder, _network(range(1, 11)):
        place = Place(Path(python) if python else _make_python(Path(folder)), Path(folder, "ray"))
        place.folder.mkdir()
        with _cluster(place, range(1, 3)) as two, _cluster(place, range(3, 11)) as eight:
            taken = _measure(two, eight, int(pairs))
    return _report(taken)


def _measure(two: Cluster, eight: Cluster, pairs: int) -> list[tuple[float, float]]:
    """So many pairs of seconds (two, eight), taking turns at being first, once every node has answered both."""
    for cluster in (two, eight):
        _until(cluster.answered, f"all {len(cluster.nodes)} nodes answer")
    taken = []
    for number in range(pairs):
        order = (two, eight) if number % 2 else (eight, two)
        seconds = {len(cluster.nodes): cluster.probe()[0] for cluster in order}
        taken.append((seconds[2], seconds[8]))
        print(f"pair {number + 1}: {seconds[2]:.2f} s on two nodes, {seconds[8]:.2f} s on eight", flush=True)
    return taken


def _report(taken: list[tuple[float, float]]) -> int:
    two, eight = (median(times) for times in zip(*taken, strict=True))
    ratio = median(eight / two for two, eight in taken)
    print(f"the probe on two nodes    {two:5.2f} s, the median of {len(taken)}; at most {LIMIT} is wanted")
    print(f"the probe on eight nodes  {eight:5.2f} s")
    print(f"ratio                     {ratio:5.2f}, the median of {len(taken)} pairs; at most {RATIO} is wanted")
    print(f"processors                {os.cpu_count():5d}, load {os.getloadavg()[0]:.1f}")
    return int(two > LIMIT or ratio > RATIO)


def _make_python(folder: Path) -> Path:
    print(f"making a Python with {RAY} ...", flush=True)
    _run(sys.executable, "-m", "venv", str(folder / "venv"))
    python = folder / "venv/bin/python"
    _run(str(python), "-m", "pip", "install", "--quiet", RAY)
    return python


@contextmanager
def _network(numbers: Sequence[int]) -> Iterator[None]:
    """A namespace for each node on one bridge, in a namespace of its own; gone afterwards, and before."""
    with ExitStack() as stack:
        for space in (SWITCH, *(_space(number) for number in numbers)):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
            _ip("netns", "add", space)
            stack.callback(_ip, "netns", "delete", space)
        _ip("-n", SWITCH, "link", "add", "bridge", "up", "type", "bridge")
        for number in numbers:
            _connect(number)
        yield


def _connect(number: int) -> None:
    space, port = _space(number), f"port{number}"
    _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", SWITCH)
    _ip("-n", SWITCH, "link", "set", port, "up", "master", "bridge")
    _ip("-n", space, "address", "add", f"{_address(number)}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", space, "link", "set", device, "up")


@contextmanager
def _cluster(place: Place, numbers: Sequence[int]) -> Iterator[Cluster]:
    """A head and its workers, ended afterwards."""
    first, *others = numbers
    with ExitStack() as stack:
        head = _start(stack, place, first, "--head", "--port=6379", f"--temp-dir={place.folder}")
        gcs = ("ip", "netns", "exec", _space(first), *place.ray, "health-check", "--address", _gcs(first))
        _until(lambda: subprocess.run(gcs, capture_output=True, check=False).returncode == 0, "the head is up")
        for number in others:
            _start(stack, place, number, f"--address={_gcs(first)}")
        yield Cluster(numbers, place, head)


def _start(stack: ExitStack, place: Place, number: int, *words: str) -> subprocess.Popen:
    own = ("/bin/sh", "-c", OWN_FOLDER, str(place.folder))
    ray = (*place.ray, "start", "--block", f"--node-ip-address={_address(number)}", *words)
    sizes = ("--num-cpus=6", "--object-store-memory=80000000", "--disable-usage-stats")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    inside = ("ip", "netns", "exec", _space(number), *own, *ray, *sizes)
    node = subprocess.Popen([*CONTAINED, *inside], env=_environment(number), **quiet)
    stack.callback(node.wait)
    stack.callback(node.kill)
    return node


def _environment(number: int) -> dict[str, str]:
    """What a node's container would have for Ray and the probe; `auto` would find another Ray of this machine."""
    head = 1 if number < 3 else 3
    return os.environ | {
        "RAY_ADDRESS": _gcs(head),
        "VLLM_HOST_IP": _address(number),
        "TP_SOCKET_IFNAME": "eth0",
        "NODE_RAY_IMAGE": "none",
        "NODE_RAY_WRAPPER": "none",
        "NODE_RAY_WRAPPER_SHA256": "none",
    }


def _until(condition: object, what: str) -> None:
    end = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"Not within {START_S} s: {what}.")
        time.sleep(0.5)


def _space(number: int) -> str:
    return f"{PREFIX}-{number}"


def _address(number: int) -> str:
    return f"10.98.0.{number}"


def _gcs(number: int) -> str:
    return f"{_address(number)}:6379"


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str, **options: dict[str, str]) -> str:
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    return subprocess.run(words, check=True, timeout=START_S, **quiet, **options).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
