"""A detached node: when it counts as up, and that a failed start leaves nothing behind."""

import time
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import detached, engine
from cluster.command import Command

ID = "0123456789abcdef" * 4
RUNS = f"echo {detached.RAY_RUNS}; exec sleep 60"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a shell script as a node. The test finds its processes in `start.children`; none is left behind."""
    children, detach = [], detached.detach

    def noted(command):
        child, begun = detach(command)
        children.append(child)
        return child, begun

    def begin(script):
        (tmp_path / "node.log").write_text(f"{detached.RAY_RUNS}, said the node before\n")
        return detached.start_detached(Command((("sh", "-c", script),), log=tmp_path / "node.log"))

    monkeypatch.setattr(detached, "detach", noted)
    monkeypatch.setattr(engine, "node_container", lambda: SimpleNamespace(id=ID, status="running"))
    monkeypatch.setattr(detached, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(0.002)))
    begin.children = children
    yield begin
    for child in children:
        child.kill()
        child.wait(5)


def test_a_node_is_up_when_ray_runs(start):
    """Only lines of this start count, not those of the node before. The container's id is returned."""
    assert start(f"sleep 0.01; {RUNS}") == ID
    assert start.children[0].poll() is None


def test_the_last_lines_of_a_node_that_ends_are_shown(start):
    """The message has the exit status and the log's last lines."""
    with pytest.raises(Exit, match=r"(?s)^node-ray ended with status 125\. .*node.log:\n  No such image$"):
        start("echo No such image; exit 125")


def test_a_node_that_takes_too_long_is_ended(start, monkeypatch):
    """`docker run` gets SIGTERM, which it passes to the container."""
    monkeypatch.setattr(detached, "START_S", 0.01)
    with pytest.raises(Exit, match=r"(?s)did not start Ray within 0.01 s.*\n  \(nothing\)$"):
        start("exec sleep 60")
    assert start.children[0].returncode == -15


def test_an_interrupted_start_leaves_no_node(start, monkeypatch):
    """After Ctrl-C or a lost terminal the start is ended, so that no node stays that nobody knows."""

    def lost(_):
        raise SystemExit(129)

    monkeypatch.setattr(detached, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lost))
    with pytest.raises(SystemExit):
        start("exec sleep 60")
    assert start.children[0].returncode == -15


def test_a_node_whose_container_cannot_be_found_is_ended(start, monkeypatch):
    """Without the container's id nobody could take the node down."""

    def unreachable():
        raise Exit("Docker cannot be reached")

    monkeypatch.setattr(engine, "node_container", unreachable)
    with pytest.raises(Exit, match="Docker cannot be reached"):
        start(RUNS)
    assert start.children[0].poll() is not None


@pytest.mark.parametrize(("status", "removed"), [("created", 1), ("running", 0)])
def test_a_container_that_was_created_but_not_started_is_removed(status, removed, start, monkeypatch):
    """`--rm` removes only a container that has run: one that was only created would keep its name."""
    commands = []
    monkeypatch.setattr(engine, "node_container", lambda: SimpleNamespace(id=ID, status=status))
    monkeypatch.setattr(detached, "run", lambda command, whole: commands.append(command))
    monkeypatch.setattr(detached, "START_S", 0.01)
    with pytest.raises(Exit, match="did not start Ray"):
        start("exec sleep 60")
    assert len(commands) == removed


CONTAINER = Command((("docker", "run"),), env={"VLLM_HOST_IP": "10.0.0.1"}, asks={"IMAGE": (("echo", "sha256:1"),)})


@pytest.mark.parametrize(("image", "differs"), [("sha256:1", False), ("sha256:2", True)])
def test_a_node_that_runs_already_is_compared(image, differs, monkeypatch):
    """A node that was started in the same way is left alone; one with another image or variable is refused."""
    config = {"Env": ["VLLM_HOST_IP=10.0.0.1", f"IMAGE={image}"]}
    running = SimpleNamespace(status="running", attrs={"Config": config, "Created": "2026-01-01T00:00:00Z"})
    monkeypatch.setattr(engine, "node_container", lambda: running)
    if differs:
        with pytest.raises(Exit, match=r"but was started with another IMAGE\. Type: inv down --here$"):
            detached.runs_already(CONTAINER)
    else:
        assert detached.runs_already(CONTAINER)


def test_a_stopped_node_is_left_to_the_guard(monkeypatch):
    """The guard decides about a container that does not run."""
    monkeypatch.setattr(engine, "node_container", lambda: SimpleNamespace(status="exited"))
    assert not detached.runs_already(CONTAINER)
