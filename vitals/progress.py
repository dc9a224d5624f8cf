"""A wait that a person can see: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from invoke import Exit

from command.command import say

if TYPE_CHECKING:
    from types import TracebackType

    from rich.status import Status

EVERY_S = 30


class Progress:
    """What is waited for, since when (seconds since 1970, or now), and the seconds that it took last time."""

    def __init__(self, what: str, expected: float | None = None, since: float | None = None) -> None:
        self.what, self.expected = what, expected
        self._said = time.monotonic()
        self.start = self._said - (time.time() - since if since else 0)
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False).status("")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(OSError):  # the terminal may be what was lost
            if self._status:
                self._status.stop()

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.start

    def show(self, where: str, new: bool = False) -> None:
        """Tell where it is; off a terminal when that is new, or nothing was said for EVERY_S seconds."""
        about = f", {self.expected:.0f} s expected" if self.expected else ""
        text = f"{self.what}: {where}, {self.seconds:.0f} s{about}"
        if self._status:
            from rich.text import Text

            with suppress(OSError):
                self._status.update(Text(text))
        elif new or time.monotonic() - self._said >= EVERY_S:
            self._said = time.monotonic()
            say(text)

    def line(self, text: str) -> None:
        """A line of a log on standard output; on a terminal above the line that changes."""
        if self._status and sys.stdout.isatty():
            with suppress(OSError):
                self._status.console.print(text, markup=False, soft_wrap=True)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print(text, flush=True)
        except OSError:
            raise Exit("Nobody reads standard output any more; what it told of runs on. Its log: inv logs") from None
