"""All nodes down: the server, then every node's container, and what was removed is said."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from invoke import Exit

from cluster import guards, leftovers, server
from cluster.node import CONTAINER
from command import run
from command.command import Command, say
from fleet import remote
from host import engine
from settings.resolve import Settings


def commands(settings: Settings) -> list[Command]:
    """All that `down` runs on the head, in order."""
    there = [remote.down(settings, host).command for host in remote.hosts(settings)]
    return [server.stop(), *there, leftovers.removal()]


def down(settings: Settings) -> None:
    """Stop the server, remove the head's and every worker's container; raises Exit at the end if a node failed."""
    found = engine.node()
    if found is not None and found.status == "running":
        guards.is_head(found)
        if guards.is_serving(found):
            run.run_whole(server.stop())
    failed = elsewhere(settings, remote.hosts(settings))
    here()
    if failed:
        raise Exit("\n".join([*failed, "These nodes may still be up; the others are down."]))


def here(head_ip: str | None = None) -> bool:
    """Remove this node's container, unless it was started for another head than head_ip; whether there was one."""
    found = engine.node()
    if found is None:
        say(f"No {CONTAINER} is here: nothing was removed.")
        return False
    head = engine.environment(found).get("MASTER_ADDR")
    if head_ip is not None and head != head_ip:
        say(f"{CONTAINER} is here for another head, {head}: it was left alone.")
        return False
    run.run_whole(leftovers.removal())
    say(f"{CONTAINER} was removed ({found.status}, {engine.age(found)} old).")
    return True


def elsewhere(settings: Settings, hosts: Sequence[str]) -> list[str]:
    """Take workers down over ssh, all at once; why, for each that could not be."""
    if not hosts:
        return []
    with ThreadPoolExecutor(len(hosts)) as pool:
        asked = [pool.submit(remote.run_there, remote.down(settings, host)) for host in hosts]
    return [str(one.exception().message) for one in asked if isinstance(one.exception(), Exit)]
