"""Short commands, and waiting for a condition. Each error is a sentence that a person can act on."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invoke import Exit

Say = Callable[[str], None]

# The PATH of a user often lacks the sbin folders. The PATH of root lacks them after a plain `su`.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
ENV = {**os.environ, "PATH": PATH}


class RehearsalError(Exit):
    """The rehearsal cannot go on. Invoke prints the text and ends with status 1."""


def bound(*words: str) -> list[str]:
    """Return the words of a command that the kernel kills when the thread that started it ends."""
    return ["setpriv", "--pdeathsig", "KILL", *words]


def run(*words: str | Path, **options) -> str:
    """Run a short command, and return its standard output, stripped. Raises RehearsalError with its last lines."""
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "env": ENV}
    done = subprocess.run([str(word) for word in words], **{**quiet, **options})
    if done.returncode:
        said = tail(done.stderr or done.stdout)
        raise RehearsalError(f"`{shlex.join(map(str, words))}` failed ({done.returncode}): {said}")
    return done.stdout.strip()


def works(*words: str | Path, **options) -> bool:
    try:
        run(*words, **options)
    except RehearsalError:
        return False
    return True


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def wait(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    """Check the condition until it holds or the seconds have passed. Return whether it holds."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(pause)
    return held


def tail(text: str, lines: int = 3) -> str:
    """Return the last lines of a text that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
