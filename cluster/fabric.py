"""A proof of the network between the nodes, and of their GPUs: all-reduces that are timed and logged.

A list of devices proves nothing, because NCCL falls back to TCP without an error. Up to 1 GiB is needed on each node's
GPU, so the caller makes sure first that no server runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.agreement import NO_RDMA, Node, used_devices
from cluster.finding import Finding
from cluster.links import Link
from cluster.node import CONTAINER, INSIDE
from cluster.options import ask_inside

if TYPE_CHECKING:
    from docker.models.containers import Container

SECONDS = 60
# NCCL's src/transport/net.cc: "Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0". A plugin has a name of its own in
# place of IB ("IBext_v10", "NCCL RDMA Plugin v10").
VIA = re.compile(r"Channel \d+/\d+ : \S+ -> \S+ \[(?:send|receive)\] via NET/([^/\n]+)/(\d+)")
# net_ib.cc and net_socket.cc: "NET/IB : Using [0]rocep1s0f0:1/RoCE [RO]; OOB ...", "NET/Socket : Using [0]enp1s0:...".
# From 2.24 on also, for RoCE devices combined: "NET/IB : Made virtual device [2] name=rocep1s0f0+roceP2p1s0f0".
USING = re.compile(r"NET/(\S+) : Using (\[\d+\][^;\n]*)")
DEVICE = re.compile(r"\[(\d+)\]([^\s:\]={]+):")
COMBINED = re.compile(r"NET/\S+ : Made virtual device \[(\d+)\] name=(\S+)")


@dataclass(frozen=True)
class Rank:
    """One node's part in the all-reduce, which takes `seconds` and moves `size` bytes. `error`: why it did not end.

    `transports` has NCCL's names for the channels between the nodes (`Socket` is TCP), which use `devices`. `latency`
    is the time of an all-reduce of 16 KiB in seconds. `copied` and `computed` are the bytes and the operations of the
    GPU in a second; 0 if they were not measured.
    """

    address: str
    hostname: str
    error: str = ""
    backend: str = ""
    cuda: bool = False
    size: int = 0
    iterations: int = 0
    seconds: float = 0
    environment: dict[str, str] = field(default_factory=dict)
    transports: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    latency: float = 0
    copied: float = 0
    computed: float = 0

    @property
    def route(self) -> str:
        if self.backend == "gloo":
            return f"gloo on {self.environment.get('GLOO_SOCKET_IFNAME', 'any interface')}"
        over = " and ".join(f"NET/{name}" for name in self.transports)
        return f"{over} on {', '.join(self.devices)}" if over else "no network"

    @property
    def hcas(self) -> str:
        """The value of NCCL_IB_HCA: the RoCE devices that NCCL must use. Empty if NCCL must use TCP."""
        return self.environment.get("NCCL_IB_HCA", "")

    @property
    def unused(self) -> list[str]:
        """The devices of NCCL_IB_HCA that no channel used. NCCL takes a name there for a prefix."""
        if any(device.startswith("device ") for device in self.devices):
            return []
        return [name for name in self.hcas.split(",") if not any(used.startswith(name) for used in self.devices)]


def ask_fabric(head: Container) -> list[Rank]:
    """Time an all-reduce between all alive nodes, in at most SECONDS, and return the ranks, the head's first.

    Nothing stays in the containers, and the all-reduce ends by itself after a Ctrl-C here. Raises Exit if Ray could not
    be asked.
    """
    return ask_inside(head, SECONDS, lambda told: [read_rank(one) for one in told], "python3", f"{INSIDE}/fabric.py")


def read_rank(told: dict[str, Any]) -> Rank:
    address, hostname = told["address"], told["hostname"]
    if "error" in told:
        return Rank(address, hostname, told["error"])
    transports, devices = read_log(told["log"])
    rank = Rank(address, hostname, environment=told["environment"], transports=transports, devices=devices)
    if told["status"] == 0:
        return replace(rank, **json.loads(told["told"].splitlines()[-1]))
    # The first warning has the cause, and later ones follow from it. Without a warning the last line says most.
    causes = re.findall("NCCL WARN (.+)", told["log"]) or told["log"].strip().splitlines()[-1:] or ["it said nothing"]
    # The status of a rank that timeout(1) ended by KILL is -9 in Python, and 137 in a shell.
    end = "it hung" if told["status"] in (-9, 137) else f"status {told['status']}"
    over = f", over {rank.route}" if transports else ""
    return replace(rank, error=f"{end}{over}: {causes[0].strip()[:300]}")


def read_log(log: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the transports and the devices of the channels in NCCL's log. NCCL may find a device and not use it."""
    names: dict[tuple[bool, str], list[str]] = {}
    for transport, offered in USING.findall(log):
        names |= {(transport == "Socket", index): [name] for index, name in DEVICE.findall(offered)}
    names |= {(False, index): name.split("+") for index, name in COMBINED.findall(log)}
    channels = VIA.findall(log)
    devices = [name for via, index in channels for name in names.get((via == "Socket", index), [f"device {index}"])]
    return tuple(dict.fromkeys(via for via, _ in channels)), tuple(dict.fromkeys(devices))


