"""All nodes from the head: `inv up` and `inv down`. On the workers ssh runs this repository's own tasks.

A step that fails raises Exit.
"""

from __future__ import annotations

import fcntl
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from invoke import Exit

from cluster import check, detached, engine, guards, load, node, options, readings, recorder, repository, served, server
from cluster.agreement import asks_hub
from cluster.command import ENDINGS, Command, handling, run, say
from cluster.doctor import ask_hosts
from cluster.image import image_line
from cluster.node import CONTAINER, Network
from cluster.ports import is_own_address
from cluster.remote import ignore_signals, on_all, over_ssh, run_there, workers_needed
from cluster.settings import ModelSettings, Settings
from cluster.weights import is_whole

if TYPE_CHECKING:
    from docker.models.containers import Container

# Ray knows a node a moment after the node says that it runs.
JOIN_S = 30
# A container is removed within a second. A worker that hangs must not keep `down` waiting.
REMOVE_S = 60


# --- A worker, over ssh ----------------------------------------------------------------------------------------------


def worker_up_command(settings: ModelSettings, host: str) -> Command:
    """Return the command that brings a worker up, with what the shell and the flags set here."""
    version, handed_on = repository.repository_digest(), settings.handed_on()
    values = settings.public() | {"model": settings.model.name, "version": version, "handed_on": handed_on}
    return over_ssh(settings, host, "remote_worker.j2", values)


def worker_down_command(settings: Settings, host: str, head_ip: str) -> Command:
    """Return the command that removes a worker's container, if it was started for this head."""
    return over_ssh(settings, host, "remote_down.j2", {"head_ip": head_ip})


# --- up --------------------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """The nodes and the server that this `inv up` has started."""

    head: bool = False
    workers: set[str] = field(default_factory=set)
    server: bool = False
    hung_up: bool = False  # the terminal was lost


def up_commands(settings: ModelSettings, net: Network) -> list[Command]:
    """Return all commands of `inv up` where nothing is up, in order. The workers' commands run at once."""
    workers = [worker_up_command(settings, host) for host in workers_needed(settings)]
    head = node.head_commands(settings, net, detached=True)
    return [*head, *workers, *server.launch_commands(settings, detached=True)]


def bring_up(settings: ModelSettings, net: Network, allowed: Sequence[str], keep: bool, fabric: bool) -> None:
    """Bring up head and workers, check them, launch the model, and wait until its API has answered.

    What is up already is left alone. If a step fails, what this run has started is taken down again, unless keep.
    allowed: rules that do not refuse. fabric: prove the data plane too.
    """
    guards.required_values(settings)
    workers = workers_needed(settings)
    if engine.node_container() is None:
        _refuse_without_image(settings, workers)
    with _only_one(settings), _undone_on_failure(settings, workers, keep) as started:
        _bring_up_nodes(settings, net, workers, started)
        head = guards.the_head(settings)
        running = served.ask_server(head)
        if running and running.alive:
            if fabric:
                raise Exit("--fabric needs the GPUs, and a server has them. Type: inv stop; or leave --fabric out")
            settings = _same_server(settings, head, running)
            seen = recorder.read_recorded(settings)
            addresses, since = list(seen.nodes) if seen else [settings["HEAD_NODE_IP"]], running.since
        else:
            found = _check_nodes(settings, head, allowed, fabric)
            settings, addresses, since = found.settings, [one.address for one in found.nodes], None
            server.prepare(settings)
            server.begin(settings, found.offline, lambda: setattr(started, "server", True))
            readings.note_load(settings)
        load.follow_load(settings, addresses, since=since)
    say("To see how the cluster is: inv health, inv status; the log: inv logs --follow; to take all down: inv down")


