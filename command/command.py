"""A command line: what it says to a person who reads or pastes it, and what it takes by name."""

import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from invoke import Exit

from command import template
from command.template import Lines


@dataclass(frozen=True)
class Command:
    """One command line and what it takes by name.

    `where` says on which node it runs, `env` what is exported for it, `asks` commands whose output is exported,
    `needs` the secrets that it must have, `secrets` those that are handed on, `log` the file that it writes to where
    it is started in a session of its own, and left.
    """

    lines: Lines
    where: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, Lines] = field(default_factory=dict)
    needs: Sequence[str] = ()
    secrets: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None

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
        words = template.text((("setsid",), *self.lines) if self.log else self.lines)
        ends = [f"</dev/null >>{shlex.quote(str(self.log))} 2>&1 &"] if self.log else []
        return "\n".join([*said, " \\\n  ".join([words, *ends])])

    def environ(self) -> dict[str, str]:
        """This process's environment with what the command takes by name."""
        return {**os.environ, **self.env, **self.secrets}


def say(*lines: str) -> None:
    """Tell the person something: on standard error, which leaves standard output to command lines."""
    with suppress(OSError):  # a terminal that is gone must not keep anybody from cleaning up
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def show(*commands: Command) -> None:
    """Print the commands to standard output, and nothing else."""
    tell("\n\n".join(command.text for command in commands))


def tell(text: str) -> None:
    """Print what was asked for to standard output; a reader that has seen enough (`| head`) ends it.

    Raises Exit if it cannot be written.
    """
    if sys.stdout is None:
        raise Exit("Standard output is closed: there is nowhere to print to.")
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        print(text, flush=True)
    except OSError as error:
        raise Exit(f"Standard output cannot be written: {error.strerror}.") from None
    finally:
        signal.signal(signal.SIGPIPE, before)
