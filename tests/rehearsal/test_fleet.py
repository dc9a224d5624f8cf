"""All nodes from one terminal: `up`, a second `up`, `down`, and an `up` that fails and takes its nodes down again."""

import json
import os
import pty
import shutil
import signal
import time
from pathlib import Path

import pytest
from operating import KEY, SHELL, TYPED, containers, gone, inv, serving, settled
from shells import FULL

from rehearsal.flow import ALLOW
from rehearsal.hosts import INV, Host

pytestmark = pytest.mark.rehearsal
REPOSITORY = Path(__file__).resolve().parents[2]
UP = ("up", "--model", "rehearsal", "--allow", ALLOW)
FLEET = {"VLLM_API_KEY": KEY, "WORKER_HOSTS": "spark-2"}
# The progress of a load begins with the model's name. A terminal that draws now and then may miss any one phase.
LOADS = "rehearsal: "


def up(host: Host, *words: str, **env: str):
    """Type `inv up` on the head."""
    return host.run(*INV, *UP, *words, env=SHELL | FLEET | env, timeout=400)


@pytest.fixture
def pair(sparks, shells):
    """The two hosts, with an sshd on the worker that is started anew after each test."""
    yield sparks
    shells.start(sparks[1])


def test_up_up_again_and_down(pair):
    """`up` brings all nodes up, a second `up` leaves them alone, and `down` removes all and names them."""
    first = up(pair[0])
    assert first.returncode == 0, first.stderr[-3000:]
    assert "Ready after" in first.stderr and "rehearsal: first request" in first.stderr
    assert KEY not in first.stdout + first.stderr and first.stdout == ""
    assert "VLLM_IMAGE=rehearsal/vllm-ray" in first.stderr, "what the shell said here is said to the worker, too"
    kept = json.loads((pair[0].cache / "node-ray/ready.json").read_text())
    assert kept["rehearsal on 10.0.0.1, 10.0.0.2"]["seconds"] > 5
    again = up(pair[0])
    assert again.returncode == 0 and again.stderr.count("left alone") == 3, again.stderr
    other = up(pair[0], "--max-len", "256")
    assert other.returncode != 0 and "another line" in other.stderr and "inv stop" in other.stderr
    assert serving(pair[0]), "what was there before is not taken down by one that is refused"
    down = inv(pair[0], "down", **FLEET)
    assert down.returncode == 0, down.stderr
    assert "spark-2 | node-ray was removed (running" in down.stderr and "\nnode-ray was removed" in down.stderr
    assert [containers(host) for host in pair] == ["", ""]
    assert "nothing was removed" in inv(pair[0], "down", **FLEET).stderr


def test_up_with_a_worker_that_is_not_reached(pair, shells):
    """The message has ssh's own words, the host and the command. The head that had started is removed."""
    shells.stop(pair[1])
    done = up(pair[0])
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "spark-2: `inv worker --detach --model rehearsal" in done.stderr
    assert "Connection refused" in done.stderr and "ssh -v spark-2 true" in done.stderr
    assert [containers(host) for host in pair] == ["", ""]
    unreached = inv(pair[0], "down", **FLEET)
    assert unreached.returncode != 0 and "spark-2: `inv down --here" in unreached.stderr


def test_up_with_another_version_of_the_repository_there(pair, tmp_path):
    """One more line in a template is another version. The worker refuses, and nothing stays up."""
    copy = tmp_path / "sparks"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__"))
    (copy / ".venv").symlink_to(REPOSITORY / ".venv")
    with (copy / "templates/ray_worker.j2").open("a") as template:
        template.write("--verbose\n")
    done = up(pair[0], REPO_DIR=str(copy))
    assert done.returncode != 0 and f"The repository here ({copy}) is another version than the head's" in done.stderr
    assert "git pull" in done.stderr
    assert [containers(host) for host in pair] == ["", ""]


def test_up_without_the_repository_there(pair):
    """If REPO_DIR has no repository, the message names that setting."""
    done = up(pair[0], REPO_DIR="nowhere/sparks")
    assert done.returncode != 0 and "in the same folder or in REPO_DIR?" in done.stderr
    assert [containers(host) for host in pair] == ["", ""]


