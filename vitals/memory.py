"""Memory as it goes: a line for each node, every two seconds, until Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from invoke import Exit

from cluster import node, server
from command import run
from command.command import Command, say
from settings.resolve import Settings
from vitals import recorded

SECONDS = 2
_GIB = 2**30


def commands() -> list[Command]:
    """All that it runs, in order."""
    outer = ("docker", "exec", "-i", node.CONTAINER, "/bin/bash", "-c", node.IN_SHELL, "bash")
    sampling = (*outer, "python3", f"{server.RECORDER}/memory.py", str(SECONDS))
    return [server.recorder_there(), Command((sampling,), "head")]


def watch(settings: Settings, file: str | None) -> None:
    """Print what every node has available, low ones marked, and write it as CSV to file if it is named.

    Raises Exit if the file cannot be written or Ray stops answering.
    """
    warn = float(settings["MEM_WARN_GIB"])
    if lows := recorded.lows(settings):
        told = ", ".join(f"{at} {left / _GIB:.1f} GiB" for at, left in lows.items())
        say(f"Lowest while the last server ran: {told}")
    with _rows(file) as rows:
        for told in _samples():
            now = time.strftime("%H:%M:%S")
            for address, left in sorted(told.items()):
                available = "unknown" if left is None else f"{left / _GIB:.1f}"
                low = left is None or left < warn * _GIB
                say(f"{now}  {address:<15}  {available:>7} GiB available{'  LOW' if low else ''}")
                rows.writerow([now, address, left])


def _samples() -> Iterator[dict[str, int | None]]:
    there, sampling = commands()
    run.run_whole(there)
    for line in run.lines(sampling):
        yield json.loads(line)
    raise Exit("Ray in the head's container does not answer any more. Type: inv health")


@contextmanager
def _rows(file: str | None) -> Iterator[Any]:
    """A CSV writer to the file, which begins with the names of its columns; to nowhere without one."""
    try:
        with open(file or os.devnull, "w", newline="", buffering=1) as opened:
            rows = csv.writer(opened)
            rows.writerow(["time", "node", "available_bytes"])
            yield rows
    except OSError as error:
        raise Exit(f"--csv {file} cannot be written: {error.strerror}.") from None
