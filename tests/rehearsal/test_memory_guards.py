"""The memory guards of both nodes while a server runs. The test itself takes the memory that a host then lacks."""

import json
import mmap
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from operating import KEY, Terminal, inv, joined

from rehearsal.flow import ALLOW
from rehearsal.hosts import Host
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
GIB = 2**30
# What a load of the tiny model on two stand-ins takes of their machine, with some room.
LOAD_GIB = 9


def available() -> int:
    """The bytes that the machine, and so every stand-in, has available."""
    return int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


class Node:
    """The container of a host, seen from the machine."""

    def __init__(self, host: Host, terminal: Terminal) -> None:
        self.host, self.terminal = host, terminal
        self.first = next(one for one in Path("/proc").glob("[0-9]*") if self._keeps_the_guard(one))

    def _keeps_the_guard(self, process: Path) -> bool:
        line = _line(process)
        return line.startswith("/bin/bash /opt/inside/start.sh ray") and f"-address={self.host.address} " in line

    def memory(self) -> dict:
        """Return what the guard has written within the last two seconds; empty if it has written nothing."""
        with suppress(OSError, ValueError):
            told = json.loads((self.first / "root/dev/shm/node-memory.json").read_text())
            return told if time.time() - told["at"] < 2 else {}
        return {}

    def pids(self, name: str) -> list[Path]:
        """Return the living processes in the container with this in their name or command line."""
        inside = (self.first / "ns/pid").readlink()
        return [one for one in Path("/proc").glob("[0-9]*") if name in _line(one) and _inside(one) == inside]


def _line(process: Path) -> str:
    """Return command line and name of a process; empty if it is dead. While it dies it has its name alone."""
    with suppress(OSError):
        line, name, state = ((process / file).read_text(errors="replace") for file in ("cmdline", "comm", "stat"))
        if state.rpartition(") ")[2][0] not in "ZX":
            return f"{line} {name}".replace("\0", " ")
    return ""


def _inside(process: Path) -> Path | None:
    with suppress(OSError):
        return (process / "ns/pid").readlink()
    return None


@pytest.fixture
def serve(sparks, terminal) -> Callable[..., list[Node]]:
    """Serves the tiny model. The named roles get a limit below what the machine has left after the load."""

    def start(*low: str) -> list[Node]:
        assert available() > (LOAD_GIB + 2) * GIB, "the machine has too little memory for this test"
        limit = available() / GIB - LOAD_GIB
        least = {"MEM_ABORT_GIB": f"{limit:.3f}", "MEM_FLOOR_GIB": f"{limit + 0.1:.3f}", "MEM_WARN_GIB": "9999"}
        words = ("--model", "rehearsal")
        env = {role: least if role in low else {} for role in ("head", "worker")}
        opened = [terminal(host, role, *words, **env[role]) for host, role in zip(sparks, env, strict=True)]
        assert wait(lambda: joined(sparks), 180, pause=1), [one.read() for one in opened]
        allow = ("--allow", f"{ALLOW},variables,memory-floor,memory-low")
        done = inv(sparks[0], "launch", "--detach", *words, *allow, VLLM_API_KEY=KEY, **env["head"])
        assert done.returncode == 0, done.stderr
        assert wait(lambda: inv(sparks[0], "health", VLLM_API_KEY=KEY).returncode == 0, 300, pause=2)
        return [Node(host, one) for host, one in zip(sparks, opened, strict=True)]

    return start


