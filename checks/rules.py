"""What every container must agree on before a model is loaded: each rule has a name, and says all that it finds."""

import shlex
from collections.abc import Callable, Iterator, Sequence

from checks.finding import Finding
from checks.nodes import Node, Unknown
from checks.options import version
from settings.resolve import Settings

Rule = Callable[[Sequence[Node], Settings], Iterator[Finding]]
AGAIN = "Ctrl-C there, then on that node: inv worker"


def findings(nodes: Sequence[Node], settings: Settings) -> list[Finding]:
    """All that all rules find, in the order of RULES."""
    return [found for rule in RULES for found in rule(nodes, settings)]


def enough(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """As many distinct addresses with a GPU as TP_SIZE times PP_SIZE."""
    have = sorted({node.address for node in nodes if node.ray_gpus >= 1})
    if len(have) < settings.world_size():
        yield Finding(
            "nodes",
            f"The model needs {settings.world_size()} nodes with a GPU (TP_SIZE times PP_SIZE); Ray has {len(have)}: "
            f"{', '.join(have) or 'none'}. On each that is missing: inv worker",
        )


def hosts(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every node is a machine of its own."""
    yield from _unknown("hosts", nodes, "host")
    for node in nodes[1:]:
        if not isinstance(node["host"], Unknown) and node["host"] == nodes[0]["host"]:
            yield Finding(
                "hosts",
                f"The worker {node.address} was started on the head's own machine ({nodes[0].hostname}): both ranks "
                "would share one Spark. Ctrl-C it, then on the other Spark: inv worker",
            )


def gpus(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """One GPU in every container."""
    yield from _unknown("gpus", nodes, "gpus")
    for node in nodes:
        if not isinstance(node["gpus"], Unknown) and len(node["gpus"]) != 1:
            yield Finding("gpus", f"{node.address} has {len(node['gpus'])} GPUs in its container; a Spark has one.")


def wrapper(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same `docker run`, word for word but for the host's side of the mounts."""
    yield from _unknown("wrapper", nodes, "wrapper")
    for node, here, there in _unlike(nodes, "wrapper"):
        mine, theirs = shlex.split(here["words"]), shlex.split(there["words"])
        only_here = [word for word in mine if word not in theirs]
        only_there = [word for word in theirs if word not in mine]
        yield Finding(
            "wrapper",
            f"The containers were started differently: {nodes[0].address} alone has {_words(only_here)}, "
            f"{node.address} alone has {_words(only_there)}. Bring both up from one version of this repository, with "
            "the same --model.",
        )


def variables(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same value of every forwarded variable, in every container, as the model's profile has it."""
    yield from _unknown("variables", nodes, "environment")
    for name in settings.forward:
        values = {node.address: node.variable(name) for node in _telling(nodes, "environment")}
        if set(values.values()) - {settings[name]}:
            told = ", ".join(f"{address} has {'none' if value is None else value}" for address, value in values.items())
            yield Finding(
                "variables",
                f"{name} must be {settings[name]} in every container when it starts: {told}. Ray's processes on a "
                f"worker get it no other way. Ctrl-C where it differs, then there: {_bring_up(settings)}",
            )


def image(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same image, or at least one built from the same base."""
    yield from _unknown("image", nodes, "image")
    for node, here, there in _unlike(nodes, "image"):
        (my_id, my_base), (their_id, their_base) = here.split(" ", 1), there.split(" ", 1)
        if my_id != their_id:
            known = my_base == their_base and my_base
            yield Finding(
                "image",
                f"The images differ: {nodes[0].address} runs {my_id[:19]}, {node.address} runs {their_id[:19]}, built "
                f"from {'the same base' if known else 'different bases'}. From this node: docker save "
                f"{shlex.quote(settings['VLLM_IMAGE'])} | ssh {node.address} docker load",
                refuses=not known,
            )


def versions(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same vLLM, Ray, Python and torch."""
    for package in ("vllm", "ray", "python", "torch"):
        yield from _unknown("versions", nodes, package)
        for node, here, there in _unlike(nodes, package):
            yield Finding(
                "versions",
                f"{package} is {here} on {nodes[0].address} and {there} on {node.address}. Give both one image: "
                f"docker save {shlex.quote(settings['VLLM_IMAGE'])} | ssh {node.address} docker load",
            )


def rdma(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Where RDMA was asked for: its devices, locked memory without a limit, and the right to lock it."""
    for node in nodes:
        if node.variable("NCCL_IB_DISABLE") == "1":
            continue
        yield from _unknown("rdma", [node], "infiniband", "memlock", "ipc_lock")
        if node["infiniband"] == [] or node["ipc_lock"] is False:
            lack = "no device in /dev/infiniband" if node["infiniband"] == [] else "no right to lock memory (IPC_LOCK)"
            yield Finding(
                "rdma",
                f"{node.address}: the container has {lack}, so NCCL would fall back to TCP without complaint. On that "
                "node: ls /dev/infiniband; if it is gone, a cold boot; then bring the node up again. TCP on purpose: "
                "RDMA_HCAS= on every node.",
            )
        if isinstance(node["memlock"], int) and node["memlock"] != -1:
            yield Finding(
                "memlock",
                f"{node.address}: the container may lock {node['memlock'] // 1024} KiB of memory, not all of it as "
                "--ulimit memlock=-1:-1 says, and RDMA registers gigabytes. Bring that node up by this repository's "
                "task; on that node: docker info shows a runtime that is not runc's.",
            )


def network(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """All control addresses in one network."""
    yield from _unknown("network", nodes, "network")
    for node, here, there in _unlike(nodes, "network"):
        yield Finding(
            "network",
            f"The control links are in different networks: {nodes[0].address} in {here}, {node.address} in {there}. "
            "Set PRIMARY_IF or the addresses (ip -4 address).",
        )


def links(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every link that a container uses is up, with the same MTU everywhere; another number of links is a warning."""
    yield from _unknown("links", nodes, "links")
    told = _telling(nodes, "links", "environment")
    for node in told:
        for netdev in sorted(_used(node)):
            state = node["links"].get(netdev, {}).get("state", "missing")
            if state != "up":
                yield Finding(
                    "links",
                    f"{node.address}: {netdev} is {state}, and its container was told to use it, which can stall NCCL. "
                    f"Check the cable, or bring that node up again without it: Ctrl-C, then {_bring_up(settings)}",
                )
    for node in told[1:]:
        mine, theirs = _mtus(told[0]), _mtus(node)
        if mine != theirs:
            sides = f"{told[0].address} has {_listed(mine)}, {node.address} has {_listed(theirs)}"
            yield Finding("mtu", f"The MTU differs: {sides}. Type on one: sudo ip link set NAME mtu 9000")
        counts = [len((each.variable("NCCL_IB_HCA") or "").split(",")) for each in (told[0], node)]
        if counts[0] != counts[1]:
            text = (
                f"{nodes[0].address} uses {counts[0]} RoCE devices, {node.address} {counts[1]}: the slower side rules."
            )
            yield Finding("link-count", text, refuses=False)


def nic_lists(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Where the nodes' lists of devices differ, the vLLM that will run leaves each its own."""
    lists = {node.address: node.variable("NCCL_IB_HCA") for node in _telling(nodes, "environment")}
    if len(set(lists.values())) > 1:
        vllm, kept = nodes[0]["vllm"], nodes[0]["own_variables"]
        # From 0.21 on a worker's own value wins (RayExecutorV2); before, the head's overwrote it unless it was listed.
        older = isinstance(vllm, Unknown) or version(vllm) < (0, 21, 0)
        overwrites = older and (isinstance(kept, Unknown) or "NCCL_IB_HCA" not in kept)
        told = ", ".join(f"{address} has {value}" for address, value in lists.items())
        text = f"NCCL_IB_HCA differs: {told}."
        if overwrites:
            text += f" vLLM {vllm} would give every worker the head's. Build the image again: inv build-image"
        yield Finding("nic-lists", text, refuses=overwrites)


def token(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same Ray token everywhere."""
    yield from _unknown("token", nodes, "token")
    for node, here, there in _unlike(nodes, "token"):
        who = f"{nodes[0].address} has {'one' if here else 'none'}, {node.address} {'another' if there else 'none'}"
        yield Finding("token", f"Ray's token differs: {who}. Copy the file at RAY_AUTH_TOKEN_PATH, and bring both up.")


RULES: tuple[Rule, ...] = (
    enough, hosts, gpus, wrapper, variables, image, versions, rdma, nic_lists, token, network, links,
)  # fmt: skip


def _unknown(rule: str, nodes: Sequence[Node], *facts: str) -> Iterator[Finding]:
    for node in nodes:
        for fact in facts:
            if isinstance(told := node[fact], Unknown):
                yield Finding(rule, f"{node.address}: {fact} could not be asked ({told.reason}), so it may be wrong.")


def _telling(nodes: Sequence[Node], *facts: str) -> list[Node]:
    """The nodes that could be asked for all of these facts."""
    return [node for node in nodes if not any(isinstance(node[fact], Unknown) for fact in facts)]


def _unlike(nodes: Sequence[Node], fact: str) -> Iterator[tuple[Node, object, object]]:
    """Each node whose fact is not the head's, with the head's and its own; unknown ones are told elsewhere."""
    for node in nodes[1:]:
        here, there = nodes[0][fact], node[fact]
        if here != there and not isinstance(here, Unknown) and not isinstance(there, Unknown):
            yield node, here, there


def _used(node: Node) -> set[str]:
    """The network interfaces that the node's container was told to use."""
    names = [node.variable(name) or "" for name in ("NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")]
    return {name for name in ",".join(names).split(",") if name}


def _mtus(node: Node) -> set[int]:
    return {node["links"][name]["mtu"] for name in _used(node) if name in node["links"]}


def _listed(items: set[int]) -> str:
    return " and ".join(str(item) for item in sorted(items)) or "none"


def _words(words: list[str]) -> str:
    return shlex.join(words) or "nothing"


def _bring_up(settings: Settings) -> str:
    return f"inv head or inv worker{f' --model {settings.model.name}' if settings.model else ''}"
