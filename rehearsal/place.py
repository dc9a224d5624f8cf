"""Where a rehearsal lives on this machine: one folder of root's."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from rehearsal.shell import RehearsalError
from settings import resolve

SETTING = "REHEARSAL_DIR"
# A socket's path has at most 107 characters, and containerd puts its own 51 below this folder.
LONGEST = 56
OURS = ("engines", "run", "log", "base", "base.tar")


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder that REHEARSAL_DIR names; raise RehearsalError where engines could not live in it."""
    path = Path(resolve.load(shell=environ)[SETTING])
    if not re.fullmatch(r"/[\w./-]+", str(path)) or ".." in path.parts or len(str(path)) > LONGEST:
        raise RehearsalError(
            f"{SETTING} is {str(path)!r}; it takes an absolute path of letters, digits and ._/- of at most {LONGEST} "
            "characters: it ends up in the paths of sockets and in mount options."
        )
    return path


def foreign(root: Path) -> Path | None:
    """Something in the folder that no rehearsal made; else None. Rehearsals remove what is theirs without asking."""
    try:
        return next((path for path in sorted(root.iterdir()) if path.name not in OURS), None)
    except NotADirectoryError:
        return root
    except OSError:  # not there yet, or root's alone: then root asks again
        return None


def data(root: Path, name: str) -> Path:
    """Images and layers of one engine, kept between runs."""
    return root / "engines" / name


def state(root: Path, name: str) -> Path:
    """Sockets and settings of one engine or host, gone after the run."""
    return root / "run" / name


def log(root: Path, name: str) -> Path:
    """The log of an engine or of a long step, kept until the next run writes it anew."""
    return root / "log" / f"{name}.log"
