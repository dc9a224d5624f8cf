"""All nodes up from the head, and a model on them: what is done already is left alone, what failed is taken down."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from invoke import Exit

from checks import image, inspection, report
from checks.inspection import Inspection
from cluster import detached, guards, node, server
from cluster.node import Network
from command import run
from command.command import Command, say
from fleet import down, remote
from fleet.made import Made, alone, hear_nothing, taken_down
from settings.resolve import Settings
from vitals import load, recorded, served
from vitals.served import Served

if TYPE_CHECKING:
    from docker.models.containers import Container

# Ray knows a node a moment after the node says that it runs.
JOIN_S = 30
_ID = re.compile("(started )?[0-9a-f]{64}")


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
    with alone(settings), taken_down(settings, Made(), keep) as made:
        _nodes(settings, net, hosts, made)
        head = guards.the_head(settings)
        if (running := served.ask(head)) and running.alive:
            if fabric:
                raise Exit("A server has the GPUs, so --fabric cannot be proved. Type: inv stop; or leave --fabric out")
            settings, addresses, since = _as_it_runs(settings, head, running), _seen(settings), running.since
        else:
            found = _checked(settings, head, allowed, fabric)
            settings, addresses, since = found.settings, [one.address for one in found.nodes], None
            server.prepare(settings)
            server.begin(settings, made.has_server)
        load.follow(settings, addresses, since=since)
    say("How it is: inv health, inv status; its log: inv logs --follow; to take all of it down: inv down")


def _nodes(settings: Settings, net: Network, hosts: Sequence[str], made: Made) -> None:
    """The head, then all workers at once, over ssh; an end that comes meanwhile waits for them, to know who is up."""
    *before, container = node.head(settings, net, detached=True)
    if not detached.runs_already(container):
        guards.before_head(settings, net)
        for command in before:
            run.run(command)
        detached.start(container)
        made.head = True
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        asked: list[Future] = []
        try:
            for host in hosts:
                asked.append(pool.submit(_worker, settings, host, made))
            wait(asked)
        except BaseException:
            hear_nothing()
            say("Waiting for the workers to come back: only then is it known what has to be taken down.")
            wait(asked)
            raise
    if failed := down.failures(asked):
        raise Exit("\n".join(failed))


def _worker(settings: Settings, host: str, made: Made) -> None:
    wanted = remote.worker(settings, host)
    say(wanted.command.text)
    try:
        # The last line: what a login prints comes before it.
        if _ID.fullmatch(remote.run_there(wanted, _patience(settings)).rpartition("\n")[2]):
            made.workers.add(host)
    except Exit as error:
        # A connection that broke, or was given up, in the middle may have left a node behind.
        if made.head and error.code in (remote.UNREACHED, 128 + signal.SIGKILL):
            made.workers.add(host)
        raise


def _patience(settings: Settings) -> float:
    """Seconds that a worker may take: until it sees the head, then until Ray runs in it, and some to spare."""
    return int(settings["WAIT_HEAD_S"]) + detached.START_S + 30


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


def _as_it_runs(settings: Settings, head: Container, running: Served) -> Settings:
    """The settings of a server that runs already; raises Exit if it was launched with another line."""
    settings, _, _ = inspection.gated(settings, head, image.known(head, settings))
    wanted = server.words(settings)
    if list(running.words) != wanted:
        only = " ".join(word for word in running.words if word not in wanted) or "nothing"
        missing = " ".join(word for word in wanted if word not in running.words) or "nothing"
        raise Exit(
            f"A server runs already, with another line: it alone has {only}; asked for alone is {missing}. To end it: "
            "inv stop"
        )
    say("The server runs already, with this line: it is left alone.")
    seen = recorded.read(settings)
    if (seen is None or not seen.fresh) and time.time() - running.since > load.RECORDER_S:
        say("The recorder beside it has stopped: it is started again.")
        run.run_whole(server.recorder_there())
        run.run_whole(server.recorder(settings))
    return settings


def _seen(settings: Settings) -> list[str]:
    seen = recorded.read(settings)
    return list(seen.nodes) if seen else [settings["HEAD_NODE_IP"]]