@pytest.fixture
def take() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Takes memory of the machine until something is true, and gives it back after the test, or when told to."""
    held: list[mmap.mmap] = []

    def press(enough: Callable[[], object]) -> None:
        while not enough():
            assert available() > GIB, "the machine itself must not run out of memory"
            held.append(mmap.mmap(-1, 2**27, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            for page in range(0, 2**27, mmap.PAGESIZE):
                held[-1][page] = 1

    press.give_back = held.clear
    yield press
    held.clear()


def lose_their_ranks(take: Callable, *nodes: Node) -> None:
    """Each guard's first signal comes within 20 ms of its reading. No rank is left on its node within a second."""
    assert all(node.memory().get("killed", 0) is None and node.pids("ray::RayWorker") for node in nodes)
    take(lambda: all(node.memory().get("killed") for node in nodes))
    killed = {node: node.memory()["killed"]["at"] for node in nodes}
    gone: dict[Node, float] = {}

    def empty() -> bool:
        for node in nodes:
            if node not in gone and not node.pids("ray::RayWorker"):
                gone[node] = time.time() - killed[node]
        return len(gone) == len(nodes)

    assert wait(empty, 10, pause=0.01)
    for node in nodes:
        node.terminal.until("the first after")
        first = float(re.search(r"had [\d.]+ GiB, less .*, the first after ([\d.]+) ms", node.terminal.read())[1])
        print(f"{node.host.name}: the first signal after {first} ms, no rank after {gone[node]:.2f} s")
        assert first < 20 and gone[node] < 1


def cost(node: Node) -> tuple[float, int]:
    """Return the share of a processor that the guard has taken since its start, and its resident bytes."""
    (guard,) = node.pids("memory_guard.py")
    words = (guard / "stat").read_text().rpartition(")")[2].split()
    ticks, born = int(words[11]) + int(words[12]), int(words[19])
    age = float(Path("/proc/uptime").read_text().split()[0]) - born / os.sysconf("SC_CLK_TCK")
    return ticks / os.sysconf("SC_CLK_TCK") / age, int(words[21]) * mmap.PAGESIZE


def ended(head: Node) -> dict:
    """Wait until no process of the server is left, and return why the server was ended."""
    assert wait(lambda: not head.pids("bin/vllm serve") and not head.pids("VLLM::"), 30)
    return json.loads((head.host.cache / "node-ray/ended.json").read_text())


def test_a_worker_without_memory_ends_the_server(serve, take, sparks):
    """A killed guard is back in time. It kills the rank, the recorder ends the server, and health names the node."""
    head, worker = serve("worker")
    killed = time.monotonic()
    sparks[1].run("docker", "exec", "node-ray", "pkill", "-KILL", "-f", "memory_guard.py")
    assert wait(lambda: not worker.pids("memory_guard.py"), 5, pause=0.005)
    assert wait(lambda: worker.pids("memory_guard.py") and worker.memory(), 5, pause=0.01)
    print(f"the guard is back after {time.monotonic() - killed:.2f} s")
    lose_their_ranks(take, worker)
    told = ended(head)
    print(f"the server has ended after {time.time() - worker.memory()['killed']['at']:.1f} s")
    assert told["by"] == "memory guard" and re.fullmatch(
        r"ended by the memory guard: 10.0.0.2 had \S+ GiB", told["why"]
    )
    health = inv(sparks[0], "health", VLLM_API_KEY=KEY)
    assert health.returncode == 12 and f"The server was {told['why']}." in health.stderr


def test_both_nodes_save_themselves_while_ray_stands_still(serve, take, sparks):
    """Without Ray's head nobody can be asked. Each guard acts on its own node, and the head's ends the server."""
    head, worker = serve("head", "worker")
    for node in (head, worker):
        share, resident = cost(node)
        print(f"{node.host.name}: the guard takes {share:.2%} of a processor and {resident / 2**20:.1f} MiB")
        assert share < 0.02 and resident < 2**25
    stopped = [pid for name in ("gcs_server", "raylet/raylet") for pid in head.pids(name)]
    assert len(stopped) >= 2
    for pid in stopped:
        os.kill(int(pid.name), signal.SIGSTOP)
    try:
        lose_their_ranks(take, head, worker)
        told = ended(head)
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(int(pid.name), signal.SIGCONT)
    assert told["by"] == "memory guard" and re.fullmatch(
        r"ended by the memory guard: 10.0.0.[12] had \S+ GiB", told["why"]
    )