def _refuse_without_image(settings: ModelSettings, workers: Sequence[str]) -> None:
    """Name all that a fresh pair lacks at once, in order, with estimates of the time. Later checks name the rest."""
    hosts = ask_hosts(settings, "image", "weights", "token", workers=workers)
    if not (without := [one.name for one in hosts if one.facts.get("image", "unknown") is None]):
        return
    steps = [(settings.line("doctor"), "seconds; shows all that these hosts lack")]
    here = hosts[0].name in without
    image = image_line(settings, has=False) if here else settings.line("ship-image")
    then = " --ship" if image == "inv build-image" else f"; then {settings.line('ship-image')}" * ("ship" not in image)
    builds = "some 10 minutes at 1 Gbit/s, most of them for NVIDIA's image of 10 GB"
    steps.append((f"{image}{then}", builds if here else "minutes; seconds for a host that has the base"))
    caches = [one.facts.get("weights") or {} for one in hosts]
    if asks_hub(settings) and not all(is_whole({"missing": [], "wrong": [], "revision": ""} | one) for one in caches):
        minutes = max(one.facts.get("expected", 0) for one in hosts) / 0.125e9 / 60
        takes = f"some {minutes:.0f} minutes at 1 Gbit/s" if minutes else "as long as the download takes"
        steps.append((settings.line("weights"), f"{takes}, then minutes for the fast link"))
    if not all(one.facts.get("token") for one in hosts):
        steps.append(("inv token", "seconds; otherwise everybody who reaches Ray's port can run code"))
    steps.append((settings.line(), "10 to 20 minutes for a first load"))
    listed = "\n".join(f"  {number}. {line}  # {time}" for number, (line, time) in enumerate(steps, 1))
    name = settings["VLLM_IMAGE"]
    raise Exit(f"No image {name} on {', '.join(without)}, so nothing was started. In this order:\n{listed}")


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    """Refuse a second `inv up` on this head: one of them could take down what the other has started."""
    file = node.log_folder(settings) / "up.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Exit("Another inv up runs on this head. Wait for it, or end it where it was typed.") from None
        yield


@contextmanager
def _undone_on_failure(settings: Settings, workers: Sequence[str], keep: bool) -> Iterator[Started]:
    """Take down what this run has started if the block fails. All workers go with a head that this run has started.

    A terminal that is lost while the server loads is no failure: the load goes on, and the next `up` waits for it.
    """
    started = Started()

    def end(number: int, _: object) -> None:
        started.hung_up |= number == signal.SIGHUP
        sys.exit(128 + number)

    with handling(ENDINGS, end):
        try:
            yield started
        except BaseException as error:
            something = started.head or started.workers or started.server
            if something and keep:
                say("--keep: what this run has started stays. To take it down: inv down")
            elif something and not (started.server and started.hung_up):
                ignore_signals()  # half a minute for the server, and REMOVE_S for the nodes
                say("What this run has started is taken down again.")
                if started.server and not started.head:  # with the head's container the server ends at once
                    _stop_server()
                workers = workers if started.head else sorted(started.workers)
                say(*_take_nodes_down(settings, workers, settings["HEAD_NODE_IP"], started.head))
            if isinstance(error, KeyboardInterrupt):
                raise Exit("Ctrl-C: up has ended.", code=130) from None
            raise


def _bring_up_nodes(settings: ModelSettings, net: Network, workers: Sequence[str], started: Started) -> None:
    """Bring up the head, then all workers at once."""
    head = node.head_commands(settings, net, detached=True)
    started.head = detached.bring_node_up(head, lambda: guards.before_head(settings, net)) is not None
    # The worker waits until it sees the head, then until Ray runs in it.
    seconds = int(settings["WAIT_HEAD_S"]) + detached.START_S + 30

    def bring_up_worker(host: str) -> None:
        command = worker_up_command(settings, host)
        say(command.text)
        output = run_there(host, command, seconds)
        if re.search("^started [0-9a-f]{64}$", output, re.MULTILINE):
            started.workers.add(host)

    if failures := on_all(workers, bring_up_worker):
        raise Exit("\n".join(failures))


