"""A load, followed until the server has answered a first request: loading is told from stuck, and stuck from ended."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from invoke import Exit

from cluster import guards, server
from cluster.node import CONTAINER
from command import run
from command.command import say
from settings.resolve import Settings
from vitals import api, ready, recorded
from vitals.judge import LOAD
from vitals.phases import Load
from vitals.progress import Progress

PAUSE_S = 0.5
# The first request compiles kernels: it took 49 s on two H100, the next 1.8 s.
WARM_UP_S = 600
# The recorder has to meet every node first.
RECORDER_S = 60


class Log:
    """The server's log as it grows, read in a thread of its own; it is over when the server has ended."""

    def __init__(self, process: run.Child) -> None:
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.last: deque[str] = deque(maxlen=12)
        self.over = False
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def new(self) -> list[str]:
        """The lines that have come since the last look."""
        found = [self.lines.get() for _ in range(self.lines.qsize())]
        self.last.extend(found)
        return found

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.put(line.rstrip())
        self.over = True


def launch(settings: Settings, addresses: Iterable[str], detached: bool) -> None:
    """Start the server and follow its log: Ctrl-C stops it, a lost terminal does not. Raises Exit when it has ended.

    addresses: of the nodes that Ray has. detached: come back at once instead.
    """
    server.prepare(settings)
    try:
        server.begin(settings)
        if not detached:
            follow(settings, addresses, shown=True, stay=True)
    except KeyboardInterrupt:
        say("Ctrl-C: the server is asked to stop.")
        run.run_whole(server.stop())
        raise Exit("The server is stopped; Ray is still up.", code=130) from None
    say("The server is loading. Its log: inv logs --follow; how it is: inv health; to end it: inv stop")


def follow(
    settings: Settings, addresses: Iterable[str], shown: bool = False, stay: bool = False, since: float | None = None
) -> None:
    """Follow the server's log from its start until it is ready; with stay, until it ends.

    shown: every line of the log goes to standard output. since: when it was started, in seconds since 1970, if not now.
    Raises Exit when the server has ended, or, without stay, when its load is stuck.
    """
    with run.following(server.follow()) as process:
        log = Log(process)
        with Progress(settings.model.name, ready.expected(settings, addresses), since) as progress:
            was_ready = _is_up(settings)
            _until_ready(settings, log, progress, shown, stay)
            _warm_up(settings, log, progress, shown)
        if not was_ready:
            ready.record(settings, addresses, progress.seconds)
        how = "It answers" if was_ready else f"Ready after {progress.seconds:.0f} s"
        say(f"{how}: API at {_url(settings, settings['HEAD_NODE_IP'])}/v1, model {settings['SERVED_NAME']}")
        while stay and not _is_over(log):
            _show(log.new(), progress.line if shown else None)
            time.sleep(PAUSE_S)
    if stay:
        raise _ended(log)


def _until_ready(settings: Settings, log: Log, progress: Progress, shown: bool, stay: bool) -> None:
    load, stuck, deaf, begun = Load(), False, False, time.monotonic()
    while not _is_up(settings):
        lines = log.new()
        _show(lines, progress.line if shown else None)
        moved = [load.read(line) for line in lines]
        progress.show(str(load), any(moved))
        if _is_over(log):
            raise _ended(log)
        if not stuck and (stuck := _is_stuck(settings)):
            _say_stuck(settings, load, stay)
        if not deaf and (deaf := time.monotonic() - begun > RECORDER_S and not _is_recorded(settings)):
            say("Warning: the recorder beside the server tells nothing, so nothing guards the memory. Look: inv logs")
        time.sleep(PAUSE_S)


def _is_over(log: Log) -> bool:
    """Whether the server has ended, and not only who showed its log."""
    return (
        log.over and not log.lines.qsize() and not guards.is_serving(guards.running_node("Type: inv up --model NAME"))
    )


def _is_up(settings: Settings) -> bool:
    """Whether the API listens; that it works is proved by a token."""
    return api.ask(f"{_url(settings)}/health", seconds=2).well


def _url(settings: Settings, everywhere: str = "127.0.0.1") -> str:
    return server.url(settings["HOST"], settings["PORT"], everywhere)


def _warm_up(settings: Settings, log: Log, progress: Progress, shown: bool) -> None:
    """One discarded request, in a thread so that the wait stays visible; raises Exit if it is refused."""
    answers: list[api.Answer] = []
    asked = (_url(settings), settings.get("VLLM_API_KEY"), WARM_UP_S)
    asking = threading.Thread(target=lambda: answers.append(api.generate(*asked)), daemon=True)
    asking.start()
    progress.show("first request", new=True)
    while asking.is_alive():
        _show(log.new(), progress.line if shown else None)
        progress.show("first request")
        asking.join(0.2)
        if _is_over(log):
            raise _ended(log)
    if not answers[0].well:
        raise Exit(f"The first request was answered {answers[0].status}: {answers[0].text[:300]}\nType: inv health")


def _is_stuck(settings: Settings) -> bool:
    """Whether nothing has moved for STALL_S; what nobody can tell is not called stuck."""
    seen = recorded.read(settings)
    return seen is not None and seen.fresh and seen.quiet(*LOAD) >= int(settings["STALL_S"])


def _is_recorded(settings: Settings) -> bool:
    seen = recorded.read(settings)
    return seen is not None and seen.fresh


def _say_stuck(settings: Settings, load: Load, stay: bool) -> None:
    look = f"; on each node: docker exec {CONTAINER} ps aux; sudo dmesg | tail. To end it: inv stop" if stay else ""
    text = (
        f"STUCK in {load}: for {settings['STALL_S']} s (STALL_S) no line came in the log, and neither processor nor "
        f"memory moved on any node. Look: inv logs{look}"
    )
    if not stay:
        raise Exit(text)
    say(text)


def _ended(log: Log) -> Exit:
    log.new()
    last = "\n".join(f"  {line}" for line in log.last)
    return Exit(f"The server has ended. The last lines of its log:\n{last}\nAll of it: inv logs")


def _show(lines: Iterable[str], show: Callable[[str], None] | None) -> None:
    for line in lines if show else ():
        show(line)
