"""What earlier runs left on this node. Whether they were finished is a person's question, so nothing goes by itself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.node import RAY_PORT
from cluster.node import removal_command as removal
from command import run
from command.command import say
from host import engine, ports
from settings.resolve import Settings

if TYPE_CHECKING:
    from docker.models.containers import Container


def clean(settings: Settings, yes: bool) -> None:
    """Show what is left, ask, and remove the containers; raises Exit without a terminal unless yes."""
    found = engine.ours()
    _report(found, settings)
    if not found:
        return say("Nothing to remove.")
    if not yes and not _agreed(found):
        raise Exit("Nothing was removed.")
    if {left.id for left in engine.ours()} != {left.id for left in found}:
        raise Exit("The containers have changed meanwhile; nothing was removed. Look again: inv cleanup")
    run.run_whole(removal([left.name for left in found]))


def _report(found: list[Container], settings: Settings) -> None:
    for left in found:
        say(f"{left.name}: {left.status}, {engine.age(left)} old, image {engine.image(left)}")
    for what, port in (("Ray", RAY_PORT), ("API", int(settings["PORT"]))):
        say(f"{what}: {ports.obstacle('0.0.0.0', port) or f'port {port} is free'}")


def _agreed(found: list[Container]) -> bool:
    names = ", ".join(left.name for left in found)
    if not sys.stdin.isatty():
        raise Exit(f"There is no terminal to ask at. To remove {names}: inv cleanup --yes")
    print(f"Did the previous run finish? Remove {names} [y/N]: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
