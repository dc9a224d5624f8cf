"""The server that was launched last: its line, its start, and whether its processes run.

Functions here raise Exit if the container could not be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.command import run
from cluster.engine import container_environment
from cluster.server import api_url, fed

if TYPE_CHECKING:
    from docker.models.containers import Container

EARLIER = "An earlier version of this repository started the containers. Type: inv down; then: inv up --model NAME"


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
