"""The report before a model is loaded. It covers the nodes, their memory, the image's options and the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.agreement import Node, ask_nodes, find_disagreements, weights_findings, whole_everywhere, worker_line
from cluster.command import say
from cluster.fabric import ask_fabric, fabric_findings, fabric_summary, link_rate
from cluster.finding import Finding
from cluster.memory import SPARK, Budget, NodeMemory, beyond_limit, budget_rows, in_gib, memory_budgets
from cluster.node import HF_CACHE, mounts
from cluster.options import gated, given_options, known_options
from cluster.readings import keep_readings, loads_here
from cluster.recorder import settle
from cluster.served import ask_server
from cluster.settings import ModelSettings

if TYPE_CHECKING:
    from docker.models.containers import Container

# Every rule, in the order of the report.
RULES = (
    "nodes", "hosts", "gpus", "wrapper", "variables", "token", "image", "versions", "rdma", "memlock", "nic-lists",
    "network", "links", "mtu", "link-count", "subnets", "gid", "host-software", "memory-unknown", "memory-floor",
    "memory-low", "memory-context", "memory-sequences", "memory-batched", "page-cache", "weights", "options", "fabric",
)  # fmt: skip

# The memory of a node as it is now: the label in the table, and the field of NodeMemory.
NOW = {"available (MemAvailable)": "available", "free pages (MemFree)": "free", "page cache (Cached)": "cached",
       "swap in use": "swap"}  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """The result of a check. IMAGE_GATES=auto may have changed its `settings`, and the launch uses these."""

    settings: ModelSettings
    nodes: Sequence[Node]
    budgets: Sequence[Budget]
    findings: Sequence[Finding]
    said: Sequence[str] = ()

    @property
    def offline(self) -> bool:
        """Whether the server may start without the hub."""
        return whole_everywhere(self.nodes, self.settings)


def inspect(settings: ModelSettings, head: Container) -> Inspection:
    """Ask the image and every node, and compute the memory. Raises Exit if the image or Ray could not be asked."""
    known = known_options(head, settings)
    settings, said, lacking = gated(settings, head, known)
    server = ask_server(head)
    if not (server and server.alive):
        settle()
    nodes = ask_nodes(head, settings.forward, settings["MODEL_CKPT"], settings["REVISION"])
    found = [*lacking, *find_disagreements(nodes, settings)]
    memory = [node_memory(node) for node in nodes if "unknown" not in node.facts]  # the rule `nodes` refuses that one
    budgets: Sequence[Budget] = ()
    keep_readings(settings)  # of a detached launch, which nobody has followed
    if server and server.alive:
        share = dict(given_options(server.words)).get("--gpu-memory-utilization", ["vLLM's default"])[0]
        left = ", ".join(f"{node.name} {in_gib(node.available)} GiB" for node in memory)
        running = (
            f"A server runs: {server.model}, {server.context:,} tokens, GPU_MEM_UTIL {share} on each of "
            f"{server.world_size} nodes. Still available: {left}. The memory rules were not judged, because they count "
            "a running server twice. To judge them: inv stop; then check again."
        )
        said = [*said, running]
    else:
        cache = Path(mounts(settings)[HF_CACHE])
        budgets, short = memory_budgets(settings, memory, known.vllm, cache, loads_here(settings, head))
        found, said = [*found, *short], [*said, *beyond_limit(settings, cache)]
    size = max((one.weights * settings.world_size() for one in budgets), default=0)
    found += weights_findings(nodes, settings, size)
    return Inspection(settings, nodes, budgets, sorted(found, key=lambda one: RULES.index(one.rule)), said)


def foresee(settings: ModelSettings) -> Inspection:
    """Compute the memory of one of the article's Sparks. No node is asked."""
    budgets, unfit = memory_budgets(settings, [SPARK], "0.21.0", None)  # the vLLM of NGC's 26.05.post1
    return Inspection(settings, (), budgets, unfit, beyond_limit(settings))


