"""The one module that starts processes: it shows a command as text, runs it, or becomes it."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from invoke import Exit

from command import template
from command.template import Lines


@dataclass(frozen=True)
class Command:
    """One command line and what it takes by name.

    `where` says on which node it runs, `env` what is exported for it, `asks` commands whose output is exported,
    `needs` the secrets that it must have, `secrets` those that are handed on, `stdin` the file that it reads.
    """

    lines: Lines
    where: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, Lines] = field(default_factory=dict)
    needs: Sequence[str] = ()
    secrets: Mapping[str, str] = field(default_factory=dict)
    stdin: Path | None = None

    @property
    def words(self) -> list[str]:
        """The command as execve takes it."""
        return template.words(self.lines)

    @property
    def text(self) -> str:
        """The command as a person pastes it into bash, what it takes by name before it. No secret's value is in it."""
        said = [f"# {self.where}"] if self.where else []
        said += [f"export {name}={shlex.quote(value)}" for name, value in self.env.items()]
        said += [f'export {name}="$({shlex.join(template.words(lines))})"' for name, lines in self.asks.items()]
        # One list with the command: an interactive bash would go on to the next line without the secret.
        said += [f': "${{{name}:?}}" && \\' for name in (*self.asks, *self.needs)]
        read = f" \\\n  < {shlex.quote(str(self.stdin))}" if self.stdin else ""
        return "\n".join([*said, template.text(self.lines) + read])

    def environ(self) -> dict[str, str]:
        """This process's environment with what the command takes by name."""
        return {**os.environ, **self.env, **self.secrets}


def say(*lines: str) -> None:
    """Tell the person something: on standard error, which leaves standard output to command lines."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def show(*commands: Command) -> None:
    """Print the commands to standard output, and nothing else; a reader that has seen enough (`| head`) ends it."""
    if sys.stdout is None:
        raise Exit("Standard output is closed: there is nowhere to print the command lines.")
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        print("\n\n".join(command.text for command in commands), flush=True)
    except OSError as error:
        raise Exit(f"Standard output cannot be written: {error.strerror}.") from None
    finally:
        signal.signal(signal.SIGPIPE, before)


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
