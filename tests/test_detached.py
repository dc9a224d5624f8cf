"""A node that outlives its terminal: when it counts as up, and that a start that fails leaves nothing behind."""

import subprocess
import time
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import detached
from command import run
from command.command import Command
from host import engine

ID = "0123456789abcdef" * 4
RUNS = f"echo {detached._STARTED}; exec sleep 60"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a shell script as a node; its process is then `start.process`, which no test leaves behind."""
    started, detach = [], run.detach
    monkeypatch.setattr(run, "detach", lambda command: started.append(detach(command)) or started[-1])
    monkeypatch.setattr(engine, "node", lambda: SimpleNamespace(id=ID, status="running"))
    often = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(0.002))
    monkeypatch.setattr(detached, "time", often)

    def begin(script):
        (tmp_path / "node.log").write_text(f"{detached._STARTED} by the one before\n")
        return detached.start(Command((("sh", "-c", script),), log=tmp_path / "node.log"))

    begin.started = started
    yield begin
    for process, _ in started:
        process.kill()
        process.wait(5)


def test_a_node_is_up_when_ray_runs_in_it(start):
    """By its own lines in the log, not those of the one before; its container's id is what comes back."""
    assert start(f"sleep 0.01; {RUNS}") == ID
    assert start.started[0][0].poll() is None


def test_a_node_that_ends_is_said_with_its_last_lines(start, tmp_path):
    """And with its status."""
    with pytest.raises(Exit, match=r"(?s)^node-ray ended with status 125\. .*node.log:\n  No such image$"):
        start("echo No such image; exit 125")


def test_a_node_that_takes_too_long_is_ended(start, monkeypatch):
    """It passes that on, and its container goes."""
    monkeypatch.setattr(detached, "START_S", 0.01)
    with pytest.raises(Exit, match=r"(?s)did not start Ray within 0.01 s.*\n  \(nothing\)$"):
        start("exec sleep 60")
    assert start.started[0][0].returncode == -15


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(129)], ids=repr)
def test_an_end_meanwhile_leaves_no_node(end, start, monkeypatch):
    """A Ctrl-C or a lost terminal: who has not seen it come up does not know of it."""

    def ends(*_):
        raise end

    monkeypatch.setattr(detached, "time", SimpleNamespace(monotonic=time.monotonic, sleep=ends))
    with pytest.raises(type(end)):
        start("exec sleep 60")
    assert start.started[0][0].returncode == -15


def test_a_node_that_cannot_be_named_is_ended(start, monkeypatch):
    """Nobody takes down what nobody knows of."""

    def lost():
        raise Exit("Docker cannot be reached")

    monkeypatch.setattr(engine, "node", lost)
    with pytest.raises(Exit, match="Docker cannot be reached"):
        start(RUNS)
    assert start.started[0][0].poll() is not None


@pytest.mark.parametrize(("status", "removed"), [("created", 1), ("running", 0)])
def test_a_container_that_was_made_and_not_started_goes_too(status, removed, start, monkeypatch):
    """`--rm` is for what has run: one that was just made would keep its name."""
    gone = []
    monkeypatch.setattr(engine, "node", lambda: SimpleNamespace(id=ID, status=status))
    monkeypatch.setattr(run, "run_whole", gone.append)
    monkeypatch.setattr(detached, "START_S", 0.01)
    with pytest.raises(Exit, match="did not start Ray"):
        start("exec sleep 60")
    assert len(gone) == removed


def test_a_node_that_does_not_go_hides_no_reason(monkeypatch, tmp_path):
    """Why it was ended is what is said."""

    def waits(seconds):
        raise subprocess.TimeoutExpired("docker run", seconds)

    stays = SimpleNamespace(poll=lambda: None, terminate=lambda: None, wait=waits)
    monkeypatch.setattr(run, "detach", lambda _: (stays, 0))
    monkeypatch.setattr(detached, "START_S", 0)
    (tmp_path / "node.log").touch()
    with pytest.raises(Exit, match="did not start Ray"):
        detached.start(Command((("true",),), log=tmp_path / "node.log"))
