"""The nodes compared before a model is loaded: each rule finds one way in which they differ, or lack what they need.

Nodes that differ still load a model, for many minutes. Then they hang, or answer nonsense, without a word of the cause.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invoke import Exit

from cluster.engine import container_environment
from cluster.finding import Finding, vllm_version
from cluster.options import ask_inside
from cluster.repository import repository_digest
from cluster.settings import Settings

if TYPE_CHECKING:
    from docker.models.containers import Container

# --- The facts of each node -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unknown:
    """The reason why a fact could not be asked."""

    reason: str


@dataclass(frozen=True)
class Node:
    """One alive node: its address, host name and number of GPUs by Ray, and the facts that its container told."""

    address: str
    hostname: str
    ray_gpus: float
    facts: dict[str, Any]

    def __getitem__(self, fact: str) -> Any:  # noqa: ANN401 - facts are JSON of any form
        """The fact, or Unknown."""
        told = self.facts.get(fact, {"unknown": self.facts.get("unknown", "the probe did not say")})
        return Unknown(told["unknown"]) if isinstance(told, dict) and "unknown" in told else told

    def variable(self, name: str) -> str | None:
        """A variable that the container started with; None if it has none, or could not be asked."""
        env = self["environment"]
        return None if isinstance(env, Unknown) else env.get(name)


def ask_nodes(head: Container, names: Sequence[str] = ()) -> list[Node]:
    """Every alive node, the head first, with the variables called names; raises Exit if Ray could not be asked."""
    answer = ask_inside(head, 30, "probe.py", secrets.token_hex(16), *names)
    try:
        found = [Node(**told) for told in json.loads(answer.splitlines()[-1])]
    except (ValueError, IndexError, TypeError):
        raise Exit(f"Ray's answer in {head.name} is no list of nodes: {answer[-200:]!r}") from None
    own = container_environment(head).get("VLLM_HOST_IP")
    return sorted(found, key=lambda node: (node.address != own, node.address))


# --- Facts that must be the same on every node ------------------------------------------------------------------------

ONE_IMAGE = "{fact} is {here} on {head} and {there} on {node}. Give both one image: {copy}"
# The rule, the fact, whether a difference refuses, and a sentence for each node whose fact is not the head's.
SAME = (
    ("wrapper", "wrapper", True, "The containers were started differently: {head} alone has {here}, {node} alone has "
     "{there}. Bring both up from one version of this repository, with the same --model."),
    # A warning, because whatever decides how a node runs is compared by itself.
    ("wrapper", "repository", False, "{head} and {node} were started from different versions of this repository: "
     "sha256 {here:.12} and {there:.12}. In both checkouts: git status; git pull; then inv down, and bring both up."),
    *(("versions", package, True, ONE_IMAGE) for package in ("vllm", "ray", "python", "torch")),
    ("token", "token", True, "Ray's token differs: {head} has {here}, {node} has {there} (hashes, not the tokens). "
     "Copy the head's file at RAY_AUTH_TOKEN_PATH to {node}, and bring both up again."),
    ("network", "network", True, "The control links are in different networks: {head} in {here}, {node} in {there}. "
     "Set PRIMARY_IF or the addresses (ip -4 address)."),
)  # fmt: skip


def find_disagreements(nodes: Sequence[Node], settings: Settings) -> list[Finding]:
    """All that the rules find; nodes has the head first."""
    rules = (_enough, _hosts, _gpus, _same, _checkout, _variables, _image, _rdma, _nic_lists, _links)
    return [found for rule in rules for found in rule(nodes, settings)]


def _same(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    for rule, fact, refuses, sentence in SAME:
        yield from _unknown(rule, nodes, fact)
        for node, here, there in _unlike(nodes, fact):
            if fact == "wrapper":
                ours, theirs = shlex.split(here["words"]), shlex.split(there["words"])
                here = shlex.join(word for word in ours if word not in theirs) or "nothing"
                there = shlex.join(word for word in theirs if word not in ours) or "nothing"
            names = {"fact": fact, "head": nodes[0].address, "node": node.address, "copy": _copy_image(node, settings)}
            yield Finding(rule, sentence.format(here=here or "none", there=there or "none", **names), refuses)


def _unlike(nodes: Sequence[Node], fact: str) -> Iterator[tuple[Node, Any, Any]]:
    """Each node whose fact is not the head's, with the head's and its own; nodes with an unknown one are left out."""
    for node in nodes[1:]:
        here, there = nodes[0][fact], node[fact]
        if here != there and not isinstance(here, Unknown) and not isinstance(there, Unknown):
            yield node, here, there


def _unknown(rule: str, nodes: Sequence[Node], *facts: str) -> Iterator[Finding]:
    """A finding for each of these facts that a node could not be asked."""
    for node in nodes:
        for fact in facts:
            if isinstance(told := node[fact], Unknown):
                yield Finding(rule, f"{node.address}: {fact} could not be asked ({told.reason}), so it may be wrong.")


def _telling(nodes: Sequence[Node], *facts: str) -> list[Node]:
    """The nodes that told all of these facts."""
    return [node for node in nodes if not any(isinstance(node[fact], Unknown) for fact in facts)]


def _copy_image(node: Node, settings: Settings) -> str:
    return f"docker save {shlex.quote(settings['VLLM_IMAGE'])} | ssh {node.address} docker load"


def _bring_up(settings: Settings) -> str:
    """The command that brings a node up for this model."""
    return f"inv head or inv worker{f' --model {settings.model.name}' if settings.model else ''}"


# --- The other rules --------------------------------------------------------------------------------------------------


def _enough(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    have, needed = sorted({node.address for node in nodes if node.ray_gpus >= 1}), settings.world_size()
    if len(have) < needed:
        text = f"The model needs {needed} nodes with a GPU (TP_SIZE times PP_SIZE); Ray has {len(have)}: "
        yield Finding("nodes", f"{text}{', '.join(have) or 'none'}. On each that is missing: inv worker")


def _hosts(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    yield from _unknown("hosts", nodes, "host")
    first: dict[str, Node] = {}
    for node in _telling(nodes, "host"):
        twin = first.setdefault(node["host"], node)
        if twin is not node:
            whose = "the head's own machine" if twin is nodes[0] else f"the machine of {twin.address}"
            text = f"The worker {node.address} was started on {whose} ({twin.hostname}), so both ranks would share one "
            yield Finding("hosts", f"{text}Spark. Ctrl-C it; then on the other Spark: inv worker")


def _gpus(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    yield from _unknown("gpus", nodes, "gpus")
    for node in _telling(nodes, "gpus"):
        if len(node["gpus"]) != 1:
            yield Finding("gpus", f"{node.address} has {len(node['gpus'])} GPUs in its container; a Spark has one.")


def _checkout(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    started, now = nodes[0]["repository"], repository_digest()
    if started != now and not isinstance(started, Unknown):
        text = (
            f"This checkout has changed since the head was started: sha256 {started!s:.12}, now {now:.12}. The "
            "scripts in the containers are new already, the rest is as it was. To start anew: inv down; then inv up"
        )
        yield Finding("wrapper", text, refuses=False)


def _variables(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every container started with the value of each forwarded variable that the model's profile has now."""
    yield from _unknown("variables", nodes, "environment")
    for name in settings.forward:
        values = {node.address: node.variable(name) for node in _telling(nodes, "environment")}
        if set(values.values()) - {settings[name]}:
            told = ", ".join(f"{address} has {'none' if value is None else value}" for address, value in values.items())
            text = (
                f"{name} must be {settings[name]} in every container when it starts: {told}. Ray's processes on a "
                f"worker get it no other way. Ctrl-C where it differs; then there: {_bring_up(settings)}"
            )
            yield Finding("variables", text)


