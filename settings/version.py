"""Which version of this repository a checkout is, by what its files say: git may be missing, or behind an edit."""

import hashlib
from pathlib import Path

from invoke import Exit

from settings.models import ROOT

# What decides what a node runs. Documents, tests and benchmarks do not.
_DECIDES = {".py", ".j2", ".env", ".json", ""}
_ASIDE = {"bench", "docs", "tests"}


def digest() -> str:
    """The sha256 over names and contents of the files that decide what a node runs; the same on every node."""
    files = [file for file in ROOT.glob("*/*") if file.is_file() and _decides(file)]
    files += [ROOT / "tasks.py", ROOT / "requirements.lock"]
    text = hashlib.sha256()
    for file in sorted(files):
        text.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes() + b"\0")
    return text.hexdigest()


def check(expected: str | None) -> None:
    """Raise Exit if this checkout is another version than the one with this digest, the head's."""
    if expected is not None and (own := digest()) != expected:
        raise Exit(
            f"The repository here ({ROOT}) is another version than the head's: sha256 {own[:12]}, the head has "
            f"{expected[:12]}. In both type: git status; git pull"
        )


def _decides(file: Path) -> bool:
    folder = file.parent.name
    return file.suffix in _DECIDES and folder not in _ASIDE and "." not in folder + file.name[0]
