"""Short commands, waits and progress, with errors that a person can act on."""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]

# A user's PATH often lacks the folders for administration, and so does root's after a plain `su`.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])

# The kernel tells a child of no death before the child has asked for it: who has another parent by then ends by itself.
_IF_PARENT_IS = """
while read -r name value; do [ "$name" != PPid: ] || parent=$value; done </proc/self/status
[ "$parent" = "$0" ] && exec "$@"
"""
_ENV = {"env": {**os.environ, "PATH": PATH}}


class RehearsalError(Exception):
    """The rehearsal cannot go on; the text is for a person."""


def bound_to_us(*words: str | Path) -> list[str]:
    """`words` that are killed with this process, whatever kills it, even while they are being started.

    The thread that starts them must live as long as they do.
    """
    return ["setpriv", "--pdeathsig", "KILL", "sh", "-c", _IF_PARENT_IS, str(os.getpid()), *map(str, words)]


def contained(*words: str | Path) -> list[str]:
    """`words` with mounts, processes and a host name of their own, all of which vanish with the first process."""
    unshare = 'exec unshare --mount --pid --uts --fork --kill-child sh -c "$0" "$$" "$@"'
    return ["sh", "-c", unshare, _IF_PARENT_IS, *map(str, words)]


def run(*words: str | Path, **options) -> str:
    """Run a short command and return its standard output, stripped; raise RehearsalError with its last words."""
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run([str(word) for word in words], **{**_ENV, **quiet, **options})
    if done.returncode:
        raise RehearsalError(f"{_line(words)} failed ({done.returncode}): {tail(done.stderr or done.stdout)}")
    return done.stdout.strip()


def works(*words: str | Path, **options) -> bool:
    """Run a short command for its exit status alone."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.run([str(word) for word in words], **{**_ENV, **quiet, **options}).returncode == 0


def which(program: str) -> str:
    """Where a program is; raise RehearsalError if it is nowhere."""
    if not (found := shutil.which(program, path=PATH)):
        raise RehearsalError(f"{program} is missing")
    return found


def logged(log: Path, *words: str | Path, **options) -> None:
    """Run a long command bound to this process, its output in `log`; raise RehearsalError with the log's end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        done = subprocess.run(bound_to_us(*words), **{**_ENV, **quiet, **options})
    if done.returncode:
        raise RehearsalError(f"{_line(words)} failed ({done.returncode}), see {log}:\n{tail(log.read_text(), 15)}")


def wait(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    """Ask until the condition holds or the seconds have passed; tell which."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(pause)
    return held


@contextmanager
def step(say: Say, what: str) -> Iterator[None]:
    """Say what is being made, and then how long it took."""
    say(f"{what} …")
    start = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - start:.0f} s")


def tail(text: str, lines: int = 3) -> str:
    """The last lines of a text that are not empty."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _line(words: tuple[str | Path, ...]) -> str:
    return "`" + shlex.join(str(word) for word in words) + "`"
