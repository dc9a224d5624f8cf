"""Taking a rehearsal down by its record, whoever made it and however it ended."""

import shutil
from pathlib import Path

from rehearsal import cgroup, signals
from rehearsal.engine import Engine
from rehearsal.lock import Lock
from rehearsal.shell import run, wait, works


def take_down() -> bool:
    """End a kept rehearsal, or sweep up after a killed one; tell whether there was any.

    Raises RehearsalError while another process rehearses.
    """
    lock = Lock()
    lock.acquire()
    try:
        record = lock.read()
        clear(record)
        lock.write({})
    finally:
        lock.release()
    return bool(record)


def clear(record: dict) -> None:
    """Remove what a record names: containers, engines, control groups, namespaces with their links, run files."""
    if not record:
        return
    root = Path(record["root"])
    with signals.ignored():
        for name in record["engines"]:
            _empty(Engine(name, root))
        cgroup.end()
        for space in record["spaces"]:
            _remove(space)
        shutil.rmtree(root / "run", ignore_errors=True)


def _empty(engine: Engine) -> None:
    if (engine.state / "docker.sock").exists() and works("docker", "version", env=engine.env):
        engine.empty()


def _remove(space: str) -> None:
    if Path("/run/netns", space).exists():
        wait(lambda: not _killed(space), 10)
        run("ip", "netns", "delete", space)


def _killed(space: str) -> list[str]:
    """Kill what still runs in a namespace of ours; the processes that were there."""
    processes = run("ip", "netns", "pids", space).split()
    for process in processes:
        works("kill", "-KILL", process)
    return processes
