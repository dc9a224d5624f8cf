"""The rules that compare the nodes before a model is loaded.

Nodes that differ load a model for many minutes. Then they hang or give wrong answers, and no log names the cause.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.engine import container_environment
from cluster.finding import Finding, vllm_version
from cluster.image import image_line
from cluster.node import INSIDE
from cluster.options import ask_inside, given_options
from cluster.repository import repository_digest
from cluster.server import serve_words
from cluster.settings import ModelSettings, Settings
from cluster.transfer import GB

if TYPE_CHECKING:
    from docker.models.containers import Container

# --- The facts of each node -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unknown:
    """A fact that could not be asked, and the reason."""

    reason: str


@dataclass(frozen=True)
class Node:
    """One node that Ray has: Ray gives its address, host name and GPUs, and inside/probe.py gives its facts."""

    address: str
    hostname: str
    ray_gpus: float
    facts: dict[str, Any]

    def __getitem__(self, fact: str) -> Any:  # noqa: ANN401 - facts are JSON of any form
        told = self.facts.get(fact, {"unknown": self.facts.get("unknown", "the probe did not say")})
        return Unknown(told["unknown"].partition("\n")[0]) if isinstance(told, dict) and "unknown" in told else told

    def variable(self, name: str) -> str | None:
        """Return a variable of the container's start. None: it was not set, or could not be asked."""
        env = self["environment"]
        return None if isinstance(env, Unknown) else env.get(name)


def ask_nodes(head: Container, names: Sequence[str] = (), checkpoint: str = "", revision: str = "") -> list[Node]:
    """Return every alive node, the head first.

    names: the variables to ask besides vLLM's and NCCL's. checkpoint: that of the hub to look for in the caches.

    Raises Exit if Ray could not be asked.
    """
    words = ("python3", f"{INSIDE}/probe.py", secrets.token_hex(16), checkpoint, revision, *names)
    found = ask_inside(head, 30, lambda got: [Node(**one) for one in [got[0], *got[1:]] if dict(one["facts"])], *words)
    own = container_environment(head).get("VLLM_HOST_IP")
    return sorted(found, key=lambda node: (node.address != own, node.address))


def alive_addresses(head: Container, seconds: float) -> list[str]:
    """Return the address of every node that Ray counts as alive. Raises Exit if Ray does not answer in time."""
    return ask_inside(head, seconds, list, "python3", f"{INSIDE}/every.py")


# --- The rules that compare one fact ----------------------------------------------------------------------------------

PACKAGES = ("vllm", "ray", "python", "torch")
# The rule that refuses a fact which could not be asked.
RULE_OF = {
    **{rule: rule for rule in ("gpus", "wrapper", "token", "image", "network", "links", "weights")},
    "host": "hosts",
    **dict.fromkeys(("kernel", "driver", "cgroup driver"), "host-software"),
    "environment": "variables",
    **dict.fromkeys(PACKAGES, "versions"),
    **dict.fromkeys(("infiniband", "memlock", "ipc_lock"), "rdma"),
}
# The facts that must be the head's on every node, each with the sentence about a node where the fact differs.
SAME = {
    "wrapper": "The containers were started differently: {head} alone has {here}, {node} alone has {there}. Bring both "
    "up from one version of this repository, with the same --model.",
    "image": "The images differ: {head} runs {here:.19}, {node} runs {there:.19}. From this node: {copy}",
    **dict.fromkeys(PACKAGES, "{fact} is {here} on {head} and {there} on {node}. Give both one image: {copy}"),
    "token": "Ray's token differs: {head} has {here}, {node} has {there} (hashes, not the tokens). Copy the head's "
    "file at RAY_AUTH_TOKEN_PATH to {node}, and bring both up again.",
    **dict.fromkeys(
        ("kernel", "driver"),
        "The {fact} is {here} on {head} and {there} on {node}. On both: sudo apt update; sudo apt full-upgrade; reboot",
    ),
    "cgroup driver": "Docker's {fact} is {here} on {head} and {there} on {node}. Set one native.cgroupdriver in "
    "/etc/docker/daemon.json of both; then: sudo systemctl restart docker",
    "network": "The control links are in different networks: {head} in {here}, {node} in {there}. Set PRIMARY_IF or "
    "the addresses (ip -4 address).",
}

# The end of a sentence that has asked the operator to list /dev/infiniband.
NO_RDMA = "if it is gone, a cold boot; then bring the node up again. TCP on purpose: RDMA_HCAS= on every node."


