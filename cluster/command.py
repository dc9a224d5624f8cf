"""Command lines: written by a template, shown as text to paste, and started in one of five ways.

A template is rendered to lines of words, one flag with its value per line. The same words are printed, tested and run.
A command that cannot be started or that fails raises Exit.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn, TypeAlias

from invoke import Exit
from jinja2 import Environment, FileSystemLoader, StrictUndefined, meta
from jinja2.exceptions import TemplateNotFound, TemplateSyntaxError

from cluster.repository import ROOT

SECRETS = ("HF_TOKEN", "VLLM_API_KEY")
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
LOG_BYTES = 64 * 2**20
# `stop` kills a server that has not ended after 31 s. The rest is for a slow Docker Engine.
WHOLE_S = 120

Lines: TypeAlias = tuple[tuple[str, ...], ...]
Child: TypeAlias = subprocess.Popen[str]
TooLate = subprocess.TimeoutExpired


# --- Templates -------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return the text unchanged. Raise ValueError for control and invisible characters, and for undecodable bytes."""
    if not text.isprintable() and any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in text):
        raise ValueError(f"{text!r} has a control character")
    return text


def _quote(value: object) -> str:
    if value is None:
        raise ValueError("a template printed None")
    return shlex.quote(printable(str(value)))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([ROOT / "templates", ROOT]),
        finalize=_quote,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # the optimizer looks for constants, of which there are few, and slows every start
    )
    environment.filters["words"] = shlex.split
    return environment


def render(name: str, **values: object) -> Lines:
    """Render the template called name. Every value is quoted; a name without a value raises jinja2.UndefinedError."""
    text = _templates().get_template(name).render(values)
    return tuple(_split(line) for line in text.split("\n") if line.strip())


def _split(line: str) -> tuple[str, ...]:
    # shlex.split reads character by character, which every start would feel. Most lines hold no quote.
    return tuple(shlex.split(line) if {"'", '"', "\\"} & set(line) else line.split())


@cache
def template_names(name: str) -> frozenset[str]:
    """Return the names in capitals that a template uses, also through a template that it extends or includes."""
    environment = _templates()
    environment.get_template(name)  # finds also an unknown filter
    source, file, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]  # _templates sets it
    for at, kind, text in environment.lex(source):
        if kind == "data" and (found := re.match(r"""([^'"\\]*)['"\\]""", text)):
            raise TemplateSyntaxError("no quote or backslash is needed here", at + found[1].count("\n"), filename=file)
    tree = environment.parse(source)
    used = {word for word in meta.find_undeclared_variables(tree) if word.isupper()}
    for parent in filter(None, meta.find_referenced_templates(tree)):
        try:
            used |= template_names(parent)
        except (TemplateNotFound, RecursionError):
            at = source[: source.find(parent)].count("\n") + 1
            raise TemplateSyntaxError(f"{parent} is missing, or extends itself", at, filename=file) from None
    return frozenset(used)


def words_of(lines: Lines) -> list[str]:
    return [word for line in lines for word in line]


# --- A command -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command line, with its variables and its files."""

    lines: Lines
    where: str = ""  # the node that it runs on, for the person who reads it
    env: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, Lines] = field(default_factory=dict)  # variables whose value is the output of a command
    needs: Sequence[str] = ()  # secrets that must be set
    secrets: Mapping[str, str] = field(default_factory=dict)  # secrets that are handed on
    log: Path | None = None  # the file that a detached command writes to
    feeds: Path | None = None  # the file that is its standard input
    alias: str = ""  # stands for the words in messages: the words of an operator's own command may hold a secret

    @property
    def words(self) -> list[str]:
        return words_of(self.lines)

    @property
    def text(self) -> str:
        """The text that a person pastes into bash: variables, then one flag per line. No secret's value is in it."""
        before = [f"# {self.where}"] if self.where else []
        before += [f"export {name}={shlex.quote(value)}" for name, value in self.env.items()]
        before += [f'export {name}="$({shlex.join(words_of(lines))})"' for name, lines in self.asks.items()]
        # Without `&&` an interactive bash would go on with the next line, without the secret.
        before += [f': "${{{name}:?}}" && \\' for name in (*self.asks, *self.needs)]
        lines = [shlex.join(line) for line in self.lines]
        if self.feeds:
            lines.append(f"<{shlex.quote(str(self.feeds))}")
        if self.log:
            lines = ["setsid", *lines, f"</dev/null >>{shlex.quote(str(self.log))} 2>&1 &"]
        return "\n".join([*before, " \\\n  ".join(lines)])