def proved(found: Inspection, head: Container) -> Inspection:
    """Add the result of an all-reduce between the nodes. Raises Exit if Ray could not be asked."""
    ranks, links = ask_fabric(head), link_rate(found.nodes)
    findings = [*found.findings, *fabric_findings(ranks, links, worker_line(found.settings, "on the other node"))]
    return replace(found, findings=findings, said=[*found.said, *fabric_summary(ranks, links)])


def node_memory(node: Node) -> NodeMemory:
    """Return the memory of a node, by its facts `memory` and `gpus`."""
    told, gpus = node.facts.get("memory", {}), node["gpus"]
    device = gpus[0]["memory"] if isinstance(gpus, list) and gpus else None
    total, available, free, cached = map(told.get, ("MemTotal", "MemAvailable", "MemFree", "Cached"))
    swap = told["SwapTotal"] - told["SwapFree"] if "SwapFree" in told else None
    return NodeMemory(node.address, total, available, device, free, cached, swap)


# --- The report -------------------------------------------------------------------------------------------------------


def rule_names(text: str | None) -> list[str]:
    """Return the rules in the value of `--allow`. Raises Exit for a name that no rule has."""
    names = [name for name in (text or "").split(",") if name]
    if strangers := sorted(set(names) - set(RULES)):
        raise Exit(f"--allow names {', '.join(strangers)}; the rules are {', '.join(RULES)}.")
    return names


def tell_inspection(found: Inspection, allowed: Sequence[str] = ()) -> None:
    """Print each node's memory and every finding. Raises Exit if one refuses whose rule is not allowed."""
    say(*found.said, *_table(found))
    for one in found.findings:
        mark = "WARNING" if not one.refuses else "ALLOWED" if one.rule in allowed else "REFUSED"
        say(f"{mark} {one.rule}: {one.text}")
    rules = dict.fromkeys(one.rule for one in found.findings if one.refuses)
    if passed := [rule for rule in rules if rule in allowed]:
        from rich.console import Console

        text = f"PASSED OVER by --allow: {', '.join(passed)}"
        Console(stderr=True, highlight=False).print(text, style="bold red", markup=False)
    if refused := [rule for rule in rules if rule not in allowed]:
        raise Exit(
            f"Nothing was loaded. Mend what was refused, or accept the risk: --allow {','.join([*passed, *refused])}"
        )


def foretell(found: Inspection) -> None:
    """Print the memory of one of the article's Sparks. Nothing is refused, because no node was asked."""
    say(*found.said, "Memory of each node, computed for a Spark as the article had two:", *_table(found))
    for one in found.findings:
        say(f"{'WOULD BE REFUSED' if one.refuses else 'WARNING'} {one.rule}: {one.text}")


def as_json(found: Inspection) -> str:
    """Return the nodes with their facts, the memory in bytes and the findings."""
    return json.dumps(
        {
            "model": found.settings.model.name,
            "nodes": [{"address": node.address, "hostname": node.hostname, **node.facts} for node in found.nodes],
            "memory": [
                {"node": one.node.name, "reserved": one.reservation, "left": one.left, "loaded": one.loaded}
                | {name: getattr(one.node, name) for name in NOW.values()}
                for one in found.budgets
            ],
            "findings": [{"rule": one.rule, "refuses": one.refuses, "text": one.text} for one in found.findings],
        },
        indent=1,
    )


def _table(found: Inspection) -> list[str]:
    """Return one column of GiB for each node. Importing rich for this table would add a third to `inv plan`."""
    nodes = [budget.node for budget in found.budgets] or [node_memory(node) for node in found.nodes]
    now = list(NOW.items())[: None if found.nodes else 1]  # a Spark that nobody has asked has MemAvailable alone
    columns = [[("GiB", node.name), *((label, in_gib(getattr(node, name))) for label, name in now)] for node in nodes]
    for column, budget in zip(columns, found.budgets, strict=False):  # beside a running server there are no budgets
        column += budget_rows(budget)
    return [f"{row[0][0]:<52}" + "".join(f"{amount:>12}" for _, amount in row) for row in zip(*columns, strict=True)]
