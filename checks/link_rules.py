"""What every container's links must be before a model is loaded: RDMA where it was asked for, up, and alike."""

from collections.abc import Iterator, Sequence

from checks.comparison import bring_up, telling, unknown, unlike
from checks.finding import Finding
from checks.nodes import Node, Unknown
from checks.options import version
from settings.resolve import Settings


def rdma(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Where RDMA was asked for: its devices, locked memory without a limit, and the right to lock it."""
    for node in nodes:
        if node.variable("NCCL_IB_DISABLE") == "1":
            continue
        yield from unknown("rdma", [node], "infiniband", "memlock", "ipc_lock")
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
    yield from unknown("network", nodes, "network")
    for node, here, there in unlike(nodes, "network"):
        yield Finding(
            "network",
            f"The control links are in different networks: {nodes[0].address} in {here}, {node.address} in {there}. "
            "Set PRIMARY_IF or the addresses (ip -4 address).",
        )


def links(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every link that a container uses is up, with the same MTU everywhere; another number of links is a warning."""
    yield from unknown("links", nodes, "links")
    told = telling(nodes, "links", "environment")
    for node in told:
        for netdev in sorted(_used(node)):
            state = node["links"].get(netdev, {}).get("state", "missing")
            if state != "up":
                yield Finding(
                    "links",
                    f"{node.address}: {netdev} is {state}, and its container was told to use it, which can stall NCCL. "
                    f"Check the cable, or bring that node up again without it: Ctrl-C, then {bring_up(settings)}",
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
    lists = {node.address: node.variable("NCCL_IB_HCA") for node in telling(nodes, "environment")}
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


def _used(node: Node) -> set[str]:
    """The network interfaces that the node's container was told to use."""
    names = [node.variable(name) or "" for name in ("NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")]
    return {name for name in ",".join(names).split(",") if name}


def _mtus(node: Node) -> set[int]:
    return {node["links"][name]["mtu"] for name in _used(node) if name in node["links"]}


def _listed(items: set[int]) -> str:
    return " and ".join(str(item) for item in sorted(items)) or "none"
