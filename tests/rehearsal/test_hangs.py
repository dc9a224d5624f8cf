"""Hangs and faults on a real engine: which state `inv health` names, and how long it takes to say so.

The tests use one cluster in this order. The last test leaves the cluster broken.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from operating import KEY, inv, slowness

from rehearsal import sandbox
from rehearsal.flow import ALLOW
from rehearsal.hosts import CABLES, Host
from rehearsal.rig import Rig
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
CLIENT = str(Path(__file__).with_name("client.py"))
URL = "http://10.0.0.1:8000"
# With this method a rank spins until the other rank is there, as NCCL does. Gloo's own way is to sleep.
SPIN = """
    def all_reduce(self, input_):
        import torch

        work = torch.distributed.all_reduce(input_, group=self.device_group, async_op=True)
        while not work.is_completed():
            pass
        return input_
"""
RANK = "^ray::RayWorkerProc"
# Ray gives a node up after five answers in a row that do not come in time: half a minute, and not a whole one.
SOON = {"VLLM_FORWARD_VARS": "RAY_health_check_timeout_ms", "RAY_health_check_timeout_ms": "3000"}


@pytest.fixture(scope="module")
def pair(rig: Rig) -> Iterator[list[Host]]:
    """Two hosts on which the tiny model begins to load. The rank of the head spins where a rank of NCCL would."""
    for host, task in zip(rig.hosts, ("head", "worker"), strict=True):
        assert inv(host, task, "--detach", "--model", "rehearsal", **SOON).returncode == 0
    patch = 'cat >>"$(python3 -c "import standin_communicator as it; print(it.__file__)")"'
    patched = rig.hosts[0].run("docker", "exec", "-i", "node-ray", "bash", "-c", patch, input=SPIN, stdin=None)
    assert patched.returncode == 0, patched.stderr
    assert wait(lambda: "Ray: 2 nodes" in inv(rig.hosts[0], "health").stderr, 60)
    done = inv(rig.hosts[0], "launch", "--model", "rehearsal", "--detach", "--allow", ALLOW, VLLM_API_KEY=KEY, **SOON)
    assert done.returncode == 0, done.stderr
    yield rig.hosts
    for host in rig.hosts:
        host.run("docker", "rm", "--force", "node-ray")


class Timed:
    """`inv health`, typed on the head. Each answer must come within `limit` seconds, more where the machine is slow."""

    def __init__(self, head: Host, limit: float = 5) -> None:
        self.head, self.limit, self.said = head, limit, ""

    def __call__(self, **env: str) -> int:
        """Return the exit status."""
        slow, start = slowness(), time.monotonic()
        done = inv(self.head, "health", **{"VLLM_API_KEY": KEY, "HANG_S": "300"} | env)
        took, self.said = time.monotonic() - start, done.stderr
        slow = max(slow, slowness())
        print(f"{took:.1f} s, {took / slow:.1f} s on a machine with nothing else to do: {self.last}", flush=True)
        assert took < self.limit * slow, done.stderr
        return done.returncode

    @property
    def last(self) -> str:
        """The last line."""
        return self.said.splitlines()[-1]

    def becomes(self, code: int, seconds: float = 60, **env: str) -> None:
        """Ask until the exit status is this."""
        assert wait(lambda: self(**env) == code, seconds, pause=0.5), self.said


@pytest.fixture
def health(pair) -> Timed:
    """`inv health` on the head."""
    return Timed(pair[0])


@contextmanager
def stopped(host: Host, pattern: str) -> Iterator[None]:
    """Stop the processes of the node that the pattern names (SIGSTOP), and let them run again at the end."""
    signaled = ("docker", "exec", "node-ray", "pkill", "--full", pattern)
    assert host.run(*signaled, "--signal", "STOP").returncode == 0
    try:
        yield
    finally:
        host.run(*signaled, "--signal", "CONT")


def vitals(host: Host) -> dict:
    """Return what the recorder wrote last."""
    return json.loads((host.cache / "node-ray/vitals.json").read_text())


def test_loading_then_healthy_then_a_wrong_key(health):
    """Each of these states is named in time."""
    assert health() == 11
    health.becomes(0, 240)
    assert health(VLLM_API_KEY="wrong") == 15


def test_a_rank_that_spins_is_hung(pair, health):
    """While the worker's rank is stopped, the head's rank spins: its processor is busy, and no counter moves.

    The state is hung after HANG_S, and not before. When the worker's rank runs again, the state is healthy.
    """
    client = pair[1].popen(sys.executable, CLIENT, URL, "200", env={"KEY": KEY}, stdout=subprocess.PIPE, text=True)
    running = re.compile(r"^vllm:num_requests_running{.*} [1-9]", re.MULTILINE)
    assert wait(lambda: running.search(pair[0].run("curl", "-s", f"{URL}/metrics").stdout), 30)
    with stopped(pair[1], RANK):
        health.becomes(13, HANG_S="8")
        assert "no counter of the engine has moved" in health.said and "inv stop" in health.said
        quiet = vitals(pair[0])["quiet"]
        assert quiet["cpu 10.0.0.1"] < 6 < 8 <= quiet["counters"], quiet
        assert health(HANG_S="300") == 10
    health.becomes(0)
    assert {status for status, _ in json.loads(client.communicate(timeout=120)[0])} == {200}


def test_a_hang_that_the_counters_do_not_show(pair, health):
    """A request that hangs an idle engine is in none of the engine's counters, so health counts its own waiting."""
    with stopped(pair[1], RANK):
        health.becomes(13, 90, HANG_S="20")
        assert vitals(pair[0])["running"] == 0
    health.becomes(0)


def test_a_stopped_engine_of_docker(rig, pair, health):
    """`health` says within 10 s that Docker does not answer. The server is not touched."""
    init = sandbox.child(sandbox.child(rig.processes[pair[0].name].pid))
    children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    (engine,) = [int(one) for one in children if Path(f"/proc/{one}/comm").read_text() == "dockerd\n"]
    health.limit = 10
    os.kill(engine, signal.SIGSTOP)
    try:
        assert health() == 1
    finally:
        os.kill(engine, signal.SIGCONT)
    assert "Docker cannot be reached" in health.said
    health.limit = 5
    health.becomes(0)


def test_a_docker_socket_that_never_answers(health, tmp_path):
    """`health` says the same within 10 s."""
    health.limit = 10
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/docker.sock")
        listening.listen()
        assert health(DOCKER_HOST=f"unix://{tmp_path}/docker.sock") == 1
    assert "unknown: Docker cannot be reached" in health.said and "--json" not in health.said


def test_a_node_that_is_stopped_for_a_moment(pair, health):
    """While a worker's raylet, or its container, is stopped, the server may be busy. Each answer comes in time."""
    with stopped(pair[1], "^/.*raylet"):
        assert {health() for _ in range(3)} <= {0, 10}
    pair[1].run("docker", "pause", "node-ray")
    assert {health() for _ in range(2)} == {10}
    pair[1].run("docker", "unpause", "node-ray")
    health.becomes(0)


def test_a_node_that_is_cut_off(rig, pair, health):
    """Until Ray gives the node up, the state is busy. Then a rank is lost. Each answer comes in time."""
    for cable in CABLES:
        rig.link_down(pair[1], cable.netdev)
    try:
        health.becomes(14, 120)
        assert health() == 14
    finally:
        for cable in CABLES:
            rig.link_up(pair[1], cable.netdev)
