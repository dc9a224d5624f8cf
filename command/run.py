"""The one module that starts processes: it shows a command as text, runs it, or becomes it."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from invoke import Exit

from command.command import Command, say

Child = subprocess.Popen
TooLate = subprocess.TimeoutExpired
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
LOG_BYTES = 64 * 2**20
# A server that does not end by itself is killed after 31 s.
WHOLE_S = 120


def run(command: Command) -> None:
    """Run a command to its end, its output on standard error; raises Exit with its status if it fails."""
    say(command.text)
    _finish(command, _start(command, stdout=sys.stderr.fileno()))


def run_whole(command: Command) -> None:
    """Like `run`, for a short command that must not be cut in two: a signal counts when it has ended, or WHOLE_S."""
    say(command.text)
    with held():
        # In a process group of its own the terminal's Ctrl-C does not reach it.
        _finish(command, _start(command, stdout=sys.stderr.fileno(), process_group=0), WHOLE_S)


@contextmanager
def held() -> Iterator[None]:
    """Hold Ctrl-C, hang-up and SIGTERM until the block has ended; then the first of them counts."""
    got: list[int] = []
    numbers = [one for one in (signal.SIGINT, *ENDINGS) if signal.getsignal(one) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: got.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if got:
            os.kill(os.getpid(), got[0])


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
def following(command: Command) -> Iterator[Child]:
    """Run a command for as long as the block lasts, its output, as text, in `stdout`.

    A hang-up or a SIGTERM ends it, and this process, in order.
    """
    say(command.text)
    ended: list[int] = []
    followed: list[Child] = []

    def end(number: int, _: object) -> None:
        ended.append(number)
        if followed:
            sys.exit(128 + number)

    heard = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, end) for number in heard}
    try:
        with _start(command, stdout=subprocess.PIPE, text=True, errors="replace") as child:
            try:
                followed.append(child)
                if ended:
                    sys.exit(128 + ended[0])
                yield child
            finally:
                child.terminate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def detach(command: Command) -> tuple[Child, int]:
    """Start a command in a session of its own, writing to its log: it outlives this process and its terminal.

    Returns the process, and from which byte of the log on it writes. The log is begun anew when it has more than
    LOG_BYTES, the old one kept. Raises Exit if it cannot be written.
    """
    say(command.text)
    try:
        if command.log.exists() and command.log.stat().st_size > LOG_BYTES:
            command.log.replace(f"{command.log}.1")
        with command.log.open("a") as log:
            begun = log.tell()
            return _start(command, stdout=log, stderr=log, start_new_session=True), begun
    except OSError as error:
        look = "df -h" if error.errno == errno.ENOSPC else "ls -ld"
        raise Exit(f"{command.log} cannot be written: {error.strerror}. Type: {look} {command.log.parent}") from None


def told(command: Command, who: str, seconds: float) -> str:
    """Run a command for at most so many seconds, its standard error shown line by line, who before each; its output.

    Raises Exit with the command's status and its last lines if it fails, or takes longer.
    """
    last: deque[str] = deque(maxlen=12)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with _start(command, process_group=0, **pipes) as child:
        late = threading.Timer(seconds, _kill, (child.pid,))
        late.start()
        for line in child.stderr:
            last.append(line.rstrip())
            say(f"{who} | {last[-1]}")
        out = child.stdout.read()
        child.wait()
        late.cancel()
    if child.returncode == -signal.SIGKILL:
        last.append(f"It took longer than {seconds:.0f} s and was given up.")
    if child.returncode:
        raise Exit("\n".join(last), code=child.returncode if child.returncode > 0 else 128 - child.returncode)
    return out.strip()


def lines(command: Command) -> Iterator[str]:
    """Each line that a command prints, as it comes; its standard input is closed when nobody wants any more."""
    with _start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield from child.stdout


def output(command: Command, seconds: float | None = 20, errors: bool = False) -> str:
    """What a command says on standard output, within so many seconds; with errors, its standard error is shown.

    Raises Exit with its last words if it fails, cannot be started or takes longer.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": None if errors else subprocess.PIPE, "text": True}
    try:
        child = subprocess.Popen(command.words, env=command.environ(), stdin=subprocess.DEVNULL, **pipes)
    except OSError as error:
        raise Exit(_not_started(command, error)) from None
    try:
        out, err = child.communicate(timeout=seconds)
    except BaseException as error:
        child.kill()  # and not waited for: what hangs in the kernel, as a driver's tools do, outlives that
        if isinstance(error, TooLate):
            raise Exit(f"{shlex.join(command.words[:3])} did not answer within {seconds:.0f} s.") from None
        raise
    if child.returncode:
        tail = (err or out).strip().splitlines()[-3:]
        raise Exit(f"{shlex.join(command.words[:3])} failed with status {child.returncode}: {' / '.join(tail)}")
    return out.strip()


def hook(command: Command, seconds: float, without: tuple[str, ...] = ()) -> int:
    """Run an operator's command, its output on standard error, without these variables; its exit status.

    Kills it and all of its process group after so many seconds; a Ctrl-C or SIGTERM counts when it has ended. Raises
    Exit if it cannot be started.
    """
    env = {name: value for name, value in command.environ().items() if name not in without}
    with held():
        return _killed_after(seconds, command, env)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(group, signal.SIGKILL)


def answers(command: Command) -> dict[str, str]:
    """What a command asks first, by the name under which it is exported."""
    return {name: output(Command(lines), None, errors=True) for name, lines in command.asks.items()}


def _environment(command: Command) -> dict[str, str]:
    """What the command takes by name, with the answers of what it asks first."""
    asked = answers(command)
    say(*(f"{name} is {value}" for name, value in asked.items()))
    return command.environ() | asked


def _start(command: Command, **options: object) -> Child:
    try:
        return subprocess.Popen(command.words, env=_environment(command), **{"stdin": subprocess.DEVNULL, **options})
    except OSError as error:
        raise Exit(_not_started(command, error)) from None


def _not_started(command: Command, error: OSError) -> str:
    return f"{command.words[0]} cannot be started: {error.strerror}."


def _finish(command: Command, child: Child, seconds: float | None = None) -> None:
    try:
        status = child.wait(seconds)
    except TooLate:
        child.kill()
        raise Exit(f"{shlex.join(command.words[:3])} did not end within {seconds:.0f} s.") from None
    if status < 0:
        raise Exit(f"{shlex.join(command.words[:3])} was ended by {signal.Signals(-status).name}.", code=128 - status)
    if status:
        raise Exit(f"{shlex.join(command.words[:3])} failed with status {status}.", code=status)


def _killed_after(seconds: float, command: Command, env: dict[str, str]) -> int:
    output = {"stdin": subprocess.DEVNULL, "stdout": sys.stderr.fileno(), "process_group": 0}
    try:
        child = subprocess.Popen(command.words, env=env, **output)
    except OSError as error:
        raise Exit(_not_started(command, error)) from None
    try:
        return child.wait(seconds)
    except TooLate:
        return _killed(child)


def _killed(child: Child) -> int:
    try:
        os.killpg(child.pid, signal.SIGKILL)
        return child.wait(5)
    except (OSError, TooLate) as error:  # another user's, by sudo, or stuck in the kernel
        raise Exit(f"process {child.pid} takes too long, and could not be killed: {error}") from None
