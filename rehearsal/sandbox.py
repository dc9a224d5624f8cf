"""The sandbox of a rehearsal: a folder that root owns, and a process namespace with mounts of its own.

Engines, containers, networks and mounts end with the first process of that namespace, even if that process is killed.
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
# The longest folder: a socket's path has at most 107 characters, and containerd adds 51 to the folder.
LONGEST = 56
# spark/boot.sh covers these folders, so an engine would not see its own state there.
COVERED = "dev|etc|opt|proc|run"
OURS = ("engines", "run", "log", "base", "base.tar")
# This lock allows one rehearsal at a time on a machine, for every REHEARSAL_DIR.
LOCK = Path("/run/dgx-spark-rehearsal.json")
KEPT = "the stand-in Sparks of an earlier run were kept up. Take them down first: inv rehearse --down"
# The parent of every container's control group. A control group stays when its processes have ended.
CGROUP, CGROUPS = "dgx-spark-rehearsal", Path("/sys/fs/cgroup")
# /run/netns holds the names of the networks, so the sandbox gets its own. The first process of the sandbox is an init,
# because it has to reap all others.
_FIRST = "mkdir -p /run/netns && mount -t tmpfs rehearsal /run/netns && echo up && exec docker-init -- sleep infinity"
_KILL = "for name in $(ls /run/netns); do ip netns pids $name; done | xargs --no-run-if-empty kill -KILL"


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that REHEARSAL_DIR names. Raises RehearsalError if engines could not run in that folder."""
    path = Path(load_settings(shell=environ)[SETTING])
    if not re.fullmatch(rf"/(?!({COVERED})/)[\w./-]{{,{LONGEST - 1}}}", str(path)) or ".." in path.parts:
        raise RehearsalError(
            f"{SETTING} is {str(path)!r}; it takes an absolute path of letters, digits and ._/- of at most {LONGEST} "
            "characters, because the path becomes part of socket names and mount options. The path may not lie below "
            f"/{COVERED.replace('|', ', /')}, because each engine has folders of its own there."
        )
    return path


def foreign(root: Path) -> Path | None:
    """Return a file in the folder that no rehearsal made, or None. A rehearsal deletes its own files without asking."""
    try:
        return next((path for path in sorted(root.iterdir()) if path.name not in OURS), None)
    except NotADirectoryError:
        return root
    except OSError:  # the folder does not exist yet, or only root may read it; root will ask again
        return None


def state(root: Path, name: str) -> Path:
    """Return the folder for the sockets and settings of one engine or host. The folder is removed after the run."""
    return root / "run" / name


def log(root: Path, name: str) -> Path:
    """Return the log of an engine or of a long step. The log stays until the next run."""
    return root / "log" / f"{name}.log"


# --- The lock, and the record in its file ----------------------------------------------------------------------------


def claim(root: Path, *, ending: bool = False) -> int:
    """Take the lock for a rehearsal in `root`. The lock is held while a process has the returned descriptor open.

    Raises RehearsalError if another rehearsal holds the lock. ending: that rehearsal is ending, so wait for the lock.
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
    """Record `first`, the first process of the sandbox, or `process`, which owns the rehearsal (None: it is kept)."""
    LOCK.write_text(json.dumps(_record() | known))


def _record() -> dict:
    return json.loads((LOCK.read_text() if LOCK.exists() else "") or "{}")


# --- The namespaces --------------------------------------------------------------------------------------------------


def begin(lock: int, *, keep: bool) -> subprocess.Popen:
    """Start the first process of the sandbox, which holds the lock. Without keep it ends with this process."""
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
    """Return the words that run a command in the sandbox, with its mounts.

    processes: the command ends with the sandbox. nsenter then runs the command as a child, which no signal to nsenter
    reaches.
    """
    into = ["nsenter", "--target", str(_record()["first"]), "--mount", *(["--pid"] if processes else [])]
    return [*into, *map(str, words)]


def child(process: int) -> int:
    """Return the process id of the only child of a process."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text())


def end() -> None:
    """Kill the commands on the hosts and all processes in the sandbox. Wait until the kernel has ended them."""
    if first := _record().get("first"):
        works(*entered("sh", "-c", _KILL))
        os.kill(first, signal.SIGKILL)
        wait(lambda: not Path(f"/proc/{first}").exists(), 30)


def sweep(root: Path) -> None:
    """Remove the files and the empty control groups of a rehearsal that has ended."""
    groups = (CGROUPS, "-depth", "-type", "d", "(", "-name", CGROUP, "-o", "-path", f"*/{CGROUP}/*", ")")
    # The kernel may still be ending a process in a group.
    wait(lambda: works("find", *groups, "-exec", "rmdir", "{}", "+"), 10)
    shutil.rmtree(root / "run", ignore_errors=True)


def take_down() -> bool:
    """End a rehearsal that was kept up, or remove the remains of a killed one. Return whether there was one.

    Raises RehearsalError if a rehearsal is running.
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