def find_disagreements(nodes: Sequence[Node], settings: Settings) -> list[Finding]:
    """Return the findings of all rules. The first of the nodes is the head."""
    rules = (_unknown, _enough, _hosts, _gpus, _same, _unbuilt, _checkout, _variables, _rdma, _nic_lists, _links)
    return [found for rule in (*rules, _subnets, _gids) for found in rule(nodes, settings)]


def _told(nodes: Sequence[Node], *facts: str) -> list[tuple[Any, ...]]:
    """Return a row for each node that told all of these facts: the node, then the facts."""
    rows = [(node, *(node[fact] for fact in facts)) for node in nodes]
    return [row for row in rows if not any(isinstance(fact, Unknown) for fact in row)]


def worker_line(settings: Settings, where: str) -> str:
    """Return the line that brings up a worker, behind the place to type it. `up` belongs on the head."""
    return f"{'on the head' if settings.typed[0] == 'up' else where}: {settings.line('worker', 'elsewhere')}"


def _lines_anew(settings: Settings) -> str:
    """Return the lines that give every node a new container."""
    rest = "" if settings.typed[0] == "up" else f"; then {worker_line(settings, 'on every other node')}"
    return f"here: inv down; then {settings.line('head')}{rest}"


def _unknown(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    for node in nodes:
        if "unknown" in node.facts:  # Ray goes on listing a node that has ended, for some seconds
            text = f"{node.address} does not answer ({node['host'].reason}). If it was started again just now, wait "
            yield Finding("nodes", f"{text}15 s and type the same line.")
            continue
        over_tcp = node.variable("NCCL_IB_DISABLE") == "1"
        for fact, rule in RULE_OF.items():
            if isinstance(told := node[fact], Unknown) and not (over_tcp and rule == "rdma"):
                text = f"{node.address}: {fact} could not be asked ({told.reason}), so it may be wrong."
                yield Finding(rule, text, refuses=rule != "host-software")


def _same(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    head = nodes[0]
    for fact, sentence in SAME.items():
        for node, here, there in [(node, head[fact], told) for node, told in _told(nodes[1:], fact)]:
            if here == there or isinstance(here, Unknown):
                continue
            # An image is told as its id and the digest of its base. Another build of one base is a warning.
            warns = fact == "image" and here.partition(" ")[2] == there.partition(" ")[2] != ""
            warns |= RULE_OF[fact] == "host-software"
            if fact == "wrapper":
                ours, theirs = shlex.split(here["words"]), shlex.split(there["words"])
                here = shlex.join(word for word in ours if word not in theirs) or "nothing"
                there = shlex.join(word for word in theirs if word not in ours) or "nothing"
            copy = settings.line("ship-image")
            names = {"fact": fact, "head": head.address, "node": node.address, "copy": copy}
            text = sentence.format(here=here or "none", there=there or "none", **names)
            yield Finding(RULE_OF[fact], text, refuses=not warns)


def _unbuilt(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Warn of an image without the label of its base, which `inv build-image` writes."""
    for node, image in _told(nodes[:1], "image"):
        if not image.partition(" ")[2]:
            text = f"The image of {node.address} has no label of its base, so two builds of it cannot be compared."
            yield Finding("image", text, refuses=False)


# --- The other rules --------------------------------------------------------------------------------------------------


def _enough(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    have, needed = sorted({node.address for node in nodes if node.ray_gpus >= 1}), settings.world_size()
    if len(have) < needed:
        text = f"The model needs {needed} nodes with a GPU (TP_SIZE times PP_SIZE); Ray has {', '.join(have) or 'none'}"
        yield Finding("nodes", f"{text}. Type {worker_line(settings, 'on each that is missing')}")


def _hosts(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    first: dict[str, Node] = {}
    for node, host in _told(nodes, "host"):
        if (twin := first.setdefault(host, node)) is not node:
            text = f"The worker {node.address} was started on the machine of {twin.address} ({twin.hostname}). "
            yield Finding("hosts", f"{text}End it by Ctrl-C; then type {worker_line(settings, 'on the other Spark')}")


def _gpus(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    for node, gpus in _told(nodes, "gpus"):
        if len(gpus) != 1:
            yield Finding("gpus", f"{node.address} has {len(gpus)} GPUs in its container; a Spark has one.")


def _checkout(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Warn of another version of this repository. Other rules compare everything that decides how a node runs."""
    now = repository_digest()
    started = [(node.address, digest or "none") for node, digest in _told(nodes, "repository") if digest != now]
    if started:
        nodes_of_it = ", ".join(f"{address} ({digest:.12})" for address, digest in started)
        text = f"Another version than this checkout (sha256 {now:.12}) started {nodes_of_it}. "
        text += f"In both checkouts: git status; git pull; then inv down; then {settings.line('up')}"
        yield Finding("wrapper", text, refuses=False)


def _variables(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every container must have started with the value that each forwarded variable has in the model's profile."""
    for name in settings.forward:
        values = {node.address: env.get(name) for node, env in _told(nodes, "environment")}
        if set(values.values()) - {settings[name]}:
            told = ", ".join(f"{address} has {'none' if value is None else value}" for address, value in values.items())
            text = (
                f"Every container must start with {name}={settings[name]}, because Ray does not pass it to a worker: "
            )
            yield Finding("variables", f"{text}{told}. Type {_lines_anew(settings)}")


def _rdma(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """RDMA needs its devices, the right to lock memory, and no limit on locked memory."""
    for node in (node for node in nodes if node.variable("NCCL_IB_DISABLE") != "1"):
        if node["infiniband"] == [] or node["ipc_lock"] is False:
            lack = "no device in /dev/infiniband" if node["infiniband"] == [] else "no right to lock memory (IPC_LOCK)"
            text = f"{node.address}: the container has {lack}, so NCCL would use TCP. On that node: ls /dev/infiniband"
            yield Finding("rdma", f"{text}; {NO_RDMA}")
        if isinstance(node["memlock"], int) and node["memlock"] != -1:
            text = (
                f"{node.address}: the container may lock {node['memlock'] // 1024} KiB of memory, but RDMA locks "
                "gigabytes. Bring the node up again. A limit that stays is of a runtime other than runc: docker info"
            )
            yield Finding("memlock", text)


def _nic_lists(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The lists of RoCE devices may differ, but only if vLLM leaves each node its own list."""
    lists = {node.address: env.get("NCCL_IB_HCA") for node, env in _told(nodes, "environment")}
    if len(set(lists.values())) > 1:
        vllm, kept = nodes[0]["vllm"], nodes[0]["own_variables"]
        # RayExecutorV2, from 0.21 on, keeps a worker's own value. The older executor overwrites it with the head's,
        # unless the file behind own_variables lists the variable.
        overwrites = isinstance(kept, Unknown) or "NCCL_IB_HCA" not in kept
        with suppress(TypeError, ValueError):  # an unknown version may be an older one
            overwrites = overwrites and vllm_version(vllm) < (0, 21, 0)
        text = f"NCCL_IB_HCA differs: {', '.join(f'{address} has {value}' for address, value in lists.items())}."
        if overwrites:
            text += f" A vLLM before 0.21 gives every worker the head's. Type: {image_line(settings, has=True)}"
        yield Finding("nic-lists", text, refuses=overwrites)


def _links(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every interface in use must be up, with the MTU of its opposite. Fewer devices or a small MTU bring a warning."""
    sides = []
    for node, links, env in _told(nodes, "links", "environment"):
        devices = [device["netdev"] if device else "" for device in used_devices(node).values()]
        sockets, control = env.get("NCCL_SOCKET_IFNAME", "").split(","), env.get("TP_SOCKET_IFNAME", "")
        data = {*devices} - {""} or {*sockets} - {""}
        used = {name: links.get(name, {"state": "missing"}) for name in sorted({*data, *sockets, control} - {""})}
        sides.append((node.address, (devices, sockets, [control]), used))
        for name, link in used.items():
            if link["state"] != "up":
                text = f"{node.address}: {name} is {link['state']}, and NCCL may hang on it. Check the cable; or set "
                yield Finding("links", f"{text}DATA_IFS and RDMA_HCAS without it; then type {_lines_anew(settings)}")
        if small := [f"{name} has {used[name]['mtu']}" for name in sorted(data) if used[name].get("mtu", 9000) < 9000]:
            text = f"{node.address}: an MTU below 9000 costs much of the rate: {', '.join(small)}. On every node: "
            yield Finding("mtu", f"{text}sudo ip link set NAME mtu 9000; and in netplan: mtu: 9000", refuses=False)
    for address, lists, used in sides[1:]:
        head, its_lists, its_used = sides[0]
        pairs = [pair for both in zip(its_lists, lists, strict=True) for pair in zip(*both, strict=False)]
        for ours, theirs in dict.fromkeys(pairs):
            here, there = its_used.get(ours, {}).get("mtu"), used.get(theirs, {}).get("mtu")
            if here and there and here != there:
                text = f"The MTU differs: {ours} of {head} has {here}, {theirs} of {address} has {there}. Type on one: "
                yield Finding("mtu", f"{text}sudo ip link set NAME mtu 9000")
        if len(lists[0]) != len(its_lists[0]):
            text = f"{head} uses {len(its_lists[0])} RoCE devices, {address} {len(lists[0])}. The fewer set the rate."
            yield Finding("link-count", text, refuses=False)


def used_devices(node: Node) -> dict[str, Any]:
    """Return the devices of NCCL_IB_HCA, in this order. None: /sys in the container does not show the device."""
    names, shown = (node.variable("NCCL_IB_HCA") or "").split(","), node["devices"]
    return {name: None if isinstance(shown, Unknown) else shown.get(name) for name in names if name}


def _subnets(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """NCCL connects the first devices of two nodes, the second ones, and so on. Each pair needs one network or none.

    NCCL takes the GID of an IPv4 address if there is one (ncclIbGetGidIndex in net_ib/connect.cc).
    """
    head = used_devices(nodes[0])
    for node in nodes:
        used = used_devices(node)
        for (ours, here), (theirs, there) in zip(head.items(), used.items(), strict=False):
            if here and there and here["network"] != there["network"]:
                text = (
                    f"NCCL connects {ours} ({here['netdev']}, {here['network']}) of {nodes[0].address} with {theirs} "
                    f"({there['netdev']}, {there['network']}) of {node.address}, and would fail (ibv_modify_qp, error "
                    "110). Put the cable into the same port of both nodes, and give both interfaces an address in one "
                    "network, or none. Type on both: ip -4 address"
                )
                yield Finding("subnets", text)
        if unseen := [name for name, device in used.items() if device is None]:
            text = f"{node.address}: /sys in the container does not show {', '.join(unseen)}, so no rule judged their "
            yield Finding("subnets", f"{text}networks and GIDs. On the node: ls /sys/class/infiniband", refuses=False)


def _gids(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """NCCL_IB_GID_INDEX must name a GID of one type on every device. A reboot may change a device's table of GIDs."""
    types = {
        f"{node.address} {name} has {{}} at {index}": device["gids"].get(index, ["", "none"])[1]
        for node in nodes
        if (index := node.variable("NCCL_IB_GID_INDEX"))
        for name, device in used_devices(node).items()
        if device
    }
    if "none" in types.values() or len({*types.values()}) > 1:
        told = ", ".join(place.format(kind) for place, kind in types.items())
        text = f"NCCL_IB_GID_INDEX names no GID, or GIDs of two types: {told}. Take it out of .env, so that NCCL "
        yield Finding("gid", f"{text}chooses; then type {_lines_anew(settings)}")


# --- The weights ------------------------------------------------------------------------------------------------------


def asks_hub(settings: ModelSettings) -> bool:
    """Whether vLLM looks for the model in the cache of the hub: not for a folder, and not for dummy weights."""
    options = dict(given_options(serve_words(settings)))
    return not settings["MODEL_CKPT"].startswith("/") and options.get("--load-format") != ["dummy"]


def weights_findings(nodes: Sequence[Node], settings: ModelSettings, expected: float = 0) -> Iterator[Finding]:
    """Refuse caches that are damaged or have two revisions. Warn of nodes on which vLLM would download the weights.

    expected: the bytes of all weights, if no node knows them.
    """
    if not asks_hub(settings):
        return
    told = [(node, one) for node, one in _told(nodes, "weights") if one]  # None: of a folder nothing was asked
    line = settings.line("weights")
    for node, one in told:
        if bad := [*one["wrong"], *(f"{name} is missing" for name in one["missing"])]:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            yield Finding("weights", f"{node.address}: {'; '.join(bad[:3])}{more}. Type: {line}")
    found = {one["revision"]: node.address for node, one in told if one["revision"]}
    if len(found) > 1:
        text = ", ".join(f"{address} has {revision:.12}" for revision, address in found.items())
        yield Finding("weights", f"Two revisions of {settings['MODEL_CKPT']}: {text}. Type: {line}")
    if absent := [node.address for node, one in told if not one["revision"]]:
        size = max((one["total"] or 0 for _, one in told), default=0) or expected
        much = f"about {size / GB:.0f} GB" if size else "the weights"
        text = f"vLLM will download {much} on {', '.join(absent)} while it loads. Before that, with a bar, once: {line}"
        yield Finding("weights", text, refuses=False)


def whole_everywhere(nodes: Sequence[Node], settings: ModelSettings) -> bool:
    """Whether vLLM needs no hub, because every node has all files of one revision.

    A word of SERVE_EXTRA with a slash may name another model, such as a drafter, which vLLM would download.
    """
    told = [one for _, one in _told(nodes, "weights") if one and one["revision"]]
    return (
        asks_hub(settings)
        and len(told) == len(nodes) > 0
        and len({one["revision"] for one in told}) == 1
        and not any(one["missing"] or one["wrong"] for one in told)
        and "/" not in settings["SERVE_EXTRA"]
    )
