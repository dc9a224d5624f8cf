"""`inv rehearse`, and what it shares with `inv test`: a machine that has what it takes, and root for that alone."""

import os
import shlex
from typing import NoReturn

from invoke import Exit

from command import run
from command.command import Command, say
from rehearsal import flow, needs, place, sweep
from rehearsal.hosts import INV
from rehearsal.rig import Rig
from rehearsal.shell import RehearsalError

# What the tiny model can be split by: it has four heads.
HOSTS = ("1", "2", "4")
_HANDED_ON = ("CI", place.SETTING, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def check(hosts: str) -> None:
    """Raise Exit for a number of hosts that the tiny model cannot be split by."""
    if hosts not in HOSTS:
        raise Exit(f"--hosts is {hosts!r}; it takes {', '.join(HOSTS)}.")


def prepare(install: bool, *task: str, tests: bool = False) -> None:
    """Have all that a rehearsal needs, as root: else become this task under sudo, or raise Exit with what to type."""
    try:
        if not install and (said := needs.missing(as_root=False, tests=tests)):
            raise Exit(f"{said}\nOr let --install type it.")
        if os.geteuid():
            as_root(*INV, *task)
        if install:
            needs.install(tests=tests)
        if said := needs.missing(tests=tests):
            raise Exit(said)
    except RehearsalError as error:
        raise Exit(str(error)) from None


def as_root(*words: str) -> NoReturn:
    """Become these words under sudo, which keeps the settings that matter here and nothing else."""
    kept = [
        name for name in os.environ if name in _HANDED_ON or name.startswith("PIP_") or name.lower().endswith("_proxy")
    ]
    env = ("env", "PYTHONDONTWRITEBYTECODE=1")  # root leaves no file in the checkout
    run.become(Command((("sudo", f"--preserve-env={','.join(sorted(kept))}", *env, *words),), "as root"))


def rehearse(hosts: str, keep: bool) -> None:
    """Run the flow on so many stand-in Sparks and print the checked list; raises Exit if a step failed."""
    try:
        with Rig(int(hosts), keep=keep, say=say) as rig:
            steps = flow.rehearse(rig, say, keep)
        say("", *(_how_to_talk(rig) if keep else ()), *flow.report(steps))
    except RehearsalError as error:
        raise Exit(str(error)) from None
    if any(step.failed for step in steps):
        raise Exit("The rehearsal failed; its logs are in " + str(place.log(rig.root, "x").parent) + ".")


def down() -> None:
    """Take a kept rehearsal down, as root; raises Exit while another one runs."""
    if os.geteuid():
        as_root(*INV, "rehearse", "--down")
    try:
        say("It is down." if sweep.take_down() else "There is nothing to take down.")
    except RehearsalError as error:
        raise Exit(str(error)) from None


def _how_to_talk(rig: Rig) -> list[str]:
    head = rig.hosts[0]
    key = flow.header_file(head)
    env = shlex.join(f"{name}={value}" for name, value in head.env.items() if name in ("DOCKER_HOST", "SYSFS"))
    return [
        "The stand-in Sparks are up. To talk to them, as root:",
        f"  {shlex.join(head.command('env'))} {env} docker ps",
        f"  {shlex.join(head.command('curl'))} -H @{key} http://10.0.0.1:8000/v1/models",
        f"To take them down: {'sudo ' if 'SUDO_USER' in os.environ else ''}./inv rehearse --down",
        "",
    ]
