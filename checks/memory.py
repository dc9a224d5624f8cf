"""What a model takes of one node's memory, before it is loaded. Everything here is in bytes unless it says GiB."""

from dataclasses import dataclass
from math import ceil

from checks.cache import Layout, layout
from checks.demand import Demand
from checks.footprint import GIB, Footprint
from checks.shape import Shape

# vLLM 0.21.0, engine/arg_utils.py, get_batch_defaults: what it takes for an API server that is not told, by the
# device's memory as NVML tells it. On a GB10 NVML does not, so by its source it takes the smaller pair there.
LARGE_DEVICE = 70 * GIB
LARGE_DEFAULTS = (1024, 8192)
SMALL_DEFAULTS = (256, 2048)
MEASURED_BATCH = 8192


@dataclass(frozen=True)
class Host:
    """A node's memory: MemTotal and MemAvailable in bytes, None if unknown.

    `nvml`: whether NVML tells its device's memory; None if nobody asked, then the safe one is assumed.
    """

    name: str
    total: int | None
    available: int | None
    nvml: bool | None = None


# One of the article's: 121.7 GiB, of which system, Docker and an idle Ray had taken 4.3 (its 18.1 GiB left at 0.75,
# without OUTSIDE_GIB). What `plan` shows where no node can be asked.
SPARK = Host("a Spark", int(121.7 * GIB), int(117.4 * GIB))


@dataclass(frozen=True)
class Budget:
    """One node's memory with the model on it.

    `reservation` is what vLLM takes whatever the context: weights, activations and graphs (an allowance), and `cache`,
    the rest. `context` is the least cache with which vLLM starts for one sequence of the asked length. `outside` comes
    on top of the reservation, and `left` is what the host then has. `assumed` says that sequences is vLLM's default.
    """

    host: Host
    demand: Demand
    layout: Layout
    weights: int
    activations: int
    graphs: int
    outside: int
    reservation: int
    context: int
    sequences: int
    batched: int
    assumed: bool

    @property
    def fixed(self) -> int:
        """The part of the reservation that no KV cache can have."""
        return self.weights + self.activations + self.graphs

    @property
    def cache(self) -> int:
        """The part of the reservation that is left for the KV cache; below 0 if there is none."""
        return self.reservation - self.fixed

    @property
    def blocks(self) -> int:
        """The KV cache's blocks."""
        return self.layout.blocks(self.cache)

    @property
    def largest(self) -> int:
        """The largest --max-model-len that fits in tokens, exactly; 0 if none does."""
        return self.layout.largest(self.blocks)

    @property
    def left(self) -> int:
        """What the host has left once the server is up."""
        return (self.host.available or 0) - self.reservation - self.outside


def budget(shape: Shape, footprint: Footprint, demand: Demand, host: Host) -> Budget:
    """The memory of one node under a demand; raises CannotKnow where the model's cache cannot be reckoned.

    Weights: their even share, which pipeline stages only roughly have. Activations: measured at 8192 batched tokens and
    scaled up with more, never down, since nobody has measured what part of them stays. Both are allowances; the cache
    is exact for what they leave.
    """
    cut = layout(shape, demand)
    drafts = bool(demand.speculative)
    sequences, batched = _defaults(demand, host)
    activations = footprint.activations + drafts * footprint.mtp_activations
    return Budget(
        host=host,
        demand=demand,
        layout=cut,
        weights=ceil((footprint.weights + drafts * footprint.mtp_weights) / (demand.tp * demand.pp)),
        activations=activations * max(batched, MEASURED_BATCH) // MEASURED_BATCH,
        graphs=0 if demand.eager else footprint.graphs,
        outside=footprint.outside,
        reservation=reserved(host.total or 0, demand.utilization),
        context=cut.least(demand.length),
        sequences=sequences,
        batched=batched,
        assumed=demand.sequences is None,
    )


def reserved(total: int, utilization: float) -> int:
    """What vLLM reserves: its request_memory, v1/worker/utils.py."""
    return ceil(total * utilization)


def rows(found: Budget) -> list[tuple[str, str]]:
    """The arithmetic of one node for a table: what it is, and how much of it in GiB."""
    tokens = found.layout.tokens(found.blocks, found.demand.length)
    times = found.layout.concurrency(found.blocks, found.demand.length)
    known = found.host.available is not None and found.host.total is not None
    return [
        ("weights on this rank", gib(found.weights)),
        ("activations (allowance)", gib(found.activations)),
        ("CUDA graphs (allowance)", gib(found.graphs)),
        (f"KV cache: {tokens:,} tokens, {times:.2f} x {found.demand.length:,}", gib(found.cache)),
        (f"  of it {found.demand.length:,} tokens take", gib(found.context)),
        (f"reserved by vLLM: {found.demand.utilization:g} x {gib(found.host.total)}", gib(found.reservation)),
        ("server outside it (allowance)", gib(found.outside)),
        ("available now", gib(found.host.available)),
        ("left for the host", gib(found.left if known else None)),
    ]


def gib(size: int | None) -> str:
    """Bytes in GiB with one decimal, or what nobody knows."""
    return "unknown" if size is None else f"{size / GIB:.1f}"


def _defaults(demand: Demand, host: Host) -> tuple[int, int]:
    """Sequences and batched tokens, vLLM's own where the line leaves them to it."""
    large = (host.total or 0) >= LARGE_DEVICE and host.nvml is not False
    sequences, batched = LARGE_DEFAULTS if large else SMALL_DEFAULTS
    sequences = demand.sequences or sequences
    batched = demand.batched or min(batched, sequences * demand.length)
    return demand.sequences or min(sequences, batched), batched
