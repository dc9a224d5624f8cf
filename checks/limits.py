"""The memory gate: which budgets are refused, which are warned of, and the command that would do."""

from collections.abc import Iterator
from dataclasses import dataclass

from checks.finding import Finding
from checks.footprint import GIB
from checks.memory import Budget, gib, reserved


@dataclass(frozen=True)
class Limits:
    """GiB that a host should keep (`warn`, MEM_WARN_GIB) and must keep (`floor`, MEM_FLOOR_GIB) once the model serves.

    `most` is GPU_MEM_UTIL_MAX; `launch` is the command that the person typed, such as `inv launch --model nemotron`.
    """

    warn: float
    floor: float
    most: float
    launch: str


def findings(found: Budget, limits: Limits) -> list[Finding]:
    """All that is wrong with one node's budget; a node whose memory is unknown is refused, and no more is said."""
    if not found.host.total or found.host.available is None:
        unknown = "MemAvailable" if found.host.total else "MemTotal"
        text = f"{unknown} of {found.host.name} is unknown, so nobody can say that the model fits. Type there: free -g"
        return [Finding("memory-unknown", text)]
    return [*_left(found, limits), *_context(found, limits), *_sequences(found, limits)]


def least_utilization(found: Budget, cache: int) -> float:
    """The least GPU_MEM_UTIL in whole hundredths that leaves so many bytes of KV cache; above 1 if none does."""
    hundredths = max(1, (found.fixed + cache) * 100 // found.host.total - 1)
    while reserved(found.host.total, hundredths / 100) - found.fixed < cache:
        hundredths += 1
    return hundredths / 100


def _left(found: Budget, limits: Limits) -> Iterator[Finding]:
    """What the host keeps. The article's nodes hung when it was too little, and had to be power-cycled."""
    floor, warn = limits.floor * GIB, limits.warn * GIB
    low = found.left < floor
    if found.left >= warn and not low:
        return
    name = f"MEM_FLOOR_GIB ({limits.floor:g})" if low else f"MEM_WARN_GIB ({limits.warn:g})"
    lower = _lower(found, warn) or (_lower(found, floor) if low else None)
    do = f"{_util(lower)} {limits.launch}" if lower else "see what else runs there: free -g; then end it, and try again"
    text = (
        f"{found.host.name} would keep {found.left / GIB:.2f} GiB, less than {name}: it has "
        f"{gib(found.host.available)} now, vLLM reserves {gib(found.reservation)} and its processes take about "
        f"{gib(found.outside)}. Type: {do}"
    )
    yield Finding("memory-floor" if low else "memory-low", text, refuses=low)


def _context(found: Budget, limits: Limits) -> Iterator[Finding]:
    """The longest sequence has to fit in the KV cache: vLLM's own check, after minutes of loading."""
    length = found.demand.length
    if found.largest >= length:
        return
    shorter = f"{limits.launch} --max-len {found.largest}" if found.largest else "none, whatever the --max-len"
    text = (
        f"{length:,} tokens need {found.context / GIB:.2f} GiB of KV cache, and GPU_MEM_UTIL "
        f"{found.demand.utilization:g} leaves {found.cache / GIB:.2f} on {found.host.name}. "
        f"The largest that fits: {shorter}. {_more(found, found.context, limits)}"
    )
    yield Finding("memory-context", text)


def _sequences(found: Budget, limits: Limits) -> Iterator[Finding]:
    """Each decoded sequence needs a block for its state: "exceeds available Mamba cache blocks", after the load.

    vLLM 0.20 to 0.32, config/compilation.py; only where decoding is captured in CUDA graphs.
    """
    if not found.layout.states or found.demand.eager or found.blocks >= found.sequences:
        return
    if found.largest < found.demand.length:
        return
    whose = (
        " (MAX_NUM_SEQS is empty: vLLM's default where NVML tells of 70 GiB or more, probably 256 on a GB10)"
        if found.assumed
        else ""
    )
    cache = found.sequences * found.layout.block_bytes
    text = (
        f"vLLM would refuse {found.sequences} sequences{whose} after loading: {found.host.name} has {found.blocks} "
        f"cache blocks, and each needs one. Type: MAX_NUM_SEQS={found.blocks} {limits.launch}. "
        f"{_more(found, cache, limits)}"
    )
    yield Finding("memory-sequences", text)


def _more(found: Budget, cache: int, limits: Limits) -> str:
    """The GPU_MEM_UTIL that would do, or that none does: it has to leave the host its floor as well."""
    least = least_utilization(found, cache)
    if least > limits.most:
        return f"No GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX ({limits.most:g}) would do."
    left = found.host.available - reserved(found.host.total, least) - found.outside
    if left < limits.floor * GIB:
        return f"{_util(least)} would do, but leave the host {gib(left)} GiB."
    return f"Or type: {_util(least)} {limits.launch}"


def _lower(found: Budget, keep: float) -> float | None:
    """The most GPU_MEM_UTIL in whole hundredths that leaves the host so many bytes and still holds the context."""
    room = found.host.available - found.outside - keep
    hundredths = int(min(room, found.host.total) * 100 // found.host.total)
    least = least_utilization(found, max(found.context, _states(found)))
    return hundredths / 100 if hundredths / 100 >= least else None


def _states(found: Budget) -> int:
    """The cache that the sequences' states need before a graph is captured."""
    needed = found.layout.states and not found.demand.eager
    return found.sequences * found.layout.block_bytes if needed else 0


def _util(share: float) -> str:
    return f"GPU_MEM_UTIL={share:.2f}"
