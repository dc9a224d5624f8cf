"""Two nodes that disagree, on real engines. `check` names the cause before a load, and passes without the cause."""

import json
import signal
from collections.abc import Callable, Iterator

import pytest
from operating import Terminal, containers, inv

from rehearsal.flow import ALLOW, IMAGE
from rehearsal.hosts import Host
from rehearsal.sandbox import child
from rehearsal.shell import run, wait

pytestmark = pytest.mark.rehearsal


def check(host, *words, **env):
    """Type `inv check` for the tiny model."""
    return inv(host, "check", "--model", "rehearsal", "--allow", ALLOW, *words, **env)


def findings(host, **env) -> dict[str, str]:
    """Return the text of each refusal of `inv check --json`, by its rule."""
    told = json.loads(check(host, "--json", **env).stdout)
    return {one["rule"]: one["text"] for one in told["findings"] if one["refuses"] and one["rule"] != ALLOW}


def joined(head, count=2) -> bool:
    """Wait for so many nodes. Return whether Ray has them."""
    return wait(lambda: f"Ray: {count} nodes" in inv(head, "health").stderr, 180, pause=1)


@pytest.fixture(scope="module")
def head(rig) -> Iterator[Host]:
    """The head, up for the tiny model. It stays from test to test, and each test brings a worker of its own."""
    typed = Terminal(rig.hosts[0], "head", "--model", "rehearsal")
    typed.until("Ray runtime started")
    yield rig.hosts[0]
    rig.hosts[0].run("docker", "rm", "--force", "node-ray")
    typed.process.wait(60)


@pytest.fixture
def worker(rig, head, terminal) -> Iterator[Callable[..., Terminal]]:
    """Types `inv worker` on the other host. Afterwards the head is alone again."""
    yield lambda *words, **env: terminal(rig.hosts[1], "worker", *words, **env)
    rig.hosts[1].run("docker", "stop", "node-ray")
    assert joined(head, 1)


@pytest.mark.parametrize(
    ("words", "env", "rules"),
    [
        ((), {}, {"wrapper", "variables"}),
        (("--model", "rehearsal"), {"VLLM_CPU_KVCACHE_SPACE": "2"}, {"variables"}),
    ],
    ids=["missing", "different"],
)
def test_a_variable_of_the_worker(head, worker, words, env, rules):
    """The worker lacks a variable, or has another value. The refusal has both values and the next command."""
    typed = worker(*words, **env)
    assert joined(head)
    found = findings(head)
    assert set(found) == rules
    value = env.get("VLLM_CPU_KVCACHE_SPACE", "none")
    assert f"10.0.0.1 has 1, 10.0.0.2 has {value}" in found["variables"]
    assert "inv worker --model rehearsal" in found["variables"]
    typed.end(signal.SIGTERM)
    worker("--model", "rehearsal")
    assert wait(lambda: check(head).returncode == 0, 180, pause=2)


@pytest.mark.parametrize(
    ("label", "refused"),
    [("other=1", False), ("org.opencontainers.image.base.digest=sha256:other", True)],
    ids=["another build", "another base"],
)
def test_images_of_two_builds(rig, head, worker, label, refused):
    """Two builds of one base are a warning, and of two bases a refusal. Each has the line that copies the image."""
    there = rig.hosts[1]
    own = there.run("docker", "image", "inspect", "--format", "{{.Id}}", IMAGE).stdout.strip()
    made = there.run("docker", "build", "--tag", IMAGE, "-", input=f"FROM {own}\nLABEL {label}\n", stdin=None)
    assert made.returncode == 0, made.stderr
    try:
        worker("--model", "rehearsal")
        assert joined(head)
        done = check(head)
        assert (done.returncode != 0) == refused
        assert "From this node: " in done.stderr and "inv ship-image --model rehearsal" in done.stderr
    finally:
        there.run("docker", "tag", own, IMAGE)


def test_no_rdma_device_on_the_worker(rig, head, worker):
    """Docker refuses a device that does not exist, and the worker's terminal shows its name."""
    there = rig.hosts[1]
    inside = child(child(rig.processes["spark-2"].pid))
    run("nsenter", "--target", str(inside), "--mount", "rm", "-r", "/dev/infiniband")
    try:
        typed = worker("--model", "rehearsal")
        assert typed.process.wait(120) != 0
        assert "/dev/infiniband" in typed.read() and containers(there) == ""
    finally:
        rig.power_off(there)
        rig.power_on(there)
    worker("--model", "rehearsal")
    assert wait(lambda: check(head).returncode == 0, 180, pause=2)


def test_two_rays_on_one_spark(head):
    """Ray counts a second Ray on the head's machine as a node with a GPU. `check` names the head's machine.

    The second Ray ends with the head, so this is the head's last test.
    """
    head.run("docker", "exec", "node-ray", "ray", "start", "--address=10.0.0.1:6379", "--node-ip-address=10.0.1.1")
    assert joined(head)
    assert "10.0.1.1 was started on the machine of 10.0.0.1" in findings(head)["hosts"]


def test_a_rule_that_nobody_has_cannot_be_allowed(rig):
    """A mistyped name in --allow is an error."""
    done = inv(rig.hosts[0], "check", "--model", "rehearsal", "--allow", "memlok")
    assert done.returncode != 0 and "--allow names memlok" in done.stderr
