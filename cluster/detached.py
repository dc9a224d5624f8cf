"""A node that outlives its terminal: the same `docker run`, in a session of its own, its output in a log."""

import time
from contextlib import suppress

from invoke import Exit

from cluster import leftovers
from cluster.node import CONTAINER
from command import run
from command.command import Command, say
from host import engine

START_S, END_S = 90, 20
_STARTED = "Ray runtime started"


def runs_already(container: Command) -> bool:
    """Whether this node is up just as the command would start it; raises Exit if it is up in another way."""
    found = engine.node()
    if found is None or found.status != "running":
        return False
    there, asked = engine.environment(found), container.env | run.answers(container)
    if other := [name for name, value in asked.items() if there.get(name) != value]:
        raise Exit(f"{CONTAINER} runs here already, started with another {' and '.join(other)}. Type: inv down --here")
    say(f"{CONTAINER} runs here already, started just so ({engine.age(found)} ago): it is left alone.")
    return True


def start(container: Command) -> str:
    """Start the node and wait until Ray runs in it; the container's id.

    Raises Exit with the log's last lines if it ends or takes START_S; then, as after a Ctrl-C, no container stays.
    """
    process, begun = run.detach(container)
    try:
        _until_ray_runs(process, container, begun)
        found = engine.node()
    except BaseException:
        _end(process)
        raise
    say(f"Ray runs in {CONTAINER}. Its log: inv logs --node; to end it: inv down --here")
    return found.id if found else ""


def _end(process: run.Child) -> None:
    """End the start and its container: it passes SIGTERM on, unless it hangs, or has made and not yet started it."""
    process.terminate()
    with suppress(run.TooLate):
        process.wait(END_S)
    try:
        left = engine.node()
        if left and (process.poll() is None or left.status == "created"):
            process.kill()
            run.run_whole(leftovers.removal())
    except Exit as error:  # beside why it is ended
        say(str(error.message))


def _until_ray_runs(process: run.Child, container: Command, begun: int) -> None:
    deadline = time.monotonic() + START_S
    while _STARTED not in (said := _read(container, begun)):
        if process.poll() is not None:
            raise Exit(_failed(f"ended with status {process.returncode}", container, said))
        if time.monotonic() > deadline:
            raise Exit(_failed(f"did not start Ray within {START_S} s", container, said))
        time.sleep(0.1)


def _read(container: Command, begun: int) -> str:
    """What the log has from so many bytes on."""
    with container.log.open(errors="replace") as log:
        log.seek(begun)
        return log.read()


def _failed(how: str, container: Command, said: str) -> str:
    last = "\n".join(f"  {line}" for line in said.strip().splitlines()[-12:]) or "  (nothing)"
    return f"{CONTAINER} {how}. The last lines of {container.log}:\n{last}"
