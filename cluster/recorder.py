"""The files that the recorder (cluster/inside/recorder.py) writes each second, and `inv memory`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invoke import Exit

from cluster import guards
from cluster.command import WHOLE_S, Command, render, run, say, stream
from cluster.engine import CONTAINER
from cluster.node import IN_SHELL, INSIDE, log_folder
from cluster.server import fed, stop_command
from cluster.settings import Settings

# The recorder writes each second. A node that does not answer makes a look three seconds longer.
FRESH_S = 10
# The things that move while a model is loaded, and while it compiles kernels for the first request. See Recorded.quiet.
LOAD = ("log", "memory", "server_cpu", "cpu", "gpu", "download")
FIRST = ("counters", "cpu", "gpu")
GIB = 2**30


@dataclass(frozen=True)
class Recorded:
    """The recorder's last look at all nodes.

    nodes: by address the facts of each node, or None if it did not answer. The facts are the line of its memory guard
    and what `Gauge.look` in inside/recorder.py adds.
    still: for how many seconds each thing has not moved. silent: for how many seconds a node has not answered.
    floor: the MEM_FLOOR_GIB that the server was launched with. running: how many requests run. answered: whether the
    server has answered a request. alive: whether the server lived at the look.
    """

    nodes: Mapping[str, Mapping | None]
    still: Mapping[str, float]
    silent: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0
    running: float = 0
    answered: bool = False
    alive: bool = False

    @property
    def whole(self) -> bool:
        """Whether every node has answered."""
        return all(self.nodes.values())

    @property
    def ranks(self) -> int:
        return sum(facts["ranks"] for facts in self.nodes.values() if facts)

    @property
    def downloads(self) -> str:
        """The bytes of the model that each node has while vLLM downloads it; nothing if no node downloads."""
        sizes = {address: facts.get("downloaded") for address, facts in self.nodes.items() if facts}
        return ", ".join(f"{address} {size / 10**9:.1f} GB" for address, size in sizes.items() if size)

    @property
    def work(self) -> Sequence[str]:
        """The things that move while requests are answered.

        A rank that waits for another one in a collective keeps its processor and its GPU busy, so these count only
        until the first answer. The API's process unpacks a prompt of a million tokens for a minute before the request
        runs.
        """
        if not self.answered:
            return FIRST
        return ("counters", "compiler") if self.running else ("counters", "compiler", "api_cpu")

    def quiet(self, *things: str) -> float:
        """Return for how many seconds none of these things has moved on any node; 0 if none of them was looked at."""
        return min((seconds for name, seconds in self.still.items() if name.partition(" ")[0] in things), default=0)


def read_recorded(settings: Settings) -> Recorded | None:
    """Return the recorder's last look; None unless that look was taken within the last FRESH_S seconds."""
    told = kept_json(log_folder(settings) / "vitals.json", "at", "nodes", "quiet", "silent")
    # A clock that was set back makes the age negative.
    if told and -1 <= time.time() - told["at"] <= FRESH_S:
        floor = told["floor"] if "floor" in told else float(settings["MEM_FLOOR_GIB"])  # a recorder of before an update
        server = {name: told[name] for name in ("running", "answered", "alive") if name in told}
        return Recorded(told["nodes"], told["quiet"], told["silent"], floor, **server)
    return None


def read_lows(settings: Settings) -> dict[str, int]:
    """Return each node's lowest available memory while the last server ran, in bytes by address."""
    return (kept_json(log_folder(settings) / "vitals.json", "lowest") or {"lowest": {}})["lowest"]


def read_ended(settings: Settings) -> tuple[str, str] | None:
    """Return how the memory guard or the recorder has ended the last server, as a sentence, and what to type then.

    None if neither of them has ended the last server.
    """
    if not (told := kept_json(log_folder(settings) / "ended.json", "why", "by")):
        return None
    then = "sudo dmesg | tail, inv logs; then: inv up --model NAME"
    if told["by"] == "memory guard":
        then = "inv logs, inv memory; then: inv up --model NAME, with a lower GPU_MEM_UTIL"
    return f"The server was {told['why']}.", then


def keep_json(file: Path, value: object) -> None:
    """Write value to file as JSON, whole or not at all, so that a reader never finds half of it. Raises OSError."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1))
    new.replace(file)


def kept_json(file: Path, *names: str, kind: type[dict] | type[list] = dict) -> Any:  # noqa: ANN401 - a file may hold any JSON
    """Return what keep_json wrote; None if the file cannot be read, or has another kind of JSON, or lacks a name."""
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return told if isinstance(told, kind) and all(name in told for name in names) else None


# --- After a server ---------------------------------------------------------------------------------------------------


def stop_server() -> None:
    """End the server, and wait for what it leaves. Raises Exit if no server runs."""
    guards.before_stop()
    run(stop_command())
    settle()


def settle() -> None:
    """Wait until the last server's ranks are gone and its memory is back. After a minute, tell what is left where."""
    run(fed("settle"), heard=CONTAINER, seconds=WHOLE_S)


# --- inv memory ------------------------------------------------------------------------------------------------------


# What `inv memory` shows of a node: the names in the line of its guard, and their words.
MEMORY = {"available": "GiB available", "free": "free", "cached": "in the page cache", "swap": "in swap"}


def memory_command() -> Command:
    """Print what every node's guard has written, a line of JSON every two seconds."""
    return Command(render("memory.j2", container=CONTAINER, in_shell=IN_SHELL, script=f"{INSIDE}/recorder.py"), "head")


def watch_memory(settings: Settings, file: str | None) -> None:
    """Print every node's memory until Ctrl-C. Write the same as CSV to file, if one is named.

    Raises Exit if the file cannot be written, or Ray does not answer any more.
    """
    if lows := read_lows(settings):
        told = ", ".join(f"{address} {left / GIB:.1f} GiB" for address, left in lows.items())
        say(f"Lowest while the last server ran: {told}")
    with open(file or os.devnull, "w", buffering=1) as rows, stream(memory_command()) as lines:
        print("time,node", *(f"{name}_bytes" for name in MEMORY), sep=",", file=rows)
        for line in (line for line in lines if line.startswith('{"')):  # Ray may print lines of its own
            now, served = time.strftime("%H:%M:%S"), read_recorded(settings)
            floor = served.floor if served else float(settings["MEM_FLOOR_GIB"])
            for address, node in sorted(json.loads(line).items()):
                sizes = [node[name] if node else None for name in MEMORY]
                shown = ("unknown" if size is None else f"{size / GIB:.1f}" for size in sizes)
                words = "  ".join(f"{size:>7} {name}" for size, name in zip(shown, MEMORY.values(), strict=True))
                low = "  LOW" if node is None or node["available"] < floor * GIB else ""
                say(f"{now}  {address:<15}  {words}{low}")
                print(now, address, *("" if size is None else size for size in sizes), sep=",", file=rows)
    raise Exit("Ray in the head's container does not answer any more. Type: inv health")
