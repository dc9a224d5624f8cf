"""Four stand-in Sparks work like two."""

import os

import pytest
from operating import KEY, SHELL, containers, inv
from shells import Shells

from rehearsal import needs, sandbox
from rehearsal.flow import ALLOW, IMAGE, Flow
from rehearsal.hosts import INV
from rehearsal.rig import Rig

pytestmark = pytest.mark.rehearsal
FLEET = {"VLLM_API_KEY": KEY, "TP_SIZE": "4", "WORKER_HOSTS": "spark-2,spark-3,spark-4"}


@pytest.fixture
def four():
    """The hosts, each with a sshd."""
    if said := needs.missing(tests=True):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    sandbox.take_down()
    with Rig(4, say=lambda line: print(line, flush=True)) as rig:
        Flow(rig, rig.say).build()
        rig.copy(IMAGE)
        shells = Shells(rig.hosts)
        for worker in rig.hosts[1:]:
            shells.start(worker)
        yield rig.hosts


def test_up_on_four_hosts(four):
    """Each host has one rank, the state is healthy, and `down` on the head removes all nodes."""
    done = four[0].run(*INV, "up", "--model", "rehearsal", "--allow", ALLOW, env=SHELL | FLEET, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    health = inv(four[0], "health", **FLEET)
    assert health.returncode == 0, health.stderr
    assert all(f"{host.address} (ranks: 1)" in health.stderr for host in four)
    assert inv(four[0], "down", **FLEET).returncode == 0
    assert [containers(host) for host in four] == [""] * 4
