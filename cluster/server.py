"""The model's server: `vllm serve` in the head's container, where cluster/inside/serve.sh starts, follows and ends it.

The server runs detached, and its log on the host's disk outlives the container. Functions here that run a command raise
Exit if the command fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from invoke import Exit

from cluster.command import Command, Lines, become, held, render, run, say, words_of
from cluster.engine import CONTAINER, container_environment
from cluster.node import HF_CACHE, INSIDE, log_folder, node_log
from cluster.repository import ROOT
from cluster.settings import SECRETS, ModelSettings, Settings

if TYPE_CHECKING:
    from docker.models.containers import Container

EARLIER = "An earlier version of this repository started the containers. Type: inv down; then: inv up --model NAME"


def api_url(host: str, port: str, everywhere: str = "127.0.0.1") -> str:
    """Return the API's address, such as http://127.0.0.1:8000. everywhere: the host for an API that listens on all."""
    host = everywhere if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


# --- The server that was launched last -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A server: whether its processes run, its start in seconds since 1970, and its command line."""

    alive: bool
    since: float
    words: Sequence[str]

    @property
    def model(self) -> str:
        """The name that clients ask for."""
        return self._option("--served-model-name", self.words[2])

    @property
    def context(self) -> int:
        """The longest sequence in tokens; 0 if the line leaves it to vLLM."""
        return self._number("--max-model-len", 0)

    @property
    def world_size(self) -> int:
        """The number of ranks, which is the number of nodes."""
        return self._number("--tensor-parallel-size", 1) * self._number("--pipeline-parallel-size", 1)

    @property
    def url(self) -> str:
        """The API's address on the head."""
        return api_url(self._option("--host", "0.0.0.0"), self._option("--port", "8000"))

    def _option(self, name: str, otherwise: str) -> str:
        """Read an option as vLLM does: as `--a-b c`, `--a-b=c` or `--a_b c`. The last one counts."""
        for word, following in reversed([*pairwise((*self.words, ""))]):
            option, equals, value = word.partition("=")
            if option.replace("_", "-") == name:
                return value if equals else following
        return otherwise

    def _number(self, name: str, otherwise: int) -> int:
        value = self._option(name, "")
        return int(value) if value.isdigit() else otherwise


def ask_server(head: Container, seconds: float = 20) -> Served | None:
    """Return the server that was launched last; None if none was, or if `inv stop` has ended it."""
    runs, since, *words = _state(head, seconds) or ("", "0")
    return Served(runs == "0", float(since), tuple(words)) if len(words) > 2 else None


def server_runs(head: Container) -> bool:
    """Whether a process of the server is left, even while `inv stop` ends the server, or if its API server is gone."""
    return _state(head)[:1] in (["0"], ["2"])


def _state(head: Container, limit: float = 20) -> list[str]:
    if (lines := run(fed("state", head.name), capture=True, seconds=limit).splitlines()) and not lines[0].isdecimal():
        raise Exit(f"The state of the server in {head.name} is unreadable: {lines[:2]}. Type: inv logs")
    return lines


def is_earlier(head: Container) -> bool:
    """Whether an earlier version of this repository started this container. It then lacks the mounted scripts.

    `inv stop` and `inv down` work on such a container too. Nothing can be launched in it.
    """
    return "NODE_RAY_REPOSITORY" not in container_environment(head)


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


def start_command(settings: ModelSettings) -> Command:
    """Start the server, and come back at once."""
    return _with_secrets(settings, SECRETS, "start", render(settings.model.serve, **serve_values(settings)))


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


def _exec(sub_command: str, words: Sequence[str] = (), secrets: Sequence[str] = ()) -> Lines:
    names = {"container": CONTAINER, "script": f"{INSIDE}/serve.sh"}
    return render("server_exec.j2", sub_command=sub_command, words=words, secrets=secrets, **names)


def _with_secrets(settings: Settings, secrets: Sequence[str], sub_command: str, lines: Lines) -> Command:
    """Pass the model's line to serve.sh, and these secrets by name."""
    given = {name: settings[name] for name in secrets if settings.get(name)}
    needs = [name for name in secrets if name in settings["REQUIRED_SECRETS"].split()]
    return Command(_exec(sub_command, secrets=secrets) + lines, "head", needs=needs, secrets=given)


def fed(sub_command: str, container: str | None = CONTAINER) -> Command:
    """Pass serve.sh through standard input, because a container of an earlier version does not have it."""
    lines = render("server_exec.j2", container=container, script="-s", sub_command=sub_command, words=(), secrets=())
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


def begin(settings: ModelSettings, started: Callable[[], None] = lambda: None) -> None:
    """Start the server and its recorder, and come back at once. started: called once there is a server to stop."""
    with held():  # a signal between the two would leave a server whose memory nobody guards
        run(start_command(settings), whole=True)
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
