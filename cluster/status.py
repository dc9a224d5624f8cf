"""One screen about the cluster: its nodes, the model that they serve, and for how long."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.agreement import Node, Unknown, ask_nodes
from cluster.check import node_memory
from cluster.command import say, tell
from cluster.engine import age_in_words, container_age, container_environment, node_container
from cluster.health import look
from cluster.memory import in_gib
from cluster.node import CONTAINER
from cluster.recorder import read_lows
from cluster.served import Served, is_earlier
from cluster.settings import Settings

# The fields of NodeMemory that a row has, and what a row tells of a GPU, with the units.
MEMORY = ("available", "free", "cached", "swap")
UNITS = {"clock_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}


def report_status(settings: Settings, as_json: bool) -> None:
    """Print the cluster's nodes and its server as a table, and with as_json as JSON too.

    Raises Exit where Docker does not answer, or on a head Ray.
    """
    node = node_container()
    env = container_environment(node) if node else {}
    head = env.get("MASTER_ADDR")
    told: dict[str, Any] = {"container": node and node.status, "head": head, "nodes": [], "server": None}
    if node is None:
        say(f"No {CONTAINER} runs on this node. Type: inv up --model NAME")
    elif node.status != "running":
        say(f"{CONTAINER} is {node.status}. Type: inv cleanup")
    elif env.get("VLLM_HOST_IP") != head:
        say(f"This node is a worker of {head}, for {container_age(node)}. On the head type: inv status")
    else:
        nodes = [] if is_earlier(node) else ask_nodes(node)
        verdict, seen = look(settings, [one.address for one in nodes])
        rows = _rows(nodes, read_lows(settings), launched=seen.server is not None)
        told |= {"state": str(verdict.state), "server": seen.server and _server(seen.server), "nodes": rows}
        say(*sorted({f"vLLM {row['vllm'] or 'unknown'}, Ray {row['ray'] or 'unknown'}" for row in rows}))
        say(f"{verdict.state}: {verdict.why}" + (f" Next: {verdict.next}" if verdict.next else ""))
        if rows:
            _print_nodes(rows)
    if as_json:
        tell(json.dumps(told, indent=1))


def _server(server: Served) -> dict[str, Any]:
    """Print the server's line, and return its facts."""
    checkpoint, size = server.words[2], f"{server.context:,} tokens, {server.world_size} ranks"
    say(f"{server.model} ({checkpoint}), {size}, launched {_ago(server.since)}")
    about = {"model": server.model, "checkpoint": checkpoint, "context": server.context, "ranks": server.world_size}
    return about | {"alive": server.alive, "since": server.since}


def _rows(nodes: Sequence[Node], lows: Mapping[str, int], launched: bool) -> list[dict[str, Any]]:
    """Return a row for each node that Ray has, and for each that Ray had at the launch. None stands for unknown."""
    rows = []
    for node in nodes:
        facts = {name: node[name] for name in ("since", "image", "links", "vllm", "ray", "gpus")}
        known = {name: None if isinstance(fact, Unknown) else fact for name, fact in facts.items()}
        used = [name for name in (node.variable("NCCL_SOCKET_IFNAME") or "").split(",") if name]
        row: dict[str, Any] = {"address": node.address, "alive": True, "hostname": node.hostname, **known}
        row["image"] = known["image"] and known["image"].split()[0]
        row |= {name: getattr(node_memory(node), name) for name in MEMORY} | {"lowest": lows.get(node.address)}
        row["links"] = known["links"] and {name: known["links"].get(name, {}).get("state", "missing") for name in used}
        rows.append(row)
    lost = sorted(lows.keys() - {node.address for node in nodes}) if launched else []
    return rows + [dict.fromkeys(rows[0]) | {"address": at, "alive": False, "lowest": lows[at]} for at in lost]


def _print_nodes(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)  # more columns would not fit into 80 letters
    for heading in ("node", "host", "up", "image", "links"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        down = [f"{name} {state}" for name, state in (row["links"] or {}).items() if state != "up"]
        links = "unknown" if row["links"] is None else ", ".join(down) or f"{len(row['links'])} up"
        up = _ago(row["since"]) if row["alive"] else "lost"
        image = (row["image"] or "unknown").removeprefix("sha256:")[:12]
        table.add_row(row["address"], row["hostname"] or "unknown", up, image, links)
    Console(stderr=True, highlight=False).print(table)
    for row in rows:
        told = ", ".join(f"{in_gib(row[name])} {name}" for name in (*MEMORY, "lowest"))
        say(f"GiB on {row['address']}: {told}")
        # A GPU that is busy and draws little power may be in a low-power state.
        for gpu in row["gpus"] or ():
            numbers = [f"{gpu[name]:.0f} {unit}" for name, unit in UNITS.items() if gpu[name] is not None]
            say(f"GPU of {row['address']}: {', '.join(numbers) or 'unknown'}")


def _ago(since: float | None) -> str:
    return "unknown" if since is None else f"{age_in_words(time.time() - since)} ago"
