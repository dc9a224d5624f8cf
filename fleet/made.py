"""What one `up` has brought up, and how it is taken down again if the rest fails."""

import fcntl
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from invoke import Exit

from cluster import node
from command import run
from command.command import say
from fleet import down
from settings.resolve import Settings


@dataclass
class Made:
    """What this run has brought up, and so may take down: the head, workers by their host, the server."""

    head: bool = False
    server: bool = False
    workers: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return self.head or self.server or bool(self.workers)

    def has_server(self) -> None:
        """Note that the server is this run's."""
        self.server = True


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """One `up` at a time on this head: what one has started the other would take for its own to take down."""
    file = node.logs(settings) / "up.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as error:
        raise Exit(f"{file} cannot be written: {error.strerror}. Type: ls -ld {file.parent}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Exit("Another inv up runs on this head. Wait for it, or end it where it was typed.") from None
        yield


@contextmanager
def taken_down(settings: Settings, made: Made, keep: bool) -> Iterator[Made]:
    """Take down what was made if the block fails; a terminal that is lost while the server loads is no failure."""
    for number in run.ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores one
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield made
    except BaseException as error:
        lost = made.server and any(_hung_up(one) for one in _chain(error))
        if made and keep:
            say("--keep: what this run has started is left as it is. To take it down: inv down")
        elif made and not lost:
            try:
                _undo(settings, made)
            except Exit as left:
                say(str(left.message))
        if isinstance(error, KeyboardInterrupt):
            raise Exit("Ctrl-C: up has ended.", code=130) from None
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came after: whoever writes to a lost terminal fails, too."""
    while error:
        yield error
        error = error.__context__


def _hung_up(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code == 128 + signal.SIGHUP


def _undo(settings: Settings, made: Made) -> None:
    """Take down what was made, in at most half a minute and down.THERE_S; no signal cuts it short."""
    hear_nothing()
    say("What this run has started is taken down again.")
    if made.server and not made.head:  # with the head's container it goes at once
        down.stopped()
    say(*down.everywhere(settings, sorted(made.workers), settings["HEAD_NODE_IP"], made.head))


def hear_nothing() -> None:
    """Let no signal cut short what follows, to the end of this process."""
    for number in (signal.SIGINT, *run.ENDINGS):
        signal.signal(number, signal.SIG_IGN)
