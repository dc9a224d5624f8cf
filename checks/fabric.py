"""Whether the network between the nodes is what it should be, proved by using it: one all-reduce, timed and logged.

The data-plane's own transport and rate, which no list of devices tells: NCCL falls back to TCP without a word. It needs
every node's GPU and 256 MiB on each, so never while a server is serving: whoever calls it has to look first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from invoke import Exit

from checks.finding import Finding
from checks.nccl_log import SOCKET
from checks.rank import Rank, read
from cluster.node import CONTAINER, IN_SHELL
from host import engine

if TYPE_CHECKING:
    from docker.models.containers import Container

_ASK, _ALL_REDUCE = (Path(__file__).with_name(name) for name in ("ask_fabric.py", "all_reduce.py"))
SECONDS = 60
BYTES = 256 * 2**20


@dataclass(frozen=True)
class Fabric:
    """What all ranks said, the head's first."""

    ranks: Sequence[Rank]

    @property
    def whole(self) -> bool:
        """Whether every one of several nodes has answered: only then there is a rate."""
        return len(self.ranks) > 1 and not any(rank.error for rank in self.ranks)

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes a second: the size over the slowest rank's time."""
        return self.ranks[0].size / max(rank.seconds for rank in self.ranks)

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second that each node's network carried in each direction: 2(n-1)/n times the algorithm's.

        Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md, "AllReduce".
        """
        return self.algorithm_bandwidth * 2 * (len(self.ranks) - 1) / len(self.ranks)


def ask(head: Container, size: int = BYTES) -> Fabric:
    """All-reduce so many bytes (at most BYTES) between all alive nodes, in at most SECONDS.

    Nothing is left in the containers; a Ctrl-C here leaves it to end by itself, within SECONDS. Not while a server is
    serving. Raises Exit if Ray could not be asked.
    """
    source = ("python3", "-c", _ASK.read_text(), str(min(size, BYTES)), _ALL_REDUCE.read_text())
    answer = engine.ask(head, "/bin/bash", "-c", IN_SHELL, "bash", "timeout", "--kill-after=2", str(SECONDS), *source)
    try:
        return Fabric(tuple(read(told) for told in json.loads(answer.splitlines()[-1])))
    except (ValueError, IndexError, TypeError, KeyError):
        raise Exit(f"Ray's answer in {head.name} is no list of ranks: {answer[-200:]!r}") from None


def findings(fabric: Fabric) -> list[Finding]:
    """All that is wrong, under the rule `fabric`; a device that was not used is a warning."""
    if len(fabric.ranks) < 2:
        return [Finding("fabric", "Ray has one node, and there is no fabric to prove. On the other node: inv worker")]
    silent = [_silent(rank) for rank in fabric.ranks if rank.error]
    return silent or [*_unlike(fabric.ranks), *_tcp(fabric.ranks), *_idle(fabric.ranks)]


def summary(fabric: Fabric) -> list[str]:
    """What each rank went over, and the rate, for a person."""
    said = [f"{rank.address} ({rank.hostname}): {_over(rank)}" for rank in fabric.ranks if not rank.error]
    if not fabric.whole:
        return said
    first, bus = fabric.ranks[0], fabric.bus_bandwidth
    said.append(
        f"All-reduce of {first.size // 2**20} MiB between {len(fabric.ranks)} nodes, {first.iterations} times: "
        f"{fabric.algorithm_bandwidth / 1e9:.2f} GB/s, on the wire {bus / 1e9:.2f} GB/s or {bus * 8 / 1e9:.1f} Gbit/s "
        "each way (nccl-tests' algbw and busbw)."
    )
    if first.backend != "nccl":
        said.append("Without CUDA it was gloo: this proves the network only, neither RDMA nor NCCL.")
    return said


def _silent(rank: Rank) -> Finding:
    return Finding(
        "fabric",
        f"{rank.address} ({rank.hostname}) did not finish: {rank.error}. On that node: ip -brief link; then, with "
        f"the other's data-plane address: ping -c 3 ADDRESS; and: docker exec {CONTAINER} ls /dev/infiniband",
    )


def _unlike(ranks: Sequence[Rank]) -> Iterator[Finding]:
    if len({rank.cuda for rank in ranks}) > 1:
        lack = ", ".join(rank.address for rank in ranks if not rank.cuda)
        text = f"torch finds no GPU in the container of {lack}. On that node: docker exec {CONTAINER} nvidia-smi"
        yield Finding("fabric", text)
    if len({rank.transport.names for rank in ranks}) > 1:
        told = ", ".join(f"{rank.address} chose {rank.transport}" for rank in ranks)
        yield Finding("fabric", f"The ranks chose different transports: {told}. Compare: inv check; {_AGAIN}")


def _tcp(ranks: Sequence[Rank]) -> Iterator[Finding]:
    for rank in ranks:
        if rank.backend == "nccl" and rank.wants_rdma and not rank.transport.rdma:
            went = "fell back to TCP" if SOCKET in rank.transport.names else "opened no channel that its log tells"
            yield Finding(
                "fabric",
                f"{rank.address}: RDMA was asked for (NCCL_IB_HCA={rank.environment['NCCL_IB_HCA']}), but NCCL {went}: "
                f"{rank.transport}. On that node: docker exec {CONTAINER} ls /dev/infiniband; cold boot if it is gone; "
                f"{_AGAIN} TCP on purpose: RDMA_HCAS= on every node.",
            )


def _idle(ranks: Sequence[Rank]) -> Iterator[Finding]:
    for rank in ranks:
        if rank.backend == "nccl" and rank.transport.rdma and rank.unused:
            yield Finding(
                "fabric",
                f"{rank.address}: NCCL used {', '.join(rank.transport.devices)} and not {', '.join(rank.unused)}, "
                "which NCCL_IB_HCA lists: part of the rate is missing. On that node: ip -brief link",
                refuses=False,
            )


def _over(rank: Rank) -> str:
    if rank.backend == "nccl":
        return str(rank.transport)
    return f"{rank.backend} on {rank.environment.get('GLOO_SOCKET_IFNAME', 'any interface')}"


_AGAIN = "then bring the node up again."
