"""`inv test`: pytest on the fast tests and, as root, on those that need the stand-in Sparks."""

import os
import sys
from typing import NoReturn

from command import run
from command.command import Command
from rehearsal import needs, stage
from rehearsal.hosts import INV
from settings.models import ROOT

_PYTEST = (sys.executable, "-m", "pytest", "--rootdir", str(ROOT), "-p", "no:cacheprovider")


def fast() -> NoReturn:
    """Become pytest on the fast tests."""
    run.become(Command(((*_PYTEST, str(ROOT / "tests")),)))


def everything(install: bool) -> NoReturn:
    """Become pytest on all tests. A user's fast tests run as the user, the rest as root through sudo.

    With install, or where CI is set, a test that cannot run is a failure; else it is skipped with its reason.
    """
    all_of_them = (*_PYTEST, "-m", "", str(ROOT / "tests"))
    if install:
        os.environ["CI"] = "true"
    if os.geteuid() and (install or not needs.missing(as_root=False, tests=True)):
        run.run(Command(((*_PYTEST, str(ROOT / "tests")),)))
        stage.as_root(*INV, "test", *(("--install",) if install else ()))
    if install:
        stage.prepare(install, tests=True)
    run.become(Command((all_of_them,), env={"PYTHONDONTWRITEBYTECODE": "1"}))
