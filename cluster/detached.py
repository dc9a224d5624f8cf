"""A node with --detach: its container outlives the terminal, and writes to a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from invoke import Exit

from cluster import engine
from cluster.command import Child, Command, TooLate, answers, detach, run, say
from cluster.engine import CONTAINER
from cluster.node import prepare_node, removal_command

# Seconds that a detached node has for starting Ray, and for ending after a SIGTERM.
START_S, END_S = 90, 20
RAY_RUNS = "Ray runtime started"


def bring_node_up(commands: Sequence[Command], guard: Callable[[], None]) -> str | None:
    """Start the node. Return the id of its container; None if the node runs already, started the same way."""
    if runs_already(commands[-1]):
        return None
    return start_detached(prepare_node(commands, guard))


def runs_already(container: Command) -> bool:
    """Whether this node runs, started with the same variables. Raises Exit if one of them differs."""
    running = engine.node_container()
    if running is None or running.status != "running":
        return False
    wanted = {**container.env, **answers(container)}
    wanted.pop("NODE_RAY_REPOSITORY", None)  # `check` reports a changed repository
    env = engine.container_environment(running)
    if differing := [name for name, value in wanted.items() if env.get(name) != value]:
        names = " and ".join(differing)
        raise Exit(f"{CONTAINER} runs here already, but was started with another {names}. Type: inv down --here")
    say(f"{CONTAINER} runs here already, started the same way {engine.container_age(running)} ago: it is left alone.")
    return True


def start_detached(container: Command) -> str:
    """Start the node in a session of its own, wait until Ray runs in it, and return the container's id.

    Raises Exit with the log's last lines if Ray does not run within START_S. The container is removed then.
    """
    assert container.log, "only a detached node has a log"
    child, begun = detach(container)
    try:
        _wait_for_ray(child, container.log, begun)
        started = engine.node_container()
        if started is None:
            raise Exit(f"{CONTAINER} has ended right after its start. Its log: inv logs --node")
    except BaseException:
        _end_start(child)
        raise
    say(f"Ray runs in {CONTAINER}. Its log: inv logs --node; to end it: inv down --here")
    return started.id


def _wait_for_ray(child: Child, log: Path, begun: int) -> None:
    """Wait for Ray's own line in the node's log. begun: the size of the log before this start."""
    deadline = time.monotonic() + START_S
    output = ""
    with log.open(errors="replace") as growing:
        growing.seek(begun)
        while RAY_RUNS not in output and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
            output += growing.read()
        output += growing.read()
    if RAY_RUNS in output:
        return
    ended = child.poll() is not None
    failure = f"ended with status {child.returncode}" if ended else f"did not start Ray within {START_S} s"
    last = "\n".join(f"  {line}" for line in output.strip().splitlines()[-12:]) or "  (nothing)"
    raise Exit(f"{CONTAINER} {failure}. The last lines of {log}:\n{last}")


def _end_start(child: Child) -> None:
    """End a start that failed. `docker run` passes SIGTERM on; a container that stays all the same is removed."""
    child.terminate()
    with suppress(TooLate):
        child.wait(END_S)
    left = engine.node_container()
    # Docker keeps a container that was created and never started. If this start has ended, another made what runs.
    if left and (child.poll() is None or left.status == "created"):
        child.kill()
        run(removal_command(), whole=True)
