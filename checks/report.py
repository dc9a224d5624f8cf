"""What a person, or a machine, reads of an inspection."""

import json
from collections.abc import Sequence

from invoke import Exit

from checks.finding import Finding
from checks.inspection import Inspection
from cluster import memory
from command.command import say


def tell(found: Inspection, allowed: Sequence[str] = ()) -> None:
    """Print what each node's memory comes to and every finding; raises Exit if one refuses and is not allowed."""
    say(*found.said, *_table(found))
    refused = [one for one in found.findings if one.refuses and one.rule not in allowed]
    passed = [one for one in found.findings if one.refuses and one.rule in allowed]
    for one in found.findings:
        say(f"{_mark(one, allowed)} {one.rule}: {one.text}")
    if passed:
        _red(f"PASSED OVER by --allow: {', '.join(dict.fromkeys(one.rule for one in passed))}")
    if refused:
        names = ",".join(dict.fromkeys(one.rule for one in refused))
        raise Exit(f"Refused by {len(refused)} findings; nothing was loaded. Mended is better than --allow {names}")


def foretell(found: Inspection) -> None:
    """Print what the arithmetic says of an ordinary Spark; it refuses nothing, since nobody was asked."""
    say("Memory of each node, reckoned for a Spark as the article had two:", *_table(found))
    for one in found.findings:
        say(f"{'WARNING' if not one.refuses else 'WOULD BE REFUSED'} {one.rule}: {one.text}")


def as_json(found: Inspection) -> str:
    """The same for a machine: nodes with their facts, memory in bytes, findings."""
    return json.dumps(
        {
            "model": found.settings.model.name if found.settings.model else None,
            "nodes": [{"address": node.address, "hostname": node.hostname, **node.facts} for node in found.nodes],
            "memory": [
                {"node": one.node.name, "reserved": one.reservation, "available": one.node.available, "left": one.left}
                for one in found.budgets
            ],
            "findings": [{"rule": one.rule, "refuses": one.refuses, "text": one.text} for one in found.findings],
        },
        indent=1,
    )


def rule_names(text: str | None) -> list[str]:
    """The rules that `--allow` names; raises Exit for a name that no rule has."""
    names = [name for name in (text or "").split(",") if name]
    if strangers := sorted(set(names) - set(RULES)):
        raise Exit(f"--allow names {', '.join(strangers)}; the rules are {', '.join(RULES)}.")
    return names


# Every rule, in the order in which they report.
RULES = (
    "nodes", "hosts", "gpus", "wrapper", "variables", "token", "image", "versions", "rdma", "memlock", "nic-lists",
    "network", "links", "mtu", "link-count", "memory-unknown", "memory-floor", "memory-low", "memory-context",
    "memory-sequences", "options", "fabric",
)  # fmt: skip


def _table(found: Inspection) -> list[str]:
    """One column of GiB for each node."""
    columns = [memory.budget_rows(budget) for budget in found.budgets]
    if not columns:
        return []
    lines = [f"{'GiB':<52}" + "".join(f"{budget.node.name:>12}" for budget in found.budgets)]
    for row in zip(*columns, strict=True):
        lines.append(f"{row[0][0]:<52}" + "".join(f"{amount:>12}" for _, amount in row))
    return lines


def _mark(one: Finding, allowed: Sequence[str]) -> str:
    return "ALLOWED" if one.rule in allowed and one.refuses else "REFUSED" if one.refuses else "WARNING"


def _red(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="bold red", markup=False)
