"""Bytes on their way: a bar for each transfer on a terminal, and a line now and then without one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from cluster.command import say

if TYPE_CHECKING:
    from rich.progress import TaskID

# Without a terminal, progress is printed after so many seconds.
EVERY_S = 30
GB = 10**9


class Bars:
    """The progress of transfers by name, in bytes. Threads may advance different transfers at the same time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
        text = TextColumn("{task.description}", markup=False)
        console = Console(stderr=True, markup=False, highlight=False)
        self.progress = Progress(text, *columns, console=console, redirect_stdout=sys.stdout.isatty())
        self.tasks: dict[str, TaskID] = {}
        self.said = time.monotonic()
        self.lock = threading.Lock()

    def show(self, name: str, done: int, total: int | None = None) -> None:
        """Show that so many bytes of a transfer are done. total: of all its bytes, if that is known or has changed."""
        with self.lock:
            task = self.tasks.get(name)
            if task is None:
                task = self.tasks[name] = self.progress.add_task(name, total=total)
            self.progress.update(task, completed=done, total=total)
            if not self.progress.console.is_terminal and time.monotonic() - self.said >= EVERY_S:
                self.said = time.monotonic()
                say(*self.lines())

    def lines(self) -> Iterator[str]:
        """Yield a line for each transfer: bytes, rate, and the time left."""
        for task in self.progress.tasks:
            total = f" of {task.total / GB:.3f}" if task.total else ""
            rate = f", {task.speed / GB:.2f} GB/s" if task.speed else ""
            left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
            yield f"{task.description}: {task.completed / GB:.3f}{total} GB{rate}{left}"


@contextmanager
def transferring() -> Iterator[Bars]:
    """Show bars during the block. Without a terminal, print a last line for each transfer at its end."""
    bars = Bars()
    live = bars.progress if bars.progress.console.is_terminal else nullcontext()
    with live:
        yield bars
    if not bars.progress.console.is_terminal:
        say(*bars.lines())
