"""The nodes of the cluster as the probe saw them, through Ray, in every container."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke import Exit

from cluster.node import IN_SHELL
from host import engine

if TYPE_CHECKING:
    from docker.models.containers import Container

_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True)
class Unknown:
    """A fact that could not be asked, and why."""

    reason: str


@dataclass(frozen=True)
class Node:
    """One alive node: its address and host name by Ray, how many GPUs it told Ray, and the facts of its container."""

    address: str
    hostname: str
    ray_gpus: float
    facts: dict[str, Any]

    def __getitem__(self, fact: str) -> Any:  # noqa: ANN401 - facts are JSON of any form
        """The fact, or Unknown."""
        told = self.facts.get(fact, {"unknown": self.facts.get("unknown", "the probe did not say")})
        return Unknown(told["unknown"]) if isinstance(told, dict) and "unknown" in told else told

    def variable(self, name: str) -> str | None:
        """What the container started with under this name; None if it had none, or nobody could tell."""
        env = self["environment"]
        return None if isinstance(env, Unknown) else env.get(name)


def ask(head: Container, names: tuple[str, ...] = ()) -> list[Node]:
    """Every alive node, the head first, with the variables called names; raises Exit if Ray could not be asked."""
    words = ("timeout", "--kill-after=2", "30", "python3", "-c", _PROBE.read_text(), secrets.token_hex(16), *names)
    answer = engine.ask(head, "/bin/bash", "-c", IN_SHELL, "bash", *words)
    try:
        found = [Node(**told) for told in json.loads(answer.splitlines()[-1])]
    except (ValueError, IndexError, TypeError):
        raise Exit(f"Ray's answer in {head.name} is no list of nodes: {answer[-200:]!r}") from None
    own = engine.environment(head).get("VLLM_HOST_IP")
    return sorted(found, key=lambda node: (node.address != own, node.address))