def say(*lines: str) -> None:
    """Print to standard error, because standard output is for command lines. A lost terminal is no error."""
    if sys.stderr is None:  # print(file=None) would print to standard output
        return
    with suppress(OSError):
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def show(*commands: Command) -> None:
    if absent := dict.fromkeys(name for one in commands for name in one.secrets if not os.environ.get(name)):
        say(f"To paste these lines, first export {' and '.join(absent)}: they are set in a file, not in this shell.")
    tell("\n\n".join(command.text for command in commands))


def tell(text: str) -> None:
    """Print a task's result to standard output."""
    # If the reader has ended (`| head`), SIGPIPE ends this process quietly. Elsewhere a closed socket must not end it.
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        print(text, flush=True)
    finally:
        signal.signal(signal.SIGPIPE, before)


# --- Signals ---------------------------------------------------------------------------------------------------------


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle these signals during the block, except those that are ignored, as SIGHUP is under `nohup`."""
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def held() -> Iterator[None]:
    """Hold Ctrl-C, SIGHUP and SIGTERM until the block has ended. Then send the first of them again."""
    got: list[int] = []
    try:
        with handling((signal.SIGINT, *ENDINGS), lambda number, _: got.append(number)):
            yield
    finally:
        if got:
            os.kill(os.getpid(), got[0])


# --- Five ways to start a process ------------------------------------------------------------------------------------


def run(
    command: Command, *, capture: bool = False, seconds: float | None = None, whole: bool = False, heard: str = ""
) -> str:
    """Run a command to its end. Its text and its output go to standard error.

    capture: return its standard output instead, stripped, and show nothing.
    heard: the same, but show each line of its standard error after the name of this host.
    seconds: kill the command and its children after this time.
    whole: hold signals until the command has ended, for at most WHOLE_S if seconds is not given.
    The exit status is the command's, or 128 and its signal. The message has the last lines that were not shown.
    """
    quiet = capture or heard != ""
    if not quiet and not command.alias:
        say(command.text)
    seconds = seconds or (WHOLE_S if whole else None)
    output = subprocess.PIPE if quiet else sys.stderr or subprocess.DEVNULL
    # A process group of its own can be killed as one, and is not reached by the terminal's Ctrl-C.
    own_group = quiet or seconds is not None
    said: deque[str] = deque()
    last: deque[str] = deque(maxlen=12)
    with held() if whole else nullcontext():
        child = _start(command, stdout=output, stderr=output, process_group=0 if own_group else None)
        readers = [_reader(child.stdout, said), _reader(child.stderr, last, heard)] if quiet else []
        try:
            status = child.wait(seconds)
            for reader in readers:
                reader.join(1)  # a process that the command has left behind may hold the pipe open
            how = _how_ended(status)
        except TooLate:
            status, how = -signal.SIGKILL, f"did not end within {seconds:.0f} s and {_kill(child)}"
        except BaseException:
            if own_group:
                _kill(child)
            raise
    if status:
        tail = "".join(f"\n  {line}" for line in last) if heard else " " + " / ".join([*(last or said)][-3:])
        raise _failed(command, status, how, tail.rstrip())
    return "\n".join(said).strip()


def _how_ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"


def _failed(command: Command, status: int, how: str, tail: str) -> Exit:
    name = command.alias or shlex.join(command.words[:3])
    return Exit(f"{name} {how}{f':{tail}' if tail else '.'}", code=status if status > 0 else 128 - status)


def _reader(stream: IO[str] | None, lines: deque[str], host: str = "") -> threading.Thread:
    def read() -> None:
        for line in stream or ():
            lines.append(line.rstrip())
            if host:
                say(f"{host} | {lines[-1]}")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _kill(child: Child) -> str:
    """Kill the child's process group, and return how that went."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(1)
    except (OSError, TooLate):  # sudo has made it another user's, or a driver hangs in the kernel
        return f"could not be killed (process {child.pid})"
    return "was killed"


