"""All nodes from the head: `inv up` and `inv down`. The workers are asked over ssh, by this repository's own tasks."""

from __future__ import annotations

import fcntl
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from invoke import Exit

from cluster import check, engine, guards, load, node, options, recorder, repository, server
from cluster.command import ENDINGS, Command, handling, render, run, say, words_of
from cluster.node import CONTAINER, Network
from cluster.settings import ModelSettings, Settings

if TYPE_CHECKING:
    from docker.models.containers import Container

# Ray knows a node a moment after the node says that it runs.
JOIN_S = 30
# A container is removed within a second. A host that hangs must not keep the other nodes up.
REMOVE_S = 60
# The exit status of ssh itself: the host was not reached, or the connection broke.
SSH_FAILED = 255


# --- A worker, over ssh ----------------------------------------------------------------------------------------------


def workers_needed(settings: ModelSettings) -> list[str]:
    """Return the workers that the model needs beside the head. Raises Exit if there are fewer."""
    workers, needed = settings.workers(), settings.world_size() - 1
    if len(workers) < needed:
        name = "WORKER_HOSTS" if "WORKER_HOSTS" in settings else "WORKER_IP"
        raise Exit(
            f"{settings.model.name} needs {needed} workers beside the head (TP_SIZE times PP_SIZE less one). "
            f"{name} ({settings.origin(name)}) names {len(workers)}: {', '.join(workers) or 'none'}. Set it in .env."
        )
    return workers[:needed]


def worker_up_command(settings: ModelSettings, host: str) -> Command:
    """Return the command that brings a worker up. The worker gets what the shell and the flags set here; no secrets."""
    handed_on = {name: text for name, text in settings.handed_on().items() if name != "HEAD_NODE_IP"}
    version = repository.repository_digest()
    values = settings.public() | {"model": settings.model.name, "version": version, "handed_on": handed_on}
    return _over_ssh(settings, host, "remote_worker.j2", values)


def worker_down_command(settings: Settings, host: str, head_ip: str) -> Command:
    """Return the command that removes a worker's container, if that container was started for this head."""
    return _over_ssh(settings, host, "remote_down.j2", {"head_ip": head_ip})


def _over_ssh(settings: Settings, host: str, template: str, values: dict[str, Any]) -> Command:
    # ssh starts in the home folder, so `~/` is left out: quoted, it would be the name of a folder.
    folder = PurePosixPath(settings.get("REPO_DIR", str(repository.ROOT)))
    below_home = folder.relative_to("~") if folder.parts[:1] == ("~",) else folder
    inv = "./inv" if below_home == PurePosixPath() else str(below_home / "inv")
    if "=" in inv:
        raise Exit(f"{folder} has an equals sign, so `env` would take it for a variable. Move it, or set REPO_DIR.")
    words = words_of(render(template, inv=inv, **values))
    task = shlex.join(["inv", *words[words.index(inv) + 1 :]])
    lines = render("ssh.j2", host=host, remote=shlex.join(words))
    return Command(lines, f"head, for {host}", alias=f"{host}: `{task}`")


def _run_there(host: str, command: Command, seconds: float) -> str:
    """Run a command on a worker, show its lines as they come, and return its standard output.

    Raises Exit with the node, the task, its last lines, and what to do.
    """
    try:
        return run(command, heard=host, seconds=seconds)
    except Exit as error:
        hint = ""
        if error.code == SSH_FAILED:
            hint = f"\nThat is the status of ssh itself. Type: ssh -v {host} true; WORKER_HOSTS names the workers."
        elif error.code in (126, 127):  # a shell's status for a command that it cannot start, or not find
            hint = "\nIs this repository there? Clone it to the same folder, or set REPO_DIR in .env to its folder."
        elif "No idea what" in str(error.message):  # Invoke about a flag that it does not know
            hint = f"\nThe repository there is another version. On {host}, in it: git pull"
        raise Exit(f"{error.message}{hint}", code=error.code) from None