def _image(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same image. Another build of the same base is a warning."""
    yield from _unknown("image", nodes, "image")
    for node, here, there in _unlike(nodes, "image"):
        (our_id, _, our_base), (their_id, _, their_base) = here.partition(" "), there.partition(" ")
        one_base = bool(our_base) and our_base == their_base
        if our_id != their_id:
            text = (
                f"The images differ: {nodes[0].address} runs {our_id[:19]}, {node.address} runs {their_id[:19]}, built "
                f"from {'the same base' if one_base else 'different bases'}. From this node: "
            )
            yield Finding("image", text + _copy_image(node, settings), refuses=not one_base)


def _rdma(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Where RDMA was asked for: its devices, the right to lock memory, and no limit to it."""
    for node in nodes:
        if node.variable("NCCL_IB_DISABLE") == "1":
            continue
        yield from _unknown("rdma", [node], "infiniband", "memlock", "ipc_lock")
        if node["infiniband"] == [] or node["ipc_lock"] is False:
            lack = "no device in /dev/infiniband" if node["infiniband"] == [] else "no right to lock memory (IPC_LOCK)"
            text = (
                f"{node.address}: the container has {lack}, so NCCL would fall back to TCP without complaint. On that "
                "node: ls /dev/infiniband; if it is gone, a cold boot; then bring the node up again. TCP on purpose: "
                "RDMA_HCAS= on every node."
            )
            yield Finding("rdma", text)
        if isinstance(node["memlock"], int) and node["memlock"] != -1:
            text = (
                f"{node.address}: the container may lock {node['memlock'] // 1024} KiB of memory, and RDMA locks "
                "gigabytes. Bring that node up by this repository's task, which lifts the limit. If it did: docker "
                "info, on that node, names a runtime other than runc that keeps the limit."
            )
            yield Finding("memlock", text)


def _nic_lists(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Where the nodes' lists of RoCE devices differ, the vLLM that will run leaves each node its own."""
    lists = {node.address: node.variable("NCCL_IB_HCA") for node in _telling(nodes, "environment")}
    if len(set(lists.values())) > 1:
        vllm, kept = nodes[0]["vllm"], nodes[0]["own_variables"]
        # RayExecutorV2, from 0.21 on, keeps a worker's own value. The older executor takes the head's for each variable
        # that the file behind own_variables does not list.
        older = isinstance(vllm, Unknown) or vllm_version(vllm) < (0, 21, 0)
        overwrites = older and (isinstance(kept, Unknown) or "NCCL_IB_HCA" not in kept)
        text = f"NCCL_IB_HCA differs: {', '.join(f'{address} has {value}' for address, value in lists.items())}."
        if overwrites:
            text += f" vLLM {vllm} would give every worker the head's. Build the image again: inv build-image"
        yield Finding("nic-lists", text, refuses=overwrites)


def _links(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every interface that a container uses is up, with the head's MTU; another number of devices is a warning."""
    yield from _unknown("links", nodes, "links")
    sides = []
    for node in _telling(nodes, "links", "environment"):
        names = f"{node.variable('NCCL_SOCKET_IFNAME') or ''},{node.variable('TP_SOCKET_IFNAME') or ''}".split(",")
        links = {name: node["links"].get(name, {"state": "missing"}) for name in sorted(set(names)) if name}
        mtus = sorted({link["mtu"] for link in links.values() if "mtu" in link})
        devices = (node.variable("NCCL_IB_HCA") or "").split(",")
        sides.append((node.address, " and ".join(map(str, mtus)) or "none", len(devices)))
        for name, link in links.items():
            if link["state"] != "up":
                text = (
                    f"{node.address}: {name} is {link['state']}, and its container was told to use it, which can stall "
                    f"NCCL. Check the cable; or bring the node up without it: Ctrl-C, then {_bring_up(settings)}"
                )
                yield Finding("links", text)
    for address, mtu, count in sides[1:]:
        head, its_mtu, its_count = sides[0]
        if mtu != its_mtu:
            text = f"The MTU differs: {head} has {its_mtu}, {address} has {mtu}. Type on one: "
            yield Finding("mtu", f"{text}sudo ip link set NAME mtu 9000")
        if count != its_count:
            text = f"{head} uses {its_count} RoCE devices, {address} {count}: the slower side rules."
            yield Finding("link-count", text, refuses=False)