def link_rate(nodes: Sequence[Node]) -> float:
    """Return how many bytes a second the node with the slowest links can send by their speeds. 0: unknown.

    A port counts once, though a Spark shows each as two devices.
    """
    rates = []
    for node in nodes:
        used = [device for device in used_devices(node).values() if device]
        ports = {Link("", device["netdev"], True, None).port: device["speed"] for device in used}
        rates.append(sum(ports.values()) * 1e6 / 8)
    return min(rates, default=0)


def wire_rate(ranks: Sequence[Rank]) -> float:
    """Return how many bytes a second went each way: busbw of nccl-tests (doc/PERFORMANCE.md, "AllReduce")."""
    return ranks[0].size / max(rank.seconds for rank in ranks) * 2 * (len(ranks) - 1) / len(ranks)


def fabric_summary(ranks: Sequence[Rank], links: float = 0) -> list[str]:
    """Return the route of each rank, and what was measured if all of them have finished. links: as link_rate."""
    said = [f"{rank.address} ({rank.hostname}): {rank.route}" for rank in ranks if not rank.error]
    if len(said) == len(ranks) > 1:
        rate, bus = ranks[0].size / max(rank.seconds for rank in ranks), wire_rate(ranks)
        said.append(
            f"All-reduce of {ranks[0].size // 2**20} MiB between {len(ranks)} nodes, {ranks[0].iterations} times: "
            f"{rate / 1e9:.2f} GB/s, on the wire {bus / 1e9:.2f} GB/s or {bus * 8 / 1e9:.1f} Gbit/s each way "
            f"(nccl-tests' algbw and busbw). One of 16 KiB takes {max(rank.latency for rank in ranks) * 1e6:.0f} µs."
        )
        for rank in filter(lambda rank: rank.copied, ranks):
            copies, computes = f"{rank.copied / 1e9:.0f} GB/s", f"{rank.computed / 1e12:.0f} TFLOP/s"
            said.append(f"{rank.address}: the GPU copies {copies} and computes {computes}.")
        if ranks[0].backend != "nccl":
            said.append("Without CUDA the ranks used gloo, which proves the network only, not RDMA and not NCCL.")
        elif not links:
            said.append("The speed of the RoCE devices is unknown, so the rate was not judged.")
    return said


def fabric_findings(ranks: Sequence[Rank], links: float = 0, worker: str = "inv worker") -> list[Finding]:
    """Return everything that is wrong, under the rule `fabric`. What only makes the model slow is a warning.

    links: as link_rate. worker: where to type a worker's line, and the line.
    """
    if len(ranks) < 2:
        return [Finding("fabric", f"Ray has one node, so there is no fabric to prove. Type {worker}")]
    found = []
    for rank in ranks:
        on_rdma, refuses = rank.backend == "nccl" and rank.hcas, True
        if rank.error:
            text = (
                f"the all-reduce did not finish: {rank.error}. On that node: ip -brief link; docker exec {CONTAINER} "
                "ls /dev/infiniband; and with an address of the other node's data plane: ping -c 3 ADDRESS"
            )
        elif not rank.cuda and any(other.cuda for other in ranks):
            text = f"torch finds no GPU in the container. On that node: docker exec {CONTAINER} nvidia-smi"
        elif on_rdma and (not rank.transports or "Socket" in rank.transports):
            went = "fell back to TCP" if rank.transports else "opened no channel, by its log"
            text = (
                f"RDMA was asked for (NCCL_IB_HCA={rank.hcas}), but NCCL {went}: {rank.route}. On that node: docker "
                f"exec {CONTAINER} ls /dev/infiniband; {NO_RDMA}"
            )
        elif on_rdma and rank.unused:
            refuses = False
            text = (
                f"NCCL used {', '.join(rank.devices)} and not {', '.join(rank.unused)}, though NCCL_IB_HCA lists all. "
            )
            text += "Part of the rate is missing. On that node: ip -brief link"
        else:
            continue
        found.append(Finding("fabric", f"{rank.address}: {text}", refuses))
    return found or [Finding("fabric", text, refuses=False) for text in _slow(ranks, links)]


def _slow(ranks: Sequence[Rank], links: float) -> Iterator[str]:
    """Owners of two Sparks report 160 to 198 Gbit/s, so 40 % of one cable or of two is a broken link or a small MTU."""
    if links and ranks[0].backend == "nccl" and wire_rate(ranks) < 0.4 * links:
        yield (
            f"the all-reduce moved {wire_rate(ranks) * 8e-9:.1f} of the links' {links * 8e-9:.0f} Gbit/s. On every "
            "node: ip link | grep mtu (9000 is right); then a cold boot (power off, wait, power on)."
        )
    for does, name, unit, size in (("copies", "copied", "GB/s", 1e9), ("computes", "computed", "TFLOP/s", 1e12)):
        slow, fast = (of(ranks, key=lambda rank: getattr(rank, name)) for of in (min, max))
        if getattr(slow, name) < 0.75 * getattr(fast, name):
            yield (
                f"{slow.address}: the GPU {does} {getattr(slow, name) / size:.0f} {unit}, that of {fast.address} "
                f"{getattr(fast, name) / size:.0f}. This Spark may be in a low-power state, which nvidia-smi does not "
                "show: shut it down, and pull its power supply from the wall for a minute."
            )
