"""Placeholder: the nine old ways to start a process, by the four of cluster/command.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from cluster import command as new
from cluster.command import LOG_BYTES, Child, Command, become, held  # noqa: F401 - re-exported


def run(command: Command) -> None:
    """Run a command to its end."""
    new.run(command)


def run_whole(command: Command) -> None:
    """Run a command that no signal cuts short."""
    new.run(command, whole=True)


@contextmanager
def following(command: Command) -> Iterator[SimpleNamespace]:
    """Yield an object whose `stdout` has the lines of the command."""
    with new.stream(command) as lines:
        yield SimpleNamespace(stdout=lines)


def lines(command: Command) -> Iterator[str]:
    """Each line that a command prints."""
    with new.stream(command) as printed:
        yield from printed


def output(command: Command, seconds: float | None = 20) -> str:
    """What a command prints."""
    return new.run(command, capture=True, seconds=seconds)
