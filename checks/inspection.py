"""All that is found out before a model is loaded, in one report: the nodes, the memory, the image's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from checks import demand as demands
from checks import fabric, footprint, gates, image, limits, memory, nodes, options, rules
from checks.fields import CannotKnow
from checks.finding import Finding
from checks.memory import Budget, Host
from checks.nodes import Node, Unknown
from checks.options import Known
from cluster import node, server
from command import template
from host import engine
from settings.models import ROOT
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
    budgets, unfit = reckon(settings, [_memory(one) for one in asked], known.vllm, _cache(settings))
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
    budgets, unfit = reckon(settings, [memory.SPARK], _VLLM, None)
    return Inspection(settings, (), budgets, unfit)


def reckon(
    settings: Settings, hosts: Sequence[Host], vllm: str, cache: Path | None
) -> tuple[list[Budget], list[Finding]]:
    """Each host's memory with the model on it, and what is wrong with it; what cannot be known is refused."""
    model = settings.model
    words = template.words(template.render(model.serve, **server.values(settings)))
    try:
        asked = demands.read(words, options.version(vllm))
        profile = ROOT / model.folder / f"{model.size}.json"
        shape, taken, _ = footprint.load(profile, cache, settings["MODEL_CKPT"])
        budgets = [memory.budget(shape, taken, asked, host) for host in hosts]
    except CannotKnow as error:
        return [], [Finding("memory-unknown", f"What {model.name} takes of memory cannot be reckoned: {error}")]
    floor, warn, most = (float(settings[name]) for name in ("MEM_FLOOR_GIB", "MEM_WARN_GIB", "GPU_MEM_UTIL_MAX"))
    allowed = limits.Limits(warn, floor, most, launch_line(settings))
    return budgets, [found for budget in budgets for found in limits.findings(budget, allowed)]


def launch_line(settings: Settings) -> str:
    """What the person types to launch this model."""
    return f"inv launch --model {settings.model.name}"


def _memory(asked: Node) -> Host:
    told = asked["memory"]
    if isinstance(told, Unknown):
        return Host(asked.address, None, None)
    return Host(asked.address, told["MemTotal"], told["MemAvailable"])


def _cache(settings: Settings) -> Path:
    return Path(node.mounts(settings)[node.HF_CACHE])
