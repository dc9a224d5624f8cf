#!/usr/bin/env python3
"""How long the probe of `inv check` takes on two nodes and on eight, in pairs: plain Ray in network namespaces.

Usage, as root: bench/check.py [PAIRS] [PYTHON]; PYTHON is one that has Ray, else one is made in a temporary folder.
Nearly all of it is the start of a worker process on each node, which eight Sparks do on eight Sparks' processors. So
the ratio is taken where every node has an eighth of this machine's, whether two are asked or eight; without that
limit, the ratio of this machine is printed too. Exits 1 when two nodes take more than LIMIT seconds without a limit,
or eight more than RATIO times two with it: medians, and the median of the paired ratios.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rehearsal.shell import bound_to_us, contained

PROBE = (Path(__file__).resolve().parent.parent / "checks/probe.py").read_text()
RAY = "ray==2.60.0"
LIMIT = 4.0
RATIO = 1.5
PAIRS = 10
START_S = 120
PERIOD = 100_000
PREFIX = "bench-check"
SWITCH = f"{PREFIX}-switch"
IN_GROUP = 'echo $$ >"$0" && exec "$@"'
OWN_FOLDER = 'mount -t proc proc /proc && mount -t tmpfs tmpfs "$0" && exec "$@"'


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


@dataclass(frozen=True)
class Pair:
    """Seconds of the probe on two nodes and on eight, one after the other."""

    two: float
    eight: float

    @property
    def ratio(self) -> float:
        """Eight nodes' time over two nodes'."""
        return self.eight / self.two


def main(pairs: str = str(PAIRS), python: str = "") -> int:
    """Print medians and ratios; the exit status says whether both limits are kept."""
    with TemporaryDirectory(prefix=f"{PREFIX}-") as folder, _network(range(1, 11)), _groups(range(1, 11)):
        place = Place(Path(python) if python else _make_python(Path(folder)), Path(folder, "ray"))
        place.folder.mkdir()
        with _cluster(place, range(1, 3)) as two, _cluster(place, range(3, 11)) as eight:
            for cluster in (two, eight):
                _until(cluster.answered, f"all {len(cluster.nodes)} nodes answer")
            free = _measure(two, eight, int(pairs), None)
            equal = _measure(two, eight, int(pairs), (os.cpu_count() or 1) / 8)
    return _report(free, equal)


def _measure(two: Cluster, eight: Cluster, pairs: int, processors: float | None) -> list[Pair]:
    """So many pairs, taking turns at being first, where each node has so many processors, or what it can get."""
    for number in (*two.nodes, *eight.nodes):
        _limit(number, processors)
    taken = []
    for number in range(pairs):
        order = (two, eight) if number % 2 else (eight, two)
        seconds = {cluster is eight: cluster.probe()[0] for cluster in order}
        taken.append(Pair(seconds[False], seconds[True]))
        print(f"{processors or 'any'} processors a node: {taken[-1].two:.2f} s, {taken[-1].eight:.2f} s", flush=True)
    return taken


def _report(free: list[Pair], equal: list[Pair]) -> int:
    two, ratio = median(pair.two for pair in free), median(pair.ratio for pair in equal)
    print(f"two nodes         {two:5.2f} s, the median of {len(free)}; at most {LIMIT} is wanted")
    print(f"eight over two    {ratio:5.2f}, where each node has an eighth of this machine; at most {RATIO} is wanted")
    for what, pairs in (("any processors", free), ("an eighth each", equal)):
        told = (median(pair.two for pair in pairs), median(pair.eight for pair in pairs))
        print(f"{what:<17} {told[0]:5.2f} s and {told[1]:5.2f} s, {median(pair.ratio for pair in pairs):.2f}")
    print(f"processors        {os.cpu_count():5d}, load {os.getloadavg()[0]:.1f}")
    return int(two > LIMIT or ratio > RATIO)


@contextmanager
def _groups(numbers: Sequence[int]) -> Iterator[None]:
    """A control group for each node's processor time, gone afterwards."""
    with ExitStack() as stack:
        for number in numbers:
            _group(number).mkdir(exist_ok=True)
            stack.callback(_remove, _group(number))
        yield


def _group(number: int) -> Path:
    root = Path("/sys/fs/cgroup")
    return (root / "cpu" if (root / "cpu").is_dir() else root) / _space(number)


def _limit(number: int, processors: float | None) -> None:
    """Give a node so many processors, or what it can get: cgroup v2, or v1."""
    quota = None if processors is None else int(processors * PERIOD)
    if (_group(number) / "cpu.max").exists():
        (_group(number) / "cpu.max").write_text(f"{quota or 'max'} {PERIOD}")
    else:
        (_group(number) / "cpu.cfs_quota_us").write_text(str(quota or -1))


def _remove(group: Path) -> None:
    """Remove a group once its last process is gone."""
    for _ in range(50):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.1)
    print(f"{group} is left: it is busy.", file=sys.stderr)


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
    sizes = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    inside = ("ip", "netns", "exec", _space(number), *own, *ray, *sizes)
    grouped = ("/bin/sh", "-c", IN_GROUP, str(_group(number) / "cgroup.procs"))
    line = [*grouped, *bound_to_us(*contained(*inside))]
    node = subprocess.Popen(line, env=_environment(number), **quiet)
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
