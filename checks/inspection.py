"""All that is found out before a model is loaded, in one report: the nodes, the memory, the image's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checks import fabric, gates, image, nodes, rules
from checks.finding import Finding
from checks.nodes import Node, Unknown
from checks.options import Known
from cluster import node, server
from cluster.memory import SPARK, Budget, NodeMemory, memory_budgets
from host import engine
from settings.resolve import Settings

if TYPE_CHECKING:
    from docker.models.containers import Container

# What `plan` assumes where no image can be asked: the vLLM of NGC's 26.05.post1.
_VLLM = "0.21.0"


@dataclass(frozen=True)
class Inspection:
    """What was found; `settings` are those to go on with, which IMAGE_GATES=auto may have changed."""

    settings: Settings
    nodes: Sequence[Node]
    budgets: Sequence[Budget]
    findings: Sequence[Finding]
    said: Sequence[str] = ()


def inspect(settings: Settings, head: Container) -> Inspection:
    """Ask the image, every node and the arithmetic; raises Exit if the image or Ray could not be asked."""
    known = image.known(head, settings)
    settings, said, found = gated(settings, head, known)
    asked = nodes.ask(head, settings.forward)
    budgets, unfit = memory_budgets(settings, [_memory(one) for one in asked], known.vllm, _cache(settings))
    return Inspection(settings, asked, budgets, [*rules.findings(asked, settings), *unfit, *found], said)


def gated(settings: Settings, head: Container, known: Known) -> tuple[Settings, Sequence[str], Sequence[Finding]]:
    """The settings to go on with where the image lacks options, what to say of it, and what is wrong even then."""
    serving = gates.Serving(
        settings.model, server.values(settings), known, engine.environment(head), launch_line(settings)
    )
    if settings["IMAGE_GATES"] != "auto":
        return settings, (), gates.refusals(serving)
    turned = gates.gates(serving)
    return settings.emptied(turned.overrides, "IMAGE_GATES=auto"), turned.said, turned.findings


def proved(found: Inspection, head: Container) -> Inspection:
    """The same with what an all-reduce between the nodes showed; raises Exit if Ray could not be asked."""
    seen = fabric.ask(head)
    said, unfit = fabric.summary(seen), fabric.findings(seen)
    return replace(found, findings=[*found.findings, *unfit], said=[*found.said, *said])


def foresee(settings: Settings) -> Inspection:
    """The arithmetic for a Spark as the article had two, where nobody is asked."""
    budgets, unfit = memory_budgets(settings, [SPARK], _VLLM, None)
    return Inspection(settings, (), budgets, unfit)


def launch_line(settings: Settings) -> str:
    """What the person types to launch this model."""
    return f"inv launch --model {settings.model.name}"


def _memory(asked: Node) -> NodeMemory:
    told = asked["memory"]
    if isinstance(told, Unknown):
        return NodeMemory(asked.address, None, None)
    return NodeMemory(asked.address, told["MemTotal"], told["MemAvailable"])


def _cache(settings: Settings) -> Path:
    return Path(node.mounts(settings)[node.HF_CACHE])
