"""The one module that starts processes: it shows a command as text, runs it, or becomes it."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from invoke import Exit

from command.command import Command, say


def run(command: Command) -> None:
    """Run a command to its end, its output on standard error; raises Exit with its status if it fails."""
    say(command.text)
    _finish(command, _start(command, stdout=sys.stderr.fileno()))


def run_whole(command: Command) -> None:
    """Like `run`, for a short command that must not be cut in two: a Ctrl-C counts when it has ended."""
    say(command.text)
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        # In a process group of its own the terminal's Ctrl-C does not reach it.
        _finish(command, _start(command, stdout=sys.stderr.fileno(), process_group=0))
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def become(command: Command) -> NoReturn:
    """Replace this process by the command: its signals, terminal and exit status are the command's own."""
    say(command.text)
    env = _environment(command)
    # Python ignores SIGPIPE, and what it execs would inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execvpe(command.words[0], command.words, env)
    except OSError as error:
        raise Exit(_not_started(command, error)) from None


@contextmanager
def following(command: Command) -> Iterator[subprocess.Popen]:
    """Run a command for as long as the block lasts; a hang-up or a SIGTERM ends it, and this process, in order."""
    say(command.text)
    ended: list[int] = []
    followed: list[subprocess.Popen] = []

    def end(number: int, _: object) -> None:
        ended.append(number)
        if followed:
            sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    with _start(command) as child:
        try:
            followed.append(child)
            if ended:
                sys.exit(128 + ended[0])
            yield child
        finally:
            child.terminate()


def lines(command: Command) -> Iterator[str]:
    """Each line that a command prints, as it comes; its standard input is closed when nobody wants any more."""
    with _start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield from child.stdout


def output(command: Command, seconds: float | None = 20, errors: bool = False) -> str:
    """What a command says on standard output, within so many seconds; with errors, its standard error is shown.

    Raises Exit with its last words if it fails, cannot be started or takes longer.
    """
    try:
        done = subprocess.run(
            command.words,
            env=command.environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if errors else subprocess.PIPE,
            check=False,
            text=True,
            timeout=seconds,
        )
    except OSError as error:
        raise Exit(_not_started(command, error)) from None
    except subprocess.TimeoutExpired:
        raise Exit(f"{shlex.join(command.words[:3])} did not answer within {seconds:.0f} s.") from None
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise Exit(f"{shlex.join(command.words[:3])} failed with status {done.returncode}: {' / '.join(tail)}")
    return done.stdout.strip()


def _environment(command: Command) -> dict[str, str]:
    """What the command takes by name, with the answers of what it asks first."""
    asked = {name: output(Command(lines), None, errors=True) for name, lines in command.asks.items()}
    say(*(f"{name} is {value}" for name, value in asked.items()))
    return command.environ() | asked


def _start(command: Command, **options: int) -> subprocess.Popen:
    try:
        with open(command.stdin or os.devnull) as read:
            return subprocess.Popen(command.words, env=_environment(command), **{"stdin": read, **options})
    except OSError as error:
        raise Exit(_not_started(command, error)) from None


def _not_started(command: Command, error: OSError) -> str:
    return f"{command.words[0]} cannot be started: {error.strerror}."


def _finish(command: Command, child: subprocess.Popen) -> None:
    status = child.wait()
    if status < 0:
        raise Exit(f"{shlex.join(command.words[:3])} was ended by {signal.Signals(-status).name}.", code=128 - status)
    if status:
        raise Exit(f"{shlex.join(command.words[:3])} failed with status {status}.", code=status)
