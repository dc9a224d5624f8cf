"""Where a rehearsal lives: a folder of root's, and a process namespace with mounts of its own.

Engines, containers, networks and mounts end with the first process of that namespace, however the process ends.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.settings import load_settings
from rehearsal.shell import ENV, RehearsalError, bound, wait, works

SETTING = "REHEARSAL_DIR"
# A socket's path has at most 107 characters, and containerd adds 51 of its own.
LONGEST = 56
# spark/boot.sh covers these folders, so an engine would not see its own state there.
COVERED = "dev|etc|opt|proc|run"
OURS = ("engines", "run", "log", "base", "base.tar")
# One rehearsal at a time on a machine, whatever REHEARSAL_DIR is.
LOCK = Path("/run/dgx-spark-rehearsal.json")
KEPT = "the stand-in Sparks of an earlier run were kept up. Take them down first: inv rehearse --down"
# The parent of every container's control group. An empty group survives its processes.
CGROUP, CGROUPS = "dgx-spark-rehearsal", Path("/sys/fs/cgroup")
# Networks have their names in /run/netns, which here is the sandbox's own. The first process reaps all others.
_FIRST = "mkdir -p /run/netns && mount -t tmpfs rehearsal /run/netns && echo up && exec docker-init -- sleep infinity"
_KILL = "for name in $(ls /run/netns); do ip netns pids $name; done | xargs --no-run-if-empty kill -KILL"


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that REHEARSAL_DIR names. Raises RehearsalError where engines could not live in that folder."""
    path = Path(load_settings(shell=environ)[SETTING])
    if not re.fullmatch(rf"/(?!({COVERED})/)[\w./-]{{,{LONGEST - 1}}}", str(path)) or ".." in path.parts:
        raise RehearsalError(
            f"{SETTING} is {str(path)!r}; it takes an absolute path of letters, digits and ._/- of at most {LONGEST} "
            "characters, because it becomes part of socket names and mount options. It may not lie below "
            f"/{COVERED.replace('|', ', /')}, which each engine has for itself."
        )
    return path


def foreign(root: Path) -> Path | None:
    """Return something in the folder that no rehearsal made, or None. A rehearsal removes its own without asking."""
    try:
        return next((path for path in sorted(root.iterdir()) if path.name not in OURS), None)
    except NotADirectoryError:
        return root
    except OSError:  # the folder is not there yet, or only root may look: then root asks again
        return None


def state(root: Path, name: str) -> Path:
    """The folder for sockets and settings of one engine or host. It is removed after the run."""
    return root / "run" / name


def log(root: Path, name: str) -> Path:
    """The log of an engine or of a long step. It stays until the next run."""
    return root / "log" / f"{name}.log"


# --- The lock, and what is written in it -----------------------------------------------------------------------------


def claim(root: Path, *, ending: bool = False) -> int:
    """Take the lock for a rehearsal in `root`. It lasts as long as a process has the returned descriptor open.

    Raises RehearsalError while another rehearsal has the lock, unless that one is `ending`.
    """
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if ending else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        owner = _record().get("process")
        running = f"another rehearsal is running on this machine (process {owner})"
        raise RehearsalError(running if owner and Path(f"/proc/{owner}").exists() else KEPT) from None
    LOCK.write_text(json.dumps({"root": str(root), "process": os.getpid()}))
    return descriptor


def note(**known: int | None) -> None:
    """Write down the first process of the rehearsal, or the process that owns it: None once it is kept."""
    LOCK.write_text(json.dumps(_record() | known))


def _record() -> dict:
    return json.loads((LOCK.read_text() if LOCK.exists() else "") or "{}")


# --- The namespaces --------------------------------------------------------------------------------------------------


def begin(lock: int, *, keep: bool) -> subprocess.Popen:
    """Start the first process, which holds the lock. It dies with this process unless `keep`."""
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _FIRST]
    words = unshare if keep else bound(*unshare)
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    started = subprocess.Popen(words, env=ENV, pass_fds=[lock], start_new_session=True, **pipes)
    assert started.stdout
    if (said := started.stdout.readline()) != b"up\n":
        raise RehearsalError(f"no namespaces for a rehearsal here: {said.decode().strip()}")
    note(first=child(started.pid))
    return started


def entered(*words: str | Path, processes: bool = False) -> list[str]:
    """Words that run in the sandbox, with its mounts. With `processes` they end with the sandbox.

    Only a child can enter a process namespace, so a signal to what was started then misses the words themselves.
    """
    into = ["nsenter", "--target", str(_record()["first"]), "--mount", *(["--pid"] if processes else [])]
    return [*into, *map(str, words)]


def child(process: int) -> int:
    """Return the process id of the only child of a process."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text())


def end() -> None:
    """Kill the commands on the hosts and everything in the sandbox, and wait until the kernel has ended them."""
    if first := _record().get("first"):
        works(*entered("sh", "-c", _KILL))
        os.kill(first, signal.SIGKILL)
        wait(lambda: not Path(f"/proc/{first}").exists(), 30)


def sweep(root: Path) -> None:
    """Remove the files and the empty control groups of a rehearsal that has ended."""
    groups = (CGROUPS, "-depth", "-type", "d", "(", "-name", CGROUP, "-o", "-path", f"*/{CGROUP}/*", ")")
    wait(lambda: works("find", *groups, "-exec", "rmdir", "{}", "+"), 10)  # the kernel may still reap a process there
    shutil.rmtree(root / "run", ignore_errors=True)


def take_down() -> bool:
    """End a kept rehearsal, or remove what a killed one left. Returns whether there was any.

    Raises RehearsalError while another process rehearses.
    """
    root = Path(_record().get("root") or folder())
    try:
        lock = claim(root)
    except RehearsalError as error:
        if str(error) != KEPT:
            raise
        end()
        lock = claim(root, ending=True)
    found = (root / "run").exists()
    sweep(root)
    LOCK.write_text("")
    os.close(lock)
    return found
