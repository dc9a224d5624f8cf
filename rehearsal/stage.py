"""The tasks `inv rehearse` and `inv test`. Both need root, and the programs of `needs`."""

import os
import shlex
import sys
from typing import NoReturn

from invoke import Exit

from cluster.command import Command, become, run, say
from cluster.repository import ROOT
from rehearsal import flow, needs, sandbox
from rehearsal.hosts import INV
from rehearsal.rig import Rig

# The tiny model has four key-value heads, which split over these numbers of hosts.
HOSTS = ("1", "2", "4")
HANDED_ON = ("CI", sandbox.SETTING, "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
PYTEST = (sys.executable, "-m", "pytest", "--rootdir", str(ROOT), "-p", "no:cacheprovider")


def check(hosts: str) -> None:
    """Raise Exit for a number of hosts over which the tiny model cannot be split."""
    if hosts not in HOSTS:
        raise Exit(f"--hosts is {hosts!r}; it takes {', '.join(HOSTS)}.")


def prepare(install: bool, *task: str, tests: bool = False) -> None:
    """Make sure that a rehearsal can run. For a user, the process becomes the same task under sudo.

    install: install the missing packages first. Raises Exit with the line to type if something is missing.
    """
    if not install and (said := needs.missing(as_root=False, tests=tests)):
        raise Exit(f"{said}\nOr add --install, which installs them.")
    if os.geteuid():
        as_root(*INV, *task)
    if install:
        needs.install(tests=tests)
    if said := needs.missing(tests=tests):
        raise Exit(said)


def as_root(*words: str) -> NoReturn:
    """Become a command under sudo. sudo keeps only the variables that a rehearsal needs."""
    kept = [
        name for name in os.environ if name in HANDED_ON or name.startswith("PIP_") or name.lower().endswith("_proxy")
    ]
    env = ("env", "PYTHONDONTWRITEBYTECODE=1")  # root must leave no file in the checkout
    become(Command((("sudo", f"--preserve-env={','.join(sorted(kept))}", *env, *words),), "as root"))


def rehearse(hosts: str, keep: bool) -> None:
    """Run the flow on so many stand-in Sparks, and print the results. Raises Exit if a step failed."""
    with Rig(int(hosts), keep=keep, say=say) as rig:
        report, well = flow.rehearse(rig, say, keep)
        say("", *(_how_to_talk(rig) if keep else ()), *report)
    if not well:
        raise Exit(f"The rehearsal failed. Its logs are in {rig.root}/log.")


def down() -> None:
    """Take down a rehearsal that was kept up. Raises Exit while a rehearsal runs."""
    if os.geteuid():
        as_root(*INV, "rehearse", "--down")
    say("The stand-in Sparks are down." if sandbox.take_down() else "There is nothing to take down.")


def fast() -> NoReturn:
    """Become pytest, and run the fast tests."""
    become(Command(((*PYTEST, str(ROOT / "tests")),)))


def everything(install: bool) -> NoReturn:
    """Become pytest, and run all tests. For a user, the fast tests run as the user, and all tests run as root.

    With install, or if CI is set, a test that cannot run fails. Otherwise the test is skipped with its reason.
    """
    if install:
        os.environ["CI"] = "true"
    if os.geteuid() and (install or not needs.missing(as_root=False, tests=True)):
        run(Command(((*PYTEST, str(ROOT / "tests")),)))
        as_root(*INV, "test", *(("--install",) if install else ()))
    if install:
        prepare(install, tests=True)
    become(Command(((*PYTEST, "-m", "", str(ROOT / "tests")),), env={"PYTHONDONTWRITEBYTECODE": "1"}))


def _how_to_talk(rig: Rig) -> list[str]:
    head = rig.hosts[0]
    env = shlex.join(f"{name}={value}" for name, value in head.env.items() if name in ("DOCKER_HOST", "SYSFS"))
    return [
        "The stand-in Sparks are up. To talk to them, as root:",
        f"  {shlex.join(head.command('env'))} {env} docker ps",
        f"  {shlex.join(head.command('curl'))} -H @{flow.header_file(head)} http://{head.address}:8000/v1/models",
        f"To take them down: {'sudo ' if 'SUDO_USER' in os.environ else ''}./inv rehearse --down",
        "",
    ]
