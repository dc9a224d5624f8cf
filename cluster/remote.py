"""Another node, over ssh: this repository's own tasks there, and several nodes at once.

A command that fails raises Exit with the node's own last lines.
"""

from __future__ import annotations

import re
import shlex
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from invoke import Exit

from cluster import repository
from cluster.command import ENDINGS, Command, render, run, say, words_of
from cluster.settings import ModelSettings, Settings

# ssh ends with this status if it does not reach the host, or loses the connection.
SSH_FAILED = 255


def workers_needed(settings: ModelSettings) -> list[str]:
    """Return the workers that the model needs beside the head."""
    workers, needed = settings.workers(), settings.world_size() - 1
    if len(workers) < needed:
        name = "WORKER_HOSTS" if "WORKER_HOSTS" in settings else "WORKER_IP"
        raise Exit(
            f"{settings.model.name} needs {needed} workers beside the head (TP_SIZE times PP_SIZE less one). "
            f"{name} ({settings.origin(name)}) names {len(workers)}: {', '.join(workers) or 'none'}. Set it in .env."
        )
    return workers[:needed]


def ssh_command(
    settings: Settings, host: str, words: Sequence[str], *, reads: bool = False, fast: bool = False
) -> Command:
    """Return the command that runs these words on a host.

    reads: they read this command's standard input. fast: the bytes go over the fast link, see SHIP_VIA.
    """
    options = _fast_link(settings, host) if fast else []
    lines = render("ssh.j2", host=host, reads=reads, options=options, remote=shlex.join(words))
    over = f" over {options[0].partition('=')[2]} (SHIP_VIA)" if options else ""
    return Command(lines, f"head, for {host}", alias=f"{host}: `{shlex.join(words)}`{over}")


def _fast_link(settings: Settings, host: str) -> list[str]:
    """Return ssh's options for the address of a worker in SHIP_VIA, with the host key of the worker's own name."""
    if "WORKER_HOSTS" in settings and settings.origin("WORKER_HOSTS").startswith("flag"):
        return []  # --to names the destinations as they are
    names = settings.get("WORKER_HOSTS", settings["WORKER_IP"]).split(",")
    ways = settings.get("SHIP_VIA", settings["WORKER_IP"]).split(",")
    if host not in names or len(ways) != len(names) or (address := ways[names.index(host)]) in ("", host):
        return []
    known = dict(
        line.split(" ", 1) for line in run(Command((("ssh", "-G", host),)), capture=True).splitlines() if " " in line
    )
    name, port = known.get("hostname", host), known.get("port", "22")
    alias = known.get("hostkeyalias") or (name if port == "22" else f"[{name}]:{port}")
    return [f"HostName={address}", f"HostKeyAlias={alias}"]


def over_ssh(settings: Settings, host: str, template: str, values: dict[str, Any], **how: bool) -> Command:
    # ssh starts in the home folder, and a quoted `~` would be the name of a folder.
    folder = settings.get("REPO_DIR", str(repository.ROOT)).rstrip("/")
    inv = re.sub("^~/", "./", f"{folder}/inv")
    if "=" in inv:
        raise Exit(f"{folder} has an equals sign, so `env` would take it for a variable. Move it, or set REPO_DIR.")
    words = words_of(render(template, inv=inv, **values))
    command, task = ssh_command(settings, host, words, **how), shlex.join(["inv", *words[words.index(inv) + 1 :]])
    return replace(command, alias=command.alias.replace(shlex.join(words), task))


def run_there(host: str, command: Command, seconds: float) -> str:
    """Run a command on a worker, show its lines as they come, and return its standard output."""
    try:
        return run(command, heard=host, seconds=seconds)
    except Exit as error:
        hint = ""
        if error.code == SSH_FAILED:
            hint = f"\nThat is the status of ssh itself. Type: ssh -v {host} true; WORKER_HOSTS names the workers."
        # The shell could not start (126) or find (127) `inv`, or an older `inv` does not know a flag.
        elif error.code in (126, 127) or "No idea what" in str(error.message):
            hint = "\nIs this repository there, in the same folder or in REPO_DIR? In it, type: git pull"
        raise Exit(f"{error.message}{hint}", code=error.code) from None


def on_all(hosts: Sequence[str], act: Callable[[str], None], here: Callable[[], None] = lambda: None) -> list[str]:
    """Act on all hosts at once, and here meanwhile. Return the message of each that failed."""

    def attempt(action: Callable[..., None], *host: str) -> str:
        try:
            action(*host)
        except Exit as error:
            return str(error.message)
        return ""

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:  # its end waits for all hosts
        there = pool.map(lambda host: attempt(act, host), hosts)
        try:
            return [text for text in (attempt(here), *there) if text]
        except BaseException:
            ignore_signals()
            say("Waiting for the workers to come back: only then is it known which of them are up.")
            raise


def at_once(hosts: Sequence[str], act: Callable[[str], object]) -> dict[str, str]:
    """Act on all hosts at once. Return the message of each that failed, by host.

    Ctrl-C does not wait for the hosts, so it is for acts that a killed process may leave.
    """
    failed: dict[str, str] = {}

    def attempt(host: str) -> None:
        try:
            act(host)
        except Exception as error:
            failed[host] = f"{host}: {getattr(error, 'message', error)}".replace(f"{host}: {host}: ", f"{host}: ")

    threads = [threading.Thread(target=attempt, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {host: failed[host] for host in hosts if host in failed}


def ignore_signals() -> None:
    for number in (signal.SIGINT, *ENDINGS):
        signal.signal(number, signal.SIG_IGN)
