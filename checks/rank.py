"""One node's part in the all-reduce that proves the fabric, as it told it."""

import json
from dataclasses import dataclass, field
from typing import Any

from checks import nccl_log
from checks.nccl_log import Transport

# timeout(1) sends KILL to its own process too: Python says -9 of it, and a shell 137.
_KILLED = (-9, 137)


@dataclass(frozen=True)
class Rank:
    """One node's part: `error` says why it has none; sizes in bytes, `seconds` for one all-reduce."""

    address: str
    hostname: str
    error: str = ""
    backend: str = ""
    cuda: bool = False
    size: int = 0
    iterations: int = 0
    seconds: float = 0
    environment: dict[str, str] = field(default_factory=dict)
    transport: Transport = field(default_factory=Transport)

    @property
    def hcas(self) -> list[str]:
        """The RoCE devices that NCCL was told to use, by name; none where it was told to leave some out, or TCP."""
        told = self.environment.get("NCCL_IB_HCA", "")
        if self.environment.get("NCCL_IB_DISABLE") == "1" or told.startswith("^"):
            return []
        return [item.partition(":")[0] for item in told.removeprefix("=").split(",") if item]

    @property
    def wants_rdma(self) -> bool:
        """Whether the container was told to use RDMA."""
        return bool(self.environment.get("NCCL_IB_HCA")) and self.environment.get("NCCL_IB_DISABLE") != "1"

    @property
    def unused(self) -> list[str]:
        """Those of `hcas` that no channel went over; NCCL takes each as the beginning of a name."""
        return [hca for hca in self.hcas if not any(used.startswith(hca) for used in self.transport.devices)]


def read(told: dict[str, Any]) -> Rank:
    """A rank from what `ask_fabric.py` says of it."""
    where = {"address": told["address"], "hostname": told["hostname"]}
    if "error" in told:
        return Rank(**where, error=told["error"])
    chosen = nccl_log.transport(told["log"])
    known = {**where, "environment": told["environment"], "transport": chosen}
    if told["status"] != 0:
        return Rank(**known, error=_why(told["status"], told["log"], chosen))
    return Rank(**known, **json.loads(told["told"].splitlines()[-1]))


def _why(status: int, log: str, chosen: Transport) -> str:
    over = f", over {chosen}" if chosen.names else ""
    return f"{'it hung' if status in _KILLED else f'status {status}'}{over}: {nccl_log.complaint(log)[:300]}"
