"""A proof of the network between the nodes: one all-reduce, which is timed and logged.

A list of devices proves nothing, because NCCL falls back to TCP without an error. The all-reduce needs 256 MiB on each
node's GPU, so the caller makes sure first that no server runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.finding import Finding
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

    `transports` has NCCL's names for the channels between the nodes (`Socket` is TCP). `devices` are the devices that
    these channels use.
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

    @property
    def route(self) -> str:
        if self.backend == "gloo":
            return f"gloo on {self.environment.get('GLOO_SOCKET_IFNAME', 'any interface')}"
        over = " and ".join(f"NET/{name}" for name in self.transports)
        return f"{over} on {', '.join(self.devices)}" if over else "no network"

    @property
    def hcas(self) -> str:
        """The value of NCCL_IB_HCA: the RoCE devices that NCCL must use. Empty if NCCL must use TCP."""
        return "" if self.environment.get("NCCL_IB_DISABLE") == "1" else self.environment.get("NCCL_IB_HCA", "")

    @property
    def unused(self) -> list[str]:
        """The devices of NCCL_IB_HCA that no channel used. A name there is a prefix; `^` lists devices to avoid."""
        unknown = self.hcas.startswith("^") or any(device.startswith("device ") for device in self.devices)
        listed = [] if unknown else self.hcas.removeprefix("=").split(",")
        names = [name.partition(":")[0] for name in listed if name]
        return [name for name in names if not any(used.startswith(name) for used in self.devices)]


def ask_fabric(head: Container) -> list[Rank]:
    """Time an all-reduce between all alive nodes, in at most SECONDS, and return the ranks, the head's first.

    Nothing stays in the containers, and the all-reduce ends by itself after a Ctrl-C here. Raises Exit if Ray could not
    be asked.
    """
    return ask_inside(head, SECONDS, lambda told: [read_rank(one) for one in told], "python3", f"{INSIDE}/fabric.py")


def read_rank(told: dict[str, Any]) -> Rank:
    where = {"address": told["address"], "hostname": told["hostname"]}
    if "error" in told:
        return Rank(**where, error=told["error"])
    transports, devices = read_log(told["log"])
    rank = Rank(**where, environment=told["environment"], transports=transports, devices=devices)
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


def fabric_summary(ranks: Sequence[Rank]) -> list[str]:
    """Return the route of each rank, and the rate if all of them have finished."""
    said = [f"{rank.address} ({rank.hostname}): {rank.route}" for rank in ranks if not rank.error]
    if len(said) == len(ranks) > 1:
        # https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, "AllReduce": algbw and busbw.
        rate = ranks[0].size / max(rank.seconds for rank in ranks)
        bus = rate * 2 * (len(ranks) - 1) / len(ranks)
        said.append(
            f"All-reduce of {ranks[0].size // 2**20} MiB between {len(ranks)} nodes, {ranks[0].iterations} times: "
            f"{rate / 1e9:.2f} GB/s, on the wire {bus / 1e9:.2f} GB/s or {bus * 8 / 1e9:.1f} Gbit/s each way "
            "(nccl-tests' algbw and busbw)."
        )
        if ranks[0].backend != "nccl":
            said.append("Without CUDA the ranks used gloo, which proves the network only, not RDMA and not NCCL.")
    return said


def fabric_findings(ranks: Sequence[Rank]) -> list[Finding]:
    """Return everything that is wrong, under the rule `fabric`. A device that was not used is a warning."""
    if len(ranks) < 2:
        return [Finding("fabric", "Ray has one node, so there is no fabric to prove. On the other node: inv worker")]
    found = []
    for rank in ranks:
        on_rdma, refuses = rank.backend == "nccl" and rank.hcas, True
        if rank.error:
            text = (
                f"the all-reduce did not finish: {rank.error}. On that node: ip -brief link; then, with the other's "
                f"data-plane address: ping -c 3 ADDRESS; and: docker exec {CONTAINER} ls /dev/infiniband"
            )
        elif not rank.cuda and any(other.cuda for other in ranks):
            text = f"torch finds no GPU in the container. On that node: docker exec {CONTAINER} nvidia-smi"
        elif on_rdma and (not rank.transports or "Socket" in rank.transports):
            went = "fell back to TCP" if rank.transports else "opened no channel, by its log"
            text = (
                f"RDMA was asked for (NCCL_IB_HCA={rank.hcas}), but NCCL {went}: {rank.route}. On that node: docker "
                f"exec {CONTAINER} ls /dev/infiniband; if it is gone, a cold boot; then bring the node up again. TCP "
                "on purpose: RDMA_HCAS= on every node."
            )
        elif on_rdma and rank.unused:
            refuses = False
            text = (
                f"NCCL used {', '.join(rank.devices)} and not {', '.join(rank.unused)}, which NCCL_IB_HCA lists, so "
                "part of the rate is missing. On that node: ip -brief link"
            )
        else:
            continue
        found.append(Finding("fabric", f"{rank.address}: {text}", refuses))
    return found
