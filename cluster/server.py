"""The model's server: `vllm serve` in the head's container, where cluster/inside/serve.sh starts, follows and ends it.

The server runs detached, and its log on the host's disk outlives the container. Functions here that run a command raise
Exit if the command fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NoReturn

from invoke import Exit

from cluster.command import Command, Lines, become, held, render, run, say, words_of
from cluster.engine import CONTAINER
from cluster.node import HF_CACHE, INSIDE, log_folder, node_log
from cluster.repository import ROOT
from cluster.settings import SECRETS, ModelSettings, Settings


def api_url(host: str, port: str, everywhere: str = "127.0.0.1") -> str:
    """Return the API's address, such as http://127.0.0.1:8000. everywhere: the host for an API that listens on all."""
    host = everywhere if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


# --- Its commands ----------------------------------------------------------------------------------------------------


def serve_values(settings: Settings) -> dict[str, str]:
    return settings.public() | {"hf_cache": HF_CACHE}


def serve_words(settings: ModelSettings) -> list[str]:
    """The server's command line, from `vllm serve` on."""
    return words_of(render(settings.model.serve, **serve_values(settings)))


def fetch_commands(settings: ModelSettings) -> list[Command]:
    """Fill the Hugging Face cache before the server starts. Most models have no fetch.j2."""
    lines = render(settings.model.fetch, **serve_values(settings)) if settings.model.fetch else ()
    return [_with_secrets(settings, ["HF_TOKEN"], "fetch", lines)] if lines else []


def start_command(settings: ModelSettings, offline: bool = False) -> Command:
    """Start the server, and come back at once.

    offline: vLLM replaces the name of the model by the folder of its snapshot, so no rank asks the hub.
    """
    lines = render(settings.model.serve, **serve_values(settings))
    return _with_secrets(settings, SECRETS, "start", lines, ["HF_HUB_OFFLINE=1"] if offline else [])


def recorder_command(settings: Settings) -> Command:
    """Start the recorder beside the server. The recorder watches every node."""
    api = api_url(settings["HOST"], settings["PORT"])
    return Command(_exec("record", words=[api, settings["MEM_FLOOR_GIB"], settings["DROP_CACHE"] or "0"]), "head")


def follow_command() -> Command:
    """Show the server's log until the server ends."""
    return Command(_exec("follow"), "head")


def stop_command() -> Command:
    """Ask the server to end, wait up to 30 s, then force it."""
    return fed("stop")


def launch_commands(settings: ModelSettings, detached: bool = False) -> list[Command]:
    """All that `launch` runs, in this order."""
    begin = [*fetch_commands(settings), start_command(settings), recorder_command(settings)]
    return begin if detached else [*begin, follow_command()]


def _exec(sub_command: str, words: Sequence[str] = (), variables: Sequence[str] = ()) -> Lines:
    names = {"container": CONTAINER, "script": f"{INSIDE}/serve.sh"}
    return render("server_exec.j2", sub_command=sub_command, words=words, variables=variables, **names)


def _with_secrets(
    settings: Settings, secrets: Sequence[str], sub_command: str, lines: Lines, plain: Sequence[str] = ()
) -> Command:
    """Pass the model's line to serve.sh, and these secrets by name."""
    given = {name: settings[name] for name in secrets if settings.get(name)}
    needs = [name for name in secrets if name in settings["REQUIRED_SECRETS"].split()]
    return Command(_exec(sub_command, variables=[*secrets, *plain]) + lines, "head", needs=needs, secrets=given)


def fed(sub_command: str, container: str | None = CONTAINER) -> Command:
    """Pass serve.sh through standard input, because a container of an earlier version does not have it."""
    lines = render("server_exec.j2", container=container, script="-s", sub_command=sub_command, words=(), variables=())
    return Command(lines, "head", feeds=ROOT / "cluster/inside/serve.sh")


# --- Starting it -----------------------------------------------------------------------------------------------------


def prepare(settings: ModelSettings) -> None:
    """Fetch what the server needs."""
    for command in fetch_commands(settings):
        say(command.text)
        try:
            commit = run(command, capture=True)
        except Exit as error:
            raise Exit(
                f"The reasoning parser could not be fetched: {error.message}\nCheck the network and HF_TOKEN. To start "
                f"without the file (vLLM 0.17.1 and later): {settings.line(REASONING_PARSER='nemotron_v3')}; with no "
                f"parser: {settings.line(ENABLE_REASONING_PARSER='0')}"
            ) from None
        say(f"The reasoning parser is here, from commit {commit.splitlines()[-1] if commit else 'unknown'}.")


def begin(settings: ModelSettings, offline: bool, started: Callable[[], None] = lambda: None) -> None:
    """Start the server and its recorder, and come back at once. started: called once there is a server to stop."""
    with held():  # a signal between the two would leave a server whose memory nobody guards
        run(start_command(settings, offline), whole=True)
        started()
        run(recorder_command(settings), whole=True)


# --- Its log ---------------------------------------------------------------------------------------------------------


def log_command(settings: Settings, of_node: bool, follow: bool) -> Command:
    """Show the last lines of the server's log, or of a detached node's. follow: also lines that come later."""
    file = node_log(settings) if of_node else log_folder(settings) / "serve.log"
    return Command(render("tail.j2", file=file, follow=follow), "this node")


def show_log(command: Command) -> NoReturn:
    """Replace this process by log_command. Raises Exit if there is no log."""
    if not os.path.exists(file := command.words[-1]):
        raise Exit(f"There is no {file}. The server's log is on the head; a node started with --detach has its own.")
    become(command)
