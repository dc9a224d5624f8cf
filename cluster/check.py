"""Everything that is found out before a model is loaded: the nodes, their memory, the image's options, the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.agreement import Node, Unknown, ask_nodes, find_disagreements
from cluster.command import say
from cluster.fabric import ask_fabric, fabric_findings, fabric_summary
from cluster.finding import Finding
from cluster.memory import SPARK, Budget, NodeMemory, budget_rows, in_gib, memory_budgets
from cluster.node import HF_CACHE, mounts
from cluster.options import gated, given_options, known_options
from cluster.server import Served, ask_server
from cluster.settings import ModelSettings

if TYPE_CHECKING:
    from docker.models.containers import Container

# Every rule, in the order in which they report.
RULES = (
    "nodes", "hosts", "gpus", "wrapper", "variables", "token", "image", "versions", "rdma", "memlock", "nic-lists",
    "network", "links", "mtu", "link-count", "memory-unknown", "memory-floor", "memory-low", "memory-context",
    "memory-sequences", "options", "fabric",
)  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """All that was found. `settings` are those to go on with, which IMAGE_GATES=auto may have changed."""

    settings: ModelSettings
    nodes: Sequence[Node]
    budgets: Sequence[Budget]
    findings: Sequence[Finding]
    said: Sequence[str] = ()


def inspect(settings: ModelSettings, head: Container) -> Inspection:
    """Ask the image and every node, and compute the memory; raises Exit if the image or Ray could not be asked."""
    known = known_options(head, settings)
    settings, said, lacking = gated(settings, head, known)
    nodes = ask_nodes(head, settings.forward)
    differing = find_disagreements(nodes, settings)
    if (server := ask_server(head)) and server.alive:
        return Inspection(settings, nodes, (), [*differing, *lacking], [*said, _occupied(server, nodes)])
    memory = [_memory(node) for node in nodes]
    budgets, short = memory_budgets(settings, memory, known.vllm, Path(mounts(settings)[HF_CACHE]))
    return Inspection(settings, nodes, budgets, [*differing, *short, *lacking], said)


def foresee(settings: ModelSettings) -> Inspection:
    """The memory of a Spark as the article had two, computed without asking a node."""
    budgets, unfit = memory_budgets(settings, [SPARK], "0.21.0", None)  # the vLLM of NGC's 26.05.post1
    return Inspection(settings, (), budgets, unfit)


def proved(found: Inspection, head: Container) -> Inspection:
    """The same with the result of an all-reduce between the nodes; raises Exit if Ray could not be asked."""
    ranks = ask_fabric(head)
    findings = [*found.findings, *fabric_findings(ranks)]
    return replace(found, findings=findings, said=[*found.said, *fabric_summary(ranks)])


def _memory(node: Node) -> NodeMemory:
    told = node["memory"]
    if isinstance(told, Unknown):
        return NodeMemory(node.address, None, None)
    return NodeMemory(node.address, told["MemTotal"], told["MemAvailable"])


def _occupied(server: Served, nodes: Sequence[Node]) -> str:
    """A sentence in place of the memory rules: judged beside a server that runs, its memory would count twice."""
    share = dict(given_options(server.words)).get("--gpu-memory-utilization", ["vLLM's default"])[0]
    left = [f"{one.address} {in_gib(_memory(one).available)} GiB" for one in nodes]
    return (
        f"A server runs: {server.model}, {server.context:,} tokens, GPU_MEM_UTIL {share} on each of "
        f"{server.world_size} nodes. Available beside it: {', '.join(left)}. The memory rules are not judged while it "
        "runs. To judge them: inv stop; then check again."
    )


# --- Telling it -------------------------------------------------------------------------------------------------------


def rule_names(text: str | None) -> list[str]:
    """The rules that `--allow` names, comma separated; raises Exit for a name that no rule has."""
    names = [name for name in (text or "").split(",") if name]
    if strangers := sorted(set(names) - set(RULES)):
        raise Exit(f"--allow names {', '.join(strangers)}; the rules are {', '.join(RULES)}.")
    return names


def tell_inspection(found: Inspection, allowed: Sequence[str] = ()) -> None:
    """Print each node's memory and every finding; raises Exit if one refuses whose rule is not allowed."""
    say(*found.said, *_table(found))
    refusing = [one for one in found.findings if one.refuses]
    refused = [one for one in refusing if one.rule not in allowed]
    for one in found.findings:
        mark = "REFUSED" if one in refused else "ALLOWED" if one.refuses else "WARNING"
        say(f"{mark} {one.rule}: {one.text}")
    if passed := [one for one in refusing if one not in refused]:
        from rich.console import Console

        text = f"PASSED OVER by --allow: {', '.join(dict.fromkeys(one.rule for one in passed))}"
        Console(stderr=True, highlight=False).print(text, style="bold red", markup=False)
    if refused:
        names = ",".join(dict.fromkeys(one.rule for one in refused))
        raise Exit(f"Refused by {len(refused)} findings; nothing was loaded. Mended is better than --allow {names}")


def foretell(found: Inspection) -> None:
    """Print the memory of an ordinary Spark. Nothing is refused, since no node was asked."""
    say("Memory of each node, computed for a Spark as the article had two:", *_table(found))
    for one in found.findings:
        say(f"{'WOULD BE REFUSED' if one.refuses else 'WARNING'} {one.rule}: {one.text}")


def as_json(found: Inspection) -> str:
    """The nodes with their facts, the memory in bytes and the findings, for a machine."""
    return json.dumps(
        {
            "model": found.settings.model.name,
            "nodes": [{"address": node.address, "hostname": node.hostname, **node.facts} for node in found.nodes],
            "memory": [
                {"node": one.node.name, "reserved": one.reservation, "available": one.node.available, "left": one.left}
                for one in found.budgets
            ],
            "findings": [{"rule": one.rule, "refuses": one.refuses, "text": one.text} for one in found.findings],
        },
        indent=1,
    )


def _table(found: Inspection) -> list[str]:
    """One column of GiB for each node. Not by rich, whose import would add a third to `inv plan`."""
    if not found.budgets:
        return []
    rows = zip(*(budget_rows(budget) for budget in found.budgets), strict=True)
    lines = [f"{'GiB':<52}" + "".join(f"{budget.node.name:>12}" for budget in found.budgets)]
    return lines + [f"{row[0][0]:<52}" + "".join(f"{amount:>12}" for _, amount in row) for row in rows]
