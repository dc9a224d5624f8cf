"""Cleanup: the containers that earlier runs have left on this node. A person decides whether those runs are over."""

import sys

from invoke import Exit

from cluster import engine
from cluster.command import run, say
from cluster.node import RAY_PORT, removal_command
from cluster.ports import freeing, port_obstacle
from cluster.settings import Settings


def clean_up(settings: Settings, yes: bool) -> None:
    """Show what is left, ask unless `yes`, and remove the containers. Raises Exit if there is no terminal to ask at."""
    found = engine.our_containers()
    for container in found:
        age, image = engine.container_age(container), engine.container_image(container)
        say(f"{container.name}: {container.status}, {age} old, image {image}")
    _tell_ports(settings, others=not found)
    if not found:
        return say("Nothing to remove.")
    names = [container.name for container in found]
    if not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise Exit(f"There is no terminal to ask at. To remove {', '.join(names)}: inv cleanup --yes")
        print(f"Did the previous run finish? Remove {', '.join(names)} [y/N]: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Exit("Nothing was removed.")
    run(removal_command(names), whole=True)
    _tell_ports(settings, others=True)


def _tell_ports(settings: Settings, others: bool) -> None:
    """Tell what holds the ports. others: no container is left, so it is another program, which a person has to end."""
    for program, port in (("Ray", RAY_PORT), ("API", int(settings["PORT"]))):
        obstacle = port_obstacle("0.0.0.0", port)
        say(f"{program}: {obstacle or f'port {port} is free'}{freeing(obstacle) if others else ''}")
