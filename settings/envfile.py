"""Files of NAME=value lines: `.env` and the profiles, read as they stand, without `${...}` expansion."""

import os
import shlex
from pathlib import Path

from dotenv.parser import parse_stream
from invoke import Exit

ROOT = Path(__file__).resolve().parent.parent


def site(named: str | None) -> Path | None:
    """This site's file: what ENV_FILE in the shell names (empty: none), else `.env` at the root if there is one."""
    file = ROOT / ".env" if named is None else Path(named)
    if named == "" or (named is None and not os.path.lexists(file)):
        return None
    if not os.path.isfile(file):
        if named is None:
            raise Exit(f"{file} is there, but it is no file that can be read.")
        raise Exit(f"ENV_FILE (shell) is {named!r}; it takes a file that exists and can be read, or nothing.")
    return file


def label(file: Path) -> str:
    """How messages call the file: its path below the root, or as it is."""
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def read(file: Path) -> dict[str, str]:
    """The file's values by name, the last one of a name winning; raises Exit for a line that is no NAME=value."""
    try:
        with file.open(encoding="utf-8") as stream:
            bindings = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise Exit(f"{label(file)} cannot be read: {error}") from None
    for binding in bindings:
        if binding.error or (binding.key and (binding.value is None or not binding.key.isprintable())):
            raise Exit(f"{label(file)}, line {binding.original.line}: expected NAME=value.")
    return {binding.key: binding.value or "" for binding in bindings if binding.key}


def readable_by_others(file: Path) -> list[str]:
    """A note with the chmod to type if others than its owner can read the file, else nothing."""
    if file.stat().st_mode & 0o077:
        return [f"{label(file)} holds a secret and others can read it: chmod 600 {shlex.quote(str(file))}"]
    return []
