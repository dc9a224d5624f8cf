"""What a cluster as it should be is refused, on one that stays up: each refusal, once mended, leaves it as it was."""

import json
from collections.abc import Iterator

import pytest
from operating import KEY, Terminal, bring_up, inv, serving
from test_nodes_disagree import check, findings

from rehearsal.flow import ALLOW
from rehearsal.hosts import Host
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal


@pytest.fixture(scope="module")
def pair(rig) -> Iterator[list[Host]]:
    """Two hosts that Ray has, and nothing is loaded."""
    opened = bring_up(rig.hosts, Terminal)
    yield rig.hosts
    for host, terminal in zip(rig.hosts, opened, strict=True):
        host.run("docker", "rm", "--force", "node-ray")
        terminal.process.wait(20)


def test_two_nodes_that_agree(pair):
    """Nothing is found, every fact of every node is told as JSON, and a stand-in is one GB10."""
    done = check(pair[0], "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [node["address"] for node in told["nodes"]] == ["10.0.0.1", "10.0.0.2"]
    assert all(node["gpus"] == ["NVIDIA GB10"] and node["vllm"].startswith("0.32.0") for node in told["nodes"])
    assert not [node for node in told["nodes"] if "unknown" in str(node)], told["nodes"]


def test_a_link_that_went_down(pair, rig):
    """Down at the far end after the bring-up: the node that lost its carrier is named, and up again it passes."""
    rig.link_down(pair[1], "enp1s0f0np0")
    found = findings(pair[0])
    rig.link_up(pair[1], "enp1s0f0np0")
    assert set(found) == {"links"} and "10.0.0.2: enp1s0f0np0 is down" in found["links"]
    assert wait(lambda: check(pair[0]).returncode == 0, 20, pause=1)


def test_too_little_memory_before_a_load(pair):
    """The floor is a setting, so a test can raise it: refused with the arithmetic, and nothing runs."""
    done = inv(pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY, MEM_FLOOR_GIB="999")
    assert done.returncode != 0 and "memory-floor" in done.stderr and "left for the host" in done.stderr
    assert not serving(pair[0])


def test_too_little_memory_during_a_load(pair, terminal):
    """The guard in the head's container ends the server, and its log says on which node and why."""
    launch = terminal(
        pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY, MEM_ABORT_GIB="999"
    )
    launch.until("less than MEM_ABORT_GIB (999): ending the server", 90)
    assert launch.process.wait(60) != 0
    assert not serving(pair[0])
    lows = json.loads((pair[0].cache / "node-ray/memory-low.json").read_text())
    assert sorted(lows) == ["10.0.0.1", "10.0.0.2"]


def test_an_option_that_the_image_does_not_know(pair):
    """Refused by the image's own list, with where to take it out; nothing runs."""
    done = inv(
        pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY, SERVE_EXTRA="--swap-space 0"
    )
    assert done.returncode != 0 and "REFUSED options: --swap-space" in done.stderr and "SERVE_EXTRA" in done.stderr
    assert not serving(pair[0])


def test_a_probe_that_fails_is_a_refusal(pair):
    """Ray's head stopped in its tracks: nobody can say that the nodes agree, so nothing is loaded."""
    pair[0].run("docker", "exec", "node-ray", "pkill", "-STOP", "gcs_server")
    done = inv(pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    pair[0].run("docker", "exec", "node-ray", "pkill", "-CONT", "gcs_server")
    assert done.returncode != 0 and "Traceback" not in done.stderr and not serving(pair[0])
    assert wait(lambda: check(pair[0]).returncode == 0, 60, pause=2)