def become(command: Command) -> NoReturn:
    """Replace this process by the command, which then gets the signals and gives the exit status."""
    say(command.text)
    env = _environment(command)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the command would inherit that
    try:
        os.execvpe(command.words[0], command.words, env)
    except OSError as error:
        raise _not_started(command, error) from None


@contextmanager
def stream(command: Command) -> Iterator[Iterator[str]]:
    """Run a command during the block, and yield its standard output line by line, as it comes.

    At the end of the block the command's input is closed, and it gets SIGTERM. `docker exec` passes no SIGTERM on, so a
    process in a container sees only the end of its input. SIGHUP and SIGTERM end the block, unless they are handled.
    """
    say(command.text)
    unhandled = [number for number in ENDINGS if signal.getsignal(number) is signal.SIG_DFL]
    with (
        handling(unhandled, lambda number, _: sys.exit(128 + number)),
        _start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        try:
            yield (line.rstrip() for line in child.stdout or ())
        finally:
            if child.stdin:
                child.stdin.close()
            child.terminate()


@contextmanager
def pipe(command: Command, *, into: bool = False) -> Iterator[BinaryIO]:
    """Run a command during the block, and yield its standard output as bytes; with into, its standard input.

    The standard input of a command that is read ends with the block. Then the command is waited for. A block that fails
    kills the command.
    Raises Exit with its last lines if the command fails.
    """
    say(command.text)
    last: deque[str] = deque(maxlen=3)
    ends: dict[str, Any] = {} if command.feeds else {"stdin": subprocess.PIPE}
    ends["stdout"] = sys.stderr or subprocess.DEVNULL if into else subprocess.PIPE
    child = _start(command, stderr=subprocess.PIPE, process_group=0, **ends)
    reader = _reader(child.stderr, last)
    end = child.stdin if into else child.stdout
    assert isinstance(end, TextIOWrapper)
    try:
        # A command that has failed says why. The block may also write into another command, whose pipe then breaks.
        with suppress(BrokenPipeError) if into else nullcontext(), end:
            yield end.buffer
            if child.stdin:
                child.stdin.close()
        status = child.wait()
    except BaseException:
        _kill(child)
        raise
    reader.join(1)
    if status:
        raise _failed(command, status, _how_ended(status), " " + " / ".join(last) if last else "")


def detach(command: Command) -> tuple[Child, int]:
    """Start a command in a session of its own, so that it outlives this process and its terminal.

    Its output goes to its log, which is moved aside first if it has more than LOG_BYTES. Returns the process, and the
    size of the log before the process, in bytes.
    """
    say(command.text)
    log = command.log
    assert log is not None
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(f"{log}.1")
    with log.open("a") as file:
        begun = file.tell()
        return _start(command, stdout=file, stderr=file, start_new_session=True), begun


def answers(command: Command) -> dict[str, str]:
    """Return the value of each variable in `asks`."""
    return {name: run(Command(lines), capture=True) for name, lines in command.asks.items()}


def _environment(command: Command) -> dict[str, str]:
    """Return this process's environment without its secrets, with the command's own variables and secrets."""
    asked = answers(command)
    say(*(f"{name} is {value}" for name, value in asked.items()))
    inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return {**inherited, **command.env, **command.secrets, **asked}


def _start(command: Command, **options: Any) -> Child:  # noqa: ANN401 - those of Popen
    env = _environment(command)
    try:
        with open(command.feeds or os.devnull) as given:
            options = {"stdin": given} | options
            return subprocess.Popen(command.words, env=env, text=True, errors="replace", **options)
    except OSError as error:
        raise _not_started(command, error) from None


def _not_started(command: Command, error: OSError) -> Exit:
    return Exit(f"{command.alias or command.words[0]} cannot be started: {error.strerror}.")