def test_up_with_no_space_left_there(pair, shells):
    """The message has the worker's own words, the node and the command. With --keep the head stays up."""
    shells.start(pair[1], CACHE_DIR=FULL)
    done = up(pair[0], "--keep")
    assert done.returncode != 0 and "No space left on device" in done.stderr
    assert "spark-2: `inv worker --detach --model rehearsal" in done.stderr
    assert containers(pair[0]) == "node-ray running" and containers(pair[1]) == ""
    shells.start(pair[1])
    assert inv(pair[0], "down", **FLEET).returncode == 0
    assert containers(pair[0]) == ""


def test_up_needs_as_many_workers_as_the_model(pair):
    """Too few workers are refused before anything starts."""
    done = up(pair[0], TP_SIZE="4")
    assert done.returncode != 0 and "needs 3 workers" in done.stderr and "WORKER_HOSTS" in done.stderr
    assert containers(pair[0]) == ""


def test_ctrl_c_at_up_takes_down_what_it_started(pair, terminal):
    """Ctrl-C in the middle of a load leaves no container on any node."""
    typed = terminal(pair[0], *UP, **FLEET)
    typed.until(LOADS, 180)
    typed.end(signal.SIGINT)
    assert gone(pair[0]) and gone(pair[1]), typed.said
    assert "taken down again" in typed.said and "Traceback" not in typed.said


def seen(terminal: int, text: str, seconds: float) -> str:
    """Read a terminal until it shows text, and return everything it has shown."""
    said, end = "", time.monotonic() + seconds
    while text not in said:
        assert time.monotonic() < end, said
        said += os.read(terminal, 65536).decode(errors="replace")
    return said


def test_a_terminal_lost_while_it_loads_leaves_it_loading(pair):
    """The load goes on, as with `launch`, and the next `up` waits for it. A second `up` at the same time is refused."""
    ours, theirs = pty.openpty()
    typed = pair[0].popen(
        *TYPED, *UP, env=SHELL | FLEET, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    said = seen(ours, LOADS, 180)
    second = up(pair[0])
    assert second.returncode != 0 and "Another inv up runs on this head" in second.stderr
    os.close(ours)
    typed.send_signal(signal.SIGHUP)
    assert typed.wait(120) == 128 + signal.SIGHUP, said
    assert settled(lambda: serving(pair[0])), said
    again = up(pair[0])
    assert again.returncode == 0 and "Ready after" in again.stderr, again.stderr[-2000:]
    assert inv(pair[0], "health", **FLEET).returncode == 0
    assert inv(pair[0], "down", **FLEET).returncode == 0


def test_a_detached_head_is_a_head(pair):
    """`head --detach` returns when Ray runs, keeps a log, and leaves a head that runs alone."""
    first = inv(pair[0], "head", "--model", "rehearsal", "--detach")
    assert first.returncode == 0 and containers(pair[0]) == "node-ray running"
    container = pair[0].run("docker", "inspect", "--format", "{{.Id}}", "node-ray").stdout
    assert first.stdout == f"started {container}"
    again = inv(pair[0], "head", "--model", "rehearsal", "--detach")
    assert again.returncode == 0 and again.stdout == "" and "left alone" in again.stderr
    other = inv(pair[0], "head", "--detach")
    assert other.returncode != 0 and "started with another MEM_ABORT_GIB and NODE_RAY_WRAPPER" in other.stderr
    assert "Ray runtime started" in inv(pair[0], "logs", "--node").stdout
    assert inv(pair[0], "down", "--here").returncode == 0
    assert gone(pair[0])
    assert "Ray runtime started" in inv(pair[0], "logs", "--node").stdout, "the log outlives the node"
    assert "There is no" in inv(pair[1], "logs").stderr


def test_a_worker_of_another_head_is_left_alone(pair):
    """`down` removes only nodes of its own head."""
    assert inv(pair[0], "head", "--model", "rehearsal", "--detach").returncode == 0
    assert inv(pair[1], "worker", "--model", "rehearsal", "--detach").returncode == 0
    there = inv(pair[1], "down", "--here", "--head-ip", "10.0.0.9")
    assert there.returncode == 0 and "another head, 10.0.0.1" in there.stderr
    assert containers(pair[1]) == "node-ray running"
    assert inv(pair[0], "down", **FLEET).returncode == 0
