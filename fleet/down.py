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
    head_ip = settings["HEAD_NODE_IP"]
    there = [remote.down(settings, host, head_ip).command for host in settings.workers()]
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
    # As it was when the nodes were brought up: HEAD_NODE_IP may have been another in that shell.
    head_ip = engine.environment(found)["MASTER_ADDR"] if found else settings["HEAD_NODE_IP"]
    if failed := everywhere(settings, settings.workers(), head_ip, head=True):
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
    head = guards.head_of(found)
    if head_ip is not None and head != head_ip:
        return say(f"{CONTAINER} is here for another head, {head}: it was left alone.")
    run.run_whole(leftovers.removal())
    say(f"{CONTAINER} was removed ({found.status}, {engine.age(found)} old).")


def everywhere(settings: Settings, workers: Sequence[str], head_ip: str, head: bool) -> list[str]:
    """Take workers of this head down over ssh and, if asked, itself, all at once; why, for each that could not be."""
    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        asked = [pool.submit(remote.run_there, remote.down(settings, host, head_ip), THERE_S) for host in workers]
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
