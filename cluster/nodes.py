"""The nodes that Ray has, asked in the head's container."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.node import IN_SHELL
from host import engine

if TYPE_CHECKING:
    from docker.models.containers import Container

_SCRIPT = Path(__file__).with_name("ask_ray.py")


@dataclass(frozen=True)
class RayNode:
    """One alive node of the cluster; `gpus` is how many it told Ray it has."""

    address: str
    hostname: str
    gpus: float


def alive(head: Container) -> list[RayNode]:
    """Ray's alive nodes; raises Exit if Ray could not be asked, which is not the same as no nodes."""
    words = ("timeout", "20", "python3", "-c", _SCRIPT.read_text())
    answer = engine.ask(head, "/bin/bash", "-c", IN_SHELL, "bash", *words)
    try:
        return [RayNode(**found) for found in json.loads(answer.splitlines()[-1])]
    except (ValueError, IndexError, TypeError):
        raise Exit(f"Ray's answer in {head.name} is no list of nodes: {answer[-200:]!r}") from None


def gpu_addresses(found: list[RayNode]) -> list[str]:
    """The distinct addresses that have a GPU: two Rays on one machine are one Spark."""
    return sorted({node.address for node in found if node.gpus >= 1})
