"""Refusals on a cluster that stays up. Each test removes the cause again, and leaves the cluster as it was."""

import json
import time
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
        terminal.process.wait(60)


def test_two_nodes_that_agree(pair):
    """`check` finds nothing. The JSON has every fact of every node, and a stand-in has one GB10."""
    done = check(pair[0], "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [node["address"] for node in told["nodes"]] == ["10.0.0.1", "10.0.0.2"]
    assert all(node["vllm"].startswith("0.32.0") for node in told["nodes"])
    gpus = [(gpu["name"], gpu["memory"]) for node in told["nodes"] for gpu in node["gpus"]]
    assert gpus == [("NVIDIA GB10", None)] * 2
    assert not [node for node in told["nodes"] if "unknown" in str(node)], told["nodes"]


def test_a_link_that_went_down(pair, rig):
    """The switch's end goes down after the bring-up. `check` names the node. With the link up again `check` passes."""
    rig.link_down(pair[1], "enp1s0f0np0")
    assert wait(lambda: "links" in findings(pair[0]), 20, pause=1)
    found = findings(pair[0])
    rig.link_up(pair[1], "enp1s0f0np0")
    assert set(found) == {"links"} and "10.0.0.2: enp1s0f0np0 is down" in found["links"]
    assert wait(lambda: check(pair[0]).returncode == 0, 60, pause=1)


def test_too_little_memory_before_a_load(pair):
    """A high MEM_FLOOR_GIB makes the memory too small. The refusal shows the computation, and nothing runs."""
    high = {"MEM_FLOOR_GIB": "999", "MEM_WARN_GIB": "999"}
    done = inv(pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY, **high)
    assert done.returncode != 0 and "memory-floor" in done.stderr and "left for the host" in done.stderr
    assert not serving(pair[0])


def test_an_option_that_the_image_does_not_know(pair):
    """The image's list of options lacks the option. The refusal says how to remove it, and nothing runs."""
    done = inv(
        pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY, SERVE_EXTRA="--swap-space 0"
    )
    assert done.returncode != 0 and "REFUSED options: --swap-space" in done.stderr and "SERVE_EXTRA" in done.stderr
    assert not serving(pair[0])


def test_a_probe_that_fails_is_a_refusal(pair):
    """Ray's head is frozen, so nobody can compare the nodes, and nothing is loaded."""
    pair[0].run("docker", "exec", "node-ray", "pkill", "-STOP", "gcs_server")
    done = inv(pair[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    pair[0].run("docker", "exec", "node-ray", "pkill", "-CONT", "gcs_server")
    assert done.returncode != 0 and "Traceback" not in done.stderr and not serving(pair[0])
    assert wait(lambda: check(pair[0]).returncode == 0, 120, pause=2)


def rows(text: str) -> dict[str, str]:
    """Return the rows of the table of memory: the label, and the head's GiB."""
    lines = [line.rsplit(maxsplit=2) for line in text.splitlines()]
    return {words[0]: words[1] for words in lines if len(words) == 3}


def test_what_vllm_printed_is_used_by_later_checks(pair):
    """Nobody follows this load. After its end `check` has the sizes that vLLM printed, at another share of it too."""
    for name in ("loading.json", "readings.json"):  # of earlier tests
        (pair[0].cache / "node-ray" / name).unlink(missing_ok=True)
    launch = inv(pair[0], "launch", "--model", "rehearsal", "--detach", "--allow", ALLOW, VLLM_API_KEY=KEY)
    assert launch.returncode == 0, launch.stderr
    assert "(allowance)" in launch.stderr and "as loaded here" not in launch.stderr
    assert wait(lambda: inv(pair[0], "health", VLLM_API_KEY=KEY).returncode == 0, 240, pause=2)
    assert inv(pair[0], "stop").returncode == 0
    first, second = check(pair[0]), check(pair[0], GPU_MEM_UTIL="0.25")
    source = f"as loaded here on {time.strftime('%Y-%m-%d')}"
    was, now = rows(first.stderr), rows(second.stderr)
    assert first.returncode == 0 and f"activations ({source})" in was, first.stderr
    (printed,) = json.loads((pair[0].cache / "node-ray/readings.json").read_text())
    assert set(printed["nodes"]) == {"10.0.0.1", "10.0.0.2"} and printed["utilization"] == 0.2
    (cache,) = [label for label in was if label.startswith("KV cache: ")]
    assert float(was[cache]) == min(node["cache"] for node in printed["nodes"].values()) == 1.0
    (other,) = [label for label in now if label.startswith("KV cache: ")]
    assert now[f"activations ({source})"] == was[f"activations ({source})"] and float(now[other]) > 1.5
