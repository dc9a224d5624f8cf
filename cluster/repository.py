"""The version of this checkout, by the contents of its files: git may be missing, or a file may have been edited."""

import hashlib
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The endings of files that decide what a node runs: code, templates, profiles, scripts and the image.
DECIDING = (".py", ".j2", ".env", ".json", ".sh", "Dockerfile")


def repository_digest(root: Path | None = None) -> str:
    """Return the sha256 over the names and contents of the files that decide what a node runs.

    Tests, documents and an operator's own files do not count: only cluster/, templates/ and the models' folders are
    searched.
    """
    root = root or ROOT
    files = [root / "tasks.py", root / "requirements.lock"]
    for folder in {root / "cluster", root / "templates", *(template.parent for template in root.glob("*/serve.j2"))}:
        files += [file for file in folder.rglob("[!.]*") if file.name.endswith(DECIDING) and file.is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        with suppress(PermissionError):  # of another model's file: the node's own files are read before
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def check_repository(expected: str | None) -> None:
    """Raise Exit if this checkout has another digest than the expected one, which is the head's."""
    from invoke import Exit  # `inv doctor` sends this module to hosts that lack Invoke

    if expected is not None and (own := repository_digest()) != expected:
        raise Exit(
            f"The repository here ({ROOT}) is another version than the head's: its sha256 is {own[:12]}, "
            f"the head has {expected[:12]}. On both nodes type: git status; git pull"
        )