def _check_nodes(settings: ModelSettings, head: Container, allowed: Sequence[str], fabric: bool) -> check.Inspection:
    """Run every check, and tell what was found. A node may need up to JOIN_S to join."""
    guards.before_launch(settings)
    deadline = time.monotonic() + JOIN_S
    found = check.inspect(settings, head)
    while any(finding.rule == "nodes" for finding in found.findings) and time.monotonic() < deadline:
        time.sleep(1)
        found = check.inspect(settings, head)
    if fabric:
        found = check.proved(found, head)
    check.tell_inspection(found, allowed)
    return found


def _same_server(settings: ModelSettings, head: Container, running: served.Served) -> ModelSettings:
    """Refuse a server with another line. Start its recorder again if that has stopped. Return its settings."""
    settings, _, _ = options.gated(settings, head, options.known_options(head, settings))
    wanted = server.serve_words(settings)
    if list(running.words) != wanted:
        extra = " ".join(word for word in running.words if word not in wanted) or "nothing"
        missing = " ".join(word for word in wanted if word not in running.words) or "nothing"
        raise Exit(
            f"A server runs already, with another line. Only its line has: {extra}. Only this `inv up` asks for: "
            f"{missing}. To end that server: inv stop"
        )
    say("The server runs already, with this line: it is left alone.")
    if recorder.read_recorded(settings) is None and time.time() - running.since > load.RECORDER_S:
        say("The recorder beside it writes nothing: it is started again.")
        run(server.recorder_command(settings), whole=True)
    return settings


# --- down ------------------------------------------------------------------------------------------------------------


def down_commands(settings: Settings) -> list[Command]:
    """Return all commands of `inv down` on the head. All nodes are taken down at once."""
    workers = [worker_down_command(settings, host, settings["HEAD_NODE_IP"]) for host in settings.workers()]
    return [server.stop_command(), *workers, node.removal_command()]


def take_down(settings: Settings) -> None:
    """Stop the server, and remove the containers of the head and of every worker."""
    found, head_ip = engine.node_container(), settings["HEAD_NODE_IP"]
    if found is not None:
        guards.is_head(found)
        head_ip = guards.head_of(found)  # the workers have it from the shell that brought the nodes up
        if found.status == "running":
            _stop_server()
    elif not is_own_address(head_ip):
        raise Exit(
            f"This host is not the head: HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is {head_ip}. Type it there; "
            "for this node alone: inv down --here"
        )
    if failures := _take_nodes_down(settings, settings.workers(), head_ip, this_node=True):
        raise Exit(
            "\n".join(failures) + "\nThese nodes may still be up; the others are down. "
            "If this head has no workers, set WORKER_HOSTS= in .env."
        )


def take_down_here(head_ip: str | None = None) -> None:
    """Remove this node's container, unless head_ip is given and the container has another head."""
    found = engine.node_container()
    if found is None:
        return say(f"No {CONTAINER} is here: nothing was removed.")
    head = guards.head_of(found)
    if head_ip is not None and head != head_ip:
        return say(f"{CONTAINER} is here for another head, {head}: it was left alone.")
    run(node.removal_command(), whole=True)
    say(f"{CONTAINER} was removed ({found.status}, {engine.container_age(found)} old).")


def _stop_server() -> None:
    """Stop the server if one runs. A server that cannot be stopped ends with its container."""
    try:
        if served.server_runs(guards.running_node("")):
            run(server.stop_command(), whole=True)
    except Exit as error:
        say(str(error.message))


def _take_nodes_down(settings: Settings, workers: Sequence[str], head_ip: str, this_node: bool) -> list[str]:
    """Take these workers of the head down, and this node if asked. Return the message of each that failed."""

    def take_worker_down(host: str) -> None:
        run_there(host, worker_down_command(settings, host, head_ip), REMOVE_S)

    return on_all(workers, take_worker_down, take_down_here if this_node else lambda: None)
