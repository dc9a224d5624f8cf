"""What the head's container serves: the server that was launched there last and that nobody has stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks import line
from cluster import server
from host import engine

if TYPE_CHECKING:
    from docker.models.containers import Container


@dataclass(frozen=True)
class Served:
    """One server: whether its processes live, when it was started in seconds since 1970, and its command line."""

    alive: bool
    since: float
    words: Sequence[str]

    @property
    def model(self) -> str:
        """The name that clients use."""
        return line.value(line.read(self.words), "--served-model-name") or self.words[2]

    @property
    def context(self) -> int:
        """The longest sequence in tokens; 0 if the line leaves it to vLLM."""
        return self._number("--max-model-len", 0)

    @property
    def world_size(self) -> int:
        """How many ranks, and so how many nodes, it has."""
        return self._number("--tensor-parallel-size", 1) * self._number("--pipeline-parallel-size", 1)

    @property
    def url(self) -> str:
        """The API's address on the head's own host."""
        options = line.read(self.words)
        return server.url(line.value(options, "--host") or "0.0.0.0", line.value(options, "--port") or "8000")

    def _number(self, name: str, otherwise: int) -> int:
        told = line.value(line.read(self.words), name)
        return int(told) if told and told.isdigit() else otherwise


def ask(head: Container) -> Served | None:
    """The server in the head's container; None if none was launched, or it was stopped. Raises Exit if unanswered."""
    told = engine.ask(head, "/bin/bash", "-c", server.STATE).splitlines()
    return Served(told[0] == "0", float(told[1]), tuple(told[2:])) if len(told) > 4 else None
