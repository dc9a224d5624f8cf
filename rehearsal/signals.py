"""Ways in which a run is ended from outside."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Handlers = dict[signal.Signals, Callable | int | None]


def as_exceptions() -> Handlers:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does; returns the handlers of before."""
    return {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}


def restore(handlers: Handlers) -> None:
    """Put handlers back."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def ignored() -> Iterator[None]:
    """Finish what is inside, whatever the terminal says; its child processes ignore the same signals."""
    endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in endings}
    try:
        yield
    finally:
        restore(before)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)
