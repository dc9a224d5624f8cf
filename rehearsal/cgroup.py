"""The control group that holds every engine and container of a rehearsal: the kernel's own list of what is ours."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from rehearsal.shell import wait

NAME = "dgx-spark-rehearsal"
ROOT = Path("/sys/fs/cgroup")


def parent(host: str) -> str:
    """What an engine gets as its `cgroup-parent`."""
    return f"/{NAME}/{host}"


def entrance(host: str) -> Path:
    """The file that an engine writes itself into; made if missing. With cgroup v1 one controller's tree is enough."""
    leaf = _home() / NAME / host / "engine"
    leaf.mkdir(parents=True, exist_ok=True)
    return leaf / "cgroup.procs"


def processes(host: str = "") -> set[int]:
    """Process ids of a host, or of all of them; 0 stands for one that we cannot see."""
    files = [file for tree in _ours(host) for file in tree.rglob("cgroup.procs")]
    return {int(word) for file in files for word in _read(file).split()} - {0}


def signal_all(number: signal.Signals, host: str = "", only: str = "") -> None:
    """Send a signal to every process of ours, or to those whose command is called `only`."""
    for process in processes(host):
        if only in ("", _read(Path(f"/proc/{process}/comm")).strip()):
            _signal(process, number)


def end(host: str = "", seconds: float = 15) -> None:
    """Let the engines shut down, kill what is left after `seconds`, and remove the empty groups."""
    signal_all(signal.SIGTERM, host, only="dockerd")
    if not wait(lambda: not processes(host), seconds):
        signal_all(signal.SIGKILL, host)
    wait(lambda: _removed(host), 10)


def _removed(host: str) -> bool:
    signal_all(signal.SIGKILL, host)
    for tree in _ours(host):
        for folder, _, _ in os.walk(tree, topdown=False):
            _remove(folder)
    return not _ours(host)


def _remove(folder: str) -> None:
    with suppress(OSError):  # busy until its last process is reaped: `end` asks again
        os.rmdir(folder)


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has just ended, which is what we want
        os.kill(process, number)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # gone while we looked
        return ""


def _ours(host: str) -> list[Path]:
    return [tree / NAME / host for tree in _trees() if (tree / NAME / host).is_dir()]


def _home() -> Path:
    """The tree that engines enter: the only one of cgroup v2, or v1's `devices`, which Docker cannot do without."""
    trees = _trees()
    return next((tree for tree in trees if tree.name == "devices"), trees[0])


def _trees() -> list[Path]:
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [tree for tree in sorted(ROOT.iterdir()) if (tree / "cgroup.procs").exists() and not tree.is_symlink()]
