"""All nodes down: the server, then every node's container, and what was removed is said."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from invoke import Exit

from cluster import guards, leftovers, server
from cluster.node import CONTAINER
from command import run
from command.command import Command, say
from fleet import remote
from host import engine, ports
from settings.resolve import Settings

# Removing a container takes a second; a host that hangs must not keep the others up.
THERE_S = 60


def commands(settings: Settings) -> list[Command]:
    """All that `down` runs on the head, in order."""
    there = [remote.down(settings, host).command for host in remote.hosts(settings)]
    return [server.stop(), *there, leftovers.removal()]


def down(settings: Settings) -> None:
    """Stop the server, remove the head's and every worker's container; raises Exit at the end if a node failed."""
    found = engine.node()
    if found is not None:
        guards.is_head(found)
    elif not ports.is_mine(settings["HEAD_NODE_IP"]):
        raise Exit(
            f"This host is not the head: HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is "
            f"{settings['HEAD_NODE_IP']}. Type it there; for this node alone: inv down --here"
        )
    if found is not None and found.status == "running":
        stopped()
    if failed := everywhere(settings, remote.hosts(settings), head=True):
        raise Exit(
            "\n".join(failed)
            + "\nThese nodes may still be up, the others are down. A head that has no worker says so in "
            ".env: WORKER_HOSTS="
        )


def stopped() -> None:
    """End the server if one runs; a server that cannot be asked to goes with its node."""
    try:
        if guards.is_serving(guards.running_node("")):
            run.run_whole(server.stop())
    except Exit as error:
        say(str(error.message))


def here(head_ip: str | None = None) -> None:
    """Remove this node's container, unless it was started for another head than head_ip."""
    found = engine.node()
    if found is None:
        return say(f"No {CONTAINER} is here: nothing was removed.")
    head = engine.environment(found).get("MASTER_ADDR")
    if head_ip is not None and head != head_ip:
        return say(f"{CONTAINER} is here for another head, {head}: it was left alone.")
    run.run_whole(leftovers.removal())
    say(f"{CONTAINER} was removed ({found.status}, {engine.age(found)} old).")


def everywhere(settings: Settings, workers: Sequence[str], head: bool) -> list[str]:
    """Take workers down over ssh and, if asked, this head, all at once; why, for each worker that could not be."""
    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        asked = [pool.submit(remote.run_there, remote.down(settings, host), THERE_S) for host in workers]
        own = _here() if head else []
    return [*failures(asked), *own]


def _here() -> list[str]:
    """Why this node could not be taken down, or nothing."""
    try:
        here()
    except Exit as error:
        return [f"This node: {error.message}"]
    return []


def failures(asked: Sequence[Future]) -> list[str]:
    """What those that failed said; raises what is no failure of a node's."""
    said = [str(one.exception().message) for one in asked if isinstance(one.exception(), Exit)]
    for one in asked:
        if not isinstance(one.exception(), Exit):
            one.result()
    return said
