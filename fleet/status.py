"""One screen for the cluster: its nodes, what runs on them, what it serves, since when."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from checks import nodes
from checks.nodes import Node, Unknown
from cluster import node
from command.command import say, tell
from host import engine
from settings.resolve import Settings
from vitals import health, recorded, served
from vitals.served import Served

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30


def report(settings: Settings, as_json: bool) -> None:
    """Tell what runs, as a table or as JSON; raises Exit where Docker or, on a head, Ray cannot be asked."""
    found = engine.node()
    env = engine.environment(found) if found else {}
    if found is None or found.status != "running" or env.get("VLLM_HOST_IP") != env.get("MASTER_ADDR"):
        told = {"container": found and found.status, "head": env.get("MASTER_ADDR"), "nodes": [], "server": None}
        say(_alone(told, found and engine.age(found)))
    else:
        asked, serving = nodes.ask(found), served.ask(found)
        verdict = health.look(settings).verdict
        told = {
            "container": found.status,
            "head": env.get("MASTER_ADDR"),
            "state": str(verdict.state),
            "server": serving and _server(serving),
            "nodes": _nodes(asked, recorded.lows(settings), serving is not None),
        }
        _show(told, verdict.why)
    if as_json:
        tell(json.dumps(told, indent=1))


def _alone(told: Mapping[str, Any], age: str | None) -> str:
    if told["container"] is None:
        return f"No {node.CONTAINER} runs on this node. Type: inv up --model NAME"
    if told["container"] != "running":
        return f"{node.CONTAINER} is {told['container']}. Type: inv cleanup"
    return f"This node is a worker of {told['head']}, for {age}. On the head type: inv status"


def _server(serving: Served) -> dict[str, Any]:
    return {
        "model": serving.model,
        "checkpoint": serving.words[2],
        "context": serving.context,
        "ranks": serving.world_size,
        "alive": serving.alive,
        "since": serving.since,
    }


def _nodes(asked: Sequence[Node], lows: Mapping[str, int], launched: bool) -> list[dict[str, Any]]:
    """A row for each node that Ray has, and for each that it had when the server was launched."""
    rows = [_node(one, lows) for one in asked]
    lost = lows.keys() - {row["address"] for row in rows} if launched else ()
    nothing = dict.fromkeys(rows[0])
    return rows + [nothing | {"address": at, "alive": False, "lowest": lows[at]} for at in sorted(lost)]


def _node(one: Node, lows: Mapping[str, int]) -> dict[str, Any]:
    """A node's facts; None for what could not be asked."""
    known = {name: _known(one[name]) for name in ("since", "image", "memory", "links", "vllm", "ray")}
    used = [name for name in (one.variable("NCCL_SOCKET_IFNAME") or "").split(",") if name]
    return {
        "address": one.address,
        "alive": True,
        "hostname": one.hostname,
        "since": known["since"],
        "image": known["image"] and known["image"].split()[0],
        "vllm": known["vllm"],
        "ray": known["ray"],
        "available": known["memory"] and known["memory"]["MemAvailable"],
        "lowest": lows.get(one.address),
        "links": {name: known["links"].get(name, {}).get("state", "missing") for name in used}
        if known["links"]
        else None,
    }


def _known(fact: Any) -> Any:  # noqa: ANN401 - facts are JSON of any form
    return None if isinstance(fact, Unknown) else fact


def _show(told: Mapping[str, Any], why: str) -> None:
    serving = told["server"]
    if serving:
        say(
            f"{serving['model']} ({serving['checkpoint']}), {serving['context']:,} tokens, {serving['ranks']} ranks, "
            f"launched {_ago(serving['since'])}"
        )
    versions = sorted({f"vLLM {row['vllm'] or 'unknown'}, Ray {row['ray'] or 'unknown'}" for row in told["nodes"]})
    say(*versions)
    say(f"{told['state']}: {why}")
    # Imported here: it would slow every start of every task.
    from rich.console import Console

    Console(stderr=True, highlight=False).print(_table(told["nodes"]))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("node", "host", "up", "image", "GiB free", "lowest", "links"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        down = [f"{name} {state}" for name, state in (row["links"] or {}).items() if state != "up"]
        links = ", ".join(down) or (f"{len(row['links'])} up" if row["links"] is not None else "unknown")
        image = (row["image"] or "unknown").removeprefix("sha256:")[:12]
        about = (row["address"], row["hostname"] or "unknown", _ago(row["since"]) if row["alive"] else "lost", image)
        table.add_row(*about, _gib(row["available"]), _gib(row["lowest"]), links)
    return table


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f}"


def _ago(since: float | None) -> str:
    """How long ago, for a person."""
    if since is None:
        return "unknown"
    minutes = int(time.time() - since) // 60
    return (
        f"{minutes // 1440} d ago"
        if minutes >= 2880
        else f"{minutes // 60} h ago"
        if minutes >= 120
        else f"{minutes} min ago"
    )
