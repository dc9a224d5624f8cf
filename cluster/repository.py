"""The version of this checkout, by the contents of its files: git may be missing, or a file may have been edited."""

import hashlib
import os
from pathlib import Path

from invoke import Exit

ROOT = Path(__file__).resolve().parent.parent
# The files that decide what a node runs: code, templates, profiles, scripts and the image. Documents and tests do not.
DECIDING = (".py", ".j2", ".env", ".json", ".sh", "Dockerfile")
# Folders that decide nothing. A name with a dot is a folder that git or pip keeps.
PASSED_OVER = {"__pycache__", "build", "docs", "tests", "venv"}


def repository_digest() -> str:
    """Return the sha256 over the names and contents of the files that decide what a node runs.

    The sha256 is the same on every node, wherever the checkout is there.
    """
    files = [ROOT / "tasks.py", ROOT / "requirements.lock"]
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if name not in PASSED_OVER and "." not in name]
        if Path(folder) != ROOT:  # beside tasks.py an operator keeps files of this site
            files += [Path(folder, name) for name in names if name.endswith(DECIDING) and not name.startswith(".")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def check_repository(expected: str | None) -> None:
    """Raise Exit unless this checkout has the expected digest, which is the head's. None: nothing was expected."""
    if expected is not None and (own := repository_digest()) != expected:
        raise Exit(
            f"The repository here ({ROOT}) is another version than the head's: its sha256 is {own[:12]}, "
            f"the head has {expected[:12]}. On both nodes type: git status; git pull"
        )