# --- up --------------------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """Nodes and server that this `inv up` has started, and may take down again."""

    head: bool = False
    workers: set[str] = field(default_factory=set)
    server: bool = False
    hung_up: bool = False  # the terminal was lost


def up_commands(settings: ModelSettings, net: Network) -> list[Command]:
    """Return all commands of `inv up` where nothing is up yet, in order. The workers' commands run at once."""
    workers = [worker_up_command(settings, host) for host in workers_needed(settings)]
    head = node.head_commands(settings, net, detached=True)
    return [*head, *workers, *server.launch_commands(settings, detached=True)]


def bring_up(settings: ModelSettings, net: Network, allowed: Sequence[str], keep: bool, fabric: bool) -> None:
    """Bring up head and workers, check them, launch the model, and wait until its API has answered.

    What is up already is left alone. allowed: rules that do not refuse. fabric: prove the data plane too. Raises Exit
    if a step fails; then what this run has started is taken down again, unless keep.
    """
    guards.required_secrets(settings)
    workers = workers_needed(settings)
    with _only_one(settings), _undone_on_failure(settings, keep) as started:
        _bring_up_nodes(settings, net, workers, started)
        head = guards.the_head(settings)
        running = server.ask_server(head)
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
            server.begin(settings, lambda: setattr(started, "server", True))
        load.follow_load(settings, addresses, since=since)
    say("To see how the cluster is: inv health, inv status; the log: inv logs --follow; to take all down: inv down")


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    """Refuse a second `inv up` on this head: one of them could take down what the other has started."""
    file = node.log_folder(settings) / "up.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a")
    except OSError as error:
        raise Exit(f"{file} cannot be written: {error.strerror}. Type: ls -ld {file.parent}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Exit("Another inv up runs on this head. Wait for it, or end it where it was typed.") from None
        yield


@contextmanager
def _undone_on_failure(settings: Settings, keep: bool) -> Iterator[Started]:
    """Take down what this run has started if the block fails.

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
                _undo(settings, started)
            if isinstance(error, KeyboardInterrupt):
                raise Exit("Ctrl-C: up has ended.", code=130) from None
            raise


def _undo(settings: Settings, started: Started) -> None:
    """Take down what this run has started, in at most half a minute and REMOVE_S. No signal cuts that short."""
    _ignore_signals()
    say("What this run has started is taken down again.")
    if started.server and not started.head:  # with the head's container the server ends at once
        _stop_server()
    say(*_take_nodes_down(settings, sorted(started.workers), settings["HEAD_NODE_IP"], started.head))


def _ignore_signals() -> None:
    for number in (signal.SIGINT, *ENDINGS):
        signal.signal(number, signal.SIG_IGN)


def _bring_up_nodes(settings: ModelSettings, net: Network, workers: Sequence[str], started: Started) -> None:
    """Bring up the head, then all workers at once. Raises Exit with what every worker that failed has said."""
    head = node.head_commands(settings, net, detached=True)
    started.head = node.bring_node_up(head, lambda: guards.before_head(settings, net)) is not None
    with ThreadPoolExecutor(max(1, len(workers))) as pool:  # its end waits for all workers
        try:
            failures = [
                text for text in pool.map(lambda host: _bring_up_worker(settings, host, started), workers) if text
            ]
        except BaseException:
            _ignore_signals()
            say("Waiting for the workers to come back: only then is it known which of them have to be taken down.")
            raise
    if failures:
        raise Exit("\n".join(failures))


def _bring_up_worker(settings: ModelSettings, host: str, started: Started) -> str:
    """Return why the worker could not be brought up, or nothing."""
    command = worker_up_command(settings, host)
    say(command.text)
    # The worker waits until it sees the head, then until Ray runs in it.
    seconds = int(settings["WAIT_HEAD_S"]) + node.START_S + 30
    try:
        output = _run_there(host, command, seconds)
    except Exit as error:
        # The node may come up all the same if only the connection was lost. It is ours, because its head is.
        if started.head and error.code in (SSH_FAILED, 128 + signal.SIGKILL):
            started.workers.add(host)
        return str(error.message)
    if re.search("^started [0-9a-f]{64}$", output, re.MULTILINE):
        started.workers.add(host)
    return ""


def _check_nodes(settings: ModelSettings, head: Container, allowed: Sequence[str], fabric: bool) -> check.Inspection:
    """Run every check, and tell what was found. Raises Exit if a rule refuses. Waits up to JOIN_S for missing nodes."""
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


def _same_server(settings: ModelSettings, head: Container, running: server.Served) -> ModelSettings:
    """Return the settings of the server that runs, and start its recorder again if that has stopped.

    Raises Exit if the server was launched with another line.
    """
    settings, _, _ = options.gated(settings, head, options.known_options(head, settings))
    wanted = server.serve_words(settings)
    if list(running.words) != wanted:
        extra = " ".join(word for word in running.words if word not in wanted) or "nothing"
        missing = " ".join(word for word in wanted if word not in running.words) or "nothing"
        raise Exit(
            f"A server runs already, with another line. Only the running server has: {extra}. Only this `inv up` asks "
            f"for: {missing}. To end that server: inv stop"
        )
    say("The server runs already, with this line: it is left alone.")
    seen = recorder.read_recorded(settings)
    if (seen is None or not seen.fresh) and time.time() - running.since > load.RECORDER_S:
        say("The recorder beside it has stopped: it is started again.")
        run(server.recorder_command(settings), whole=True)
    return settings


# --- down ------------------------------------------------------------------------------------------------------------


def down_commands(settings: Settings) -> list[Command]:
    """Return all commands of `inv down` on the head, in order. All nodes are taken down at once."""
    workers = [worker_down_command(settings, host, settings["HEAD_NODE_IP"]) for host in settings.workers()]
    return [server.stop_command(), *workers, node.removal_command()]


def take_down(settings: Settings) -> None:
    """Stop the server, and remove the containers of the head and of every worker. Raises Exit if a node failed."""
    found = engine.node_container()
    if found is not None:
        guards.is_head(found)
    elif not guards.is_own_address(settings["HEAD_NODE_IP"]):
        raise Exit(
            f"This host is not the head: HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is "
            f"{settings['HEAD_NODE_IP']}. Type it there; for this node alone: inv down --here"
        )
    if found is not None and found.status == "running":
        _stop_server()
    # The shell that brought the nodes up may have set another HEAD_NODE_IP. The workers know the head by that one.
    head_ip = guards.head_of(found) if found is not None else settings["HEAD_NODE_IP"]
    if failures := _take_nodes_down(settings, settings.workers(), head_ip, this_node=True):
        raise Exit(
            "\n".join(failures) + "\nThese nodes may still be up; the others are down. "
            "If this head has no workers, set WORKER_HOSTS= in .env."
        )


def take_down_here(head_ip: str | None = None) -> None:
    """Remove this node's container, unless it was started for another head than head_ip."""
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
        if guards.is_serving(guards.running_node("")):
            run(server.stop_command(), whole=True)
    except Exit as error:
        say(str(error.message))


def _take_nodes_down(settings: Settings, workers: Sequence[str], head_ip: str, this_node: bool) -> list[str]:
    """Take these workers of the head down, and this node if asked, all at once. Returns why each that failed did."""

    def take_worker_down(host: str) -> str:
        try:
            _run_there(host, worker_down_command(settings, host, head_ip), REMOVE_S)
        except Exit as error:
            return str(error.message)
        return ""

    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        told = pool.map(take_worker_down, workers)
        own = ""
        if this_node:
            try:
                take_down_here()
            except Exit as error:
                own = f"This node: {error.message}"
        return [text for text in (*told, own) if text]
