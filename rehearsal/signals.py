"""Ways in which a run is ended from outside."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Handlers = dict[signal.Signals, Callable | int | None]
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def once() -> Handlers:
    """Let Ctrl-C, SIGTERM and SIGHUP unwind the stack, the first of them alone: what cleans up is not ended again.

    One that is ignored (`nohup`) stays so. Returns the handlers of before.
    """
    heard = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _leave) for number in heard}


def restore(handlers: Handlers) -> None:
    """Put handlers back."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def ignored() -> Iterator[None]:
    """Finish what is inside, whatever the terminal says; its child processes ignore the same signals."""
    before = _ignore()
    try:
        yield
    finally:
        restore(before)


def _ignore() -> Handlers:
    return {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}


def _leave(number: int, _: object) -> None:
    _ignore()
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
