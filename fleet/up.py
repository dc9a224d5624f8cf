"""All nodes up from the head, and a model on them: what is done already is left alone, what failed is taken down."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from invoke import Exit

from checks import image, inspection, report
from checks.inspection import Inspection
from cluster import detached, guards, node, server
from cluster.node import Network
from command import run
from command.command import Command, say
from fleet import down, remote
from settings.resolve import Settings
from vitals import load, recorded, served

if TYPE_CHECKING:
    from docker.models.containers import Container

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
# Ray knows a node a moment after the node says that it runs.
JOIN_S = 30


@dataclass
class Made:
    """What this run has brought up, and so may take down: the head, workers by their host, the server."""

    head: bool = False
    server: bool = False
    workers: set[str] = field(default_factory=set)
    children: list[run.Child] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.head or self.server or bool(self.workers)


def commands(settings: Settings, net: Network) -> list[Command]:
    """All that `up` runs where nothing is up yet, in order; the workers' lines all at once."""
    there = [remote.worker(settings, host).command for host in remote.needed(settings)]
    return [*node.head(settings, net, detached=True), *there, *server.commands(settings, detached=True)]


def up(settings: Settings, net: Network, allowed: Sequence[str], keep: bool, fabric: bool) -> None:
    """Bring up head and workers, check them, launch, and wait until the API has answered.

    allowed: rules to pass over; fabric: prove the data plane too. Raises Exit with node, command and last lines of what
    failed; then what this run has started is gone again, unless keep.
    """
    guards.secrets(settings)
    hosts = remote.needed(settings)
    with _taken_down(settings, Made(), keep) as made:
        _nodes(settings, net, hosts, made)
        head = guards.the_head(settings)
        if (running := served.ask(head)) and running.alive:
            settings, addresses, since = _as_it_runs(settings, head, running.words), _seen(settings), running.since
        else:
            found = _checked(settings, head, allowed, fabric)
            settings, addresses, since = found.settings, [one.address for one in found.nodes], None
            server.prepare(settings)
            made.server = True
            server.begin(settings)
        load.follow(settings, addresses, since=since)
    say("How it is: inv health, inv status; its log: inv logs --follow; to take all of it down: inv down")


@contextmanager
def _taken_down(settings: Settings, made: Made, keep: bool) -> Iterator[Made]:
    """Take down what was made if the block fails; a terminal that is lost while the server loads is no failure."""
    for number in ENDINGS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield made
    except BaseException as error:
        lost = made.server and isinstance(error, SystemExit) and error.code == 128 + signal.SIGHUP
        if made and keep:
            say("--keep: what this run has started is left as it is. To take it down: inv down")
        elif made and not lost:
            _undo(settings, made)
        if isinstance(error, KeyboardInterrupt):
            raise Exit("Ctrl-C.", code=130) from None
        raise


def _undo(settings: Settings, made: Made) -> None:
    for number in (signal.SIGINT, *ENDINGS):
        signal.signal(number, signal.SIG_IGN)  # it takes seconds, and nobody cleans up after it
    say("What this run has started is taken down again.")
    try:
        # With its container the server goes at once.
        if made.server and not made.head and guards.is_serving(guards.the_head(settings)):
            run.run_whole(server.stop())
    except Exit as error:
        say(str(error.message))
    say(*down.elsewhere(settings, sorted(made.workers)))
    if made.head:
        down.here()


def _nodes(settings: Settings, net: Network, hosts: Sequence[str], made: Made) -> None:
    """Head and workers at once: a worker waits for its head."""
    *before, container = node.head(settings, net, detached=True)
    if not (there := detached.runs_already(container)):
        guards.before_head(settings, net)
        made.head = True
        for command in before:
            run.run(command)
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        asked = [pool.submit(_worker, settings, host, made) for host in hosts]
        try:
            if not there:
                detached.start(container)
            wait(asked)
        except BaseException:
            # Ended, they come back, and who has got how far is known before anything is taken down.
            for child in made.children:
                child.terminate()
            raise
    _all_up(asked)


def _worker(settings: Settings, host: str, made: Made) -> None:
    wanted = remote.worker(settings, host)
    say(wanted.command.text)
    try:
        if remote.run_there(wanted, made.children.append):
            made.workers.add(host)
    except Exit as error:
        # It may have got further than it could say, but for one that ssh did not reach.
        if made.head and error.code != remote.UNREACHED:
            made.workers.add(host)
        raise


def _all_up(asked: Sequence[Future]) -> None:
    if failed := [str(one.exception().message) for one in asked if isinstance(one.exception(), Exit)]:
        raise Exit("\n".join(failed))
    for one in asked:
        one.result()


def _checked(settings: Settings, head: Container, allowed: Sequence[str], fabric: bool) -> Inspection:
    guards.before_launch(settings)
    deadline = time.monotonic() + JOIN_S
    found = inspection.inspect(settings, head)
    while any(one.rule == "nodes" for one in found.findings) and time.monotonic() < deadline:
        time.sleep(1)
        found = inspection.inspect(settings, head)
    if fabric:
        found = inspection.proved(found, head)
    report.tell(found, allowed)
    return found


def _as_it_runs(settings: Settings, head: Container, words: Sequence[str]) -> Settings:
    """The settings of a server that runs already; raises Exit if it was launched with another line."""
    settings, _, _ = inspection.gated(settings, head, image.known(head, settings))
    wanted = server.words(settings)
    if list(words) != wanted:
        only = " ".join(word for word in words if word not in wanted) or "nothing"
        missing = " ".join(word for word in wanted if word not in words) or "nothing"
        raise Exit(
            f"A server runs already, with another line: it alone has {only}; asked for alone is {missing}. To end it: "
            "inv stop"
        )
    say("The server runs already, with this line: it is left alone.")
    return settings


def _seen(settings: Settings) -> list[str]:
    seen = recorded.read(settings)
    return list(seen.nodes) if seen else [settings["HEAD_NODE_IP"]]
