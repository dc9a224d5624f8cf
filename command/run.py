"""Placeholder: the nine old ways to start a process, by the four of cluster/command.py."""

import os  # noqa: F401 - patched by tests
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

from invoke import Exit

from cluster import command as new
from cluster.command import (  # noqa: F401 - re-exported
    ENDINGS,
    LOG_BYTES,
    Child,
    Command,
    TooLate,
    answers,
    become,
    detach,
    held,
)


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


def told(command: Command, who: str, seconds: float) -> str:
    """Run a command whose standard error is shown after the name of its host."""
    return new.run(command, heard=who, seconds=seconds)


def output(command: Command, seconds: float | None = 20, errors: bool = False) -> str:
    """What a command prints."""
    return new.run(command, capture=True, seconds=seconds)


def hook(command: Command, seconds: float, without: tuple[str, ...] = ()) -> int:
    """Run an operator's command; its exit status."""
    try:
        new.run(replace(command, alias="the hook"), seconds=seconds, whole=True)
    except Exit as error:
        if "could not be killed" in error.message:
            raise Exit("process took too long, and could not be killed") from None
        if "cannot be started" in error.message:
            raise Exit(error.message.replace("the hook", command.words[0])) from None
        return error.code if error.code <= 128 else 128 - error.code
    return 0
