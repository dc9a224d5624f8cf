"""The memory that a model takes of each node, computed before the model is loaded. Sizes are in bytes.

docs/memory.md has the formula, and the readings that it was compared with. The sources are engine/arg_utils.py and
v1/worker/utils.py of vLLM 0.21.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from cluster.finding import GIB, CannotKnow, Finding, vllm_version
from cluster.kv_cache import Demand, Layout, Shape, cache_layout, json_field, read_demand, read_shape
from cluster.node import HF_CACHE
from cluster.repository import ROOT
from cluster.server import serve_words
from cluster.settings import ModelSettings

# Activations were measured with so many batched tokens.
MEASURED_BATCH = 8192
# The sizes that a profile's JSON file gives in GiB, with their defaults. A server takes 8.0 GiB outside of its
# reservation: 3.0 of CUDA context and NCCL, read on an H100, and 5.0 for three Python processes, read without a GPU.
MEASURED = {"weights": None, "mtp_weights": 0, "activations": None, "mtp_activations": 0, "graphs": None,
            "outside": 8.0}  # fmt: skip


# --- The model -------------------------------------------------------------------------------------------------------


def checkpoint_folder(hf_cache: Path, checkpoint: str) -> Path | None:
    """Return the folder of a checkpoint on this host: the snapshot that refs/main names, or the folder of a path."""
    if checkpoint.startswith("/"):
        return Path(checkpoint.replace(f"{HF_CACHE}/", f"{hf_cache}/", 1))
    folder = hf_cache / "hub" / f"models--{checkpoint.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / "snapshots" / revision if revision.isalnum() else None


def read_model(profile: Path, folder: Path | None = None) -> tuple[Shape, dict[str, int]]:
    """Read the shape of a model, and the sizes that MEASURED names, in bytes.

    profile: the JSON file beside the model's profile. folder: the checkpoint's folder, whose config.json and index of
    the weights count before the profile. Raises CannotKnow with the name of the file and of the key at fault.
    """
    file = profile
    try:
        kept = json.loads(file.read_text())
        measured = {name: json_field(kept, f"{name}_gib", read=_gib, default=size) for name, size in MEASURED.items()}
        config = kept.get("config")
        if folder and (folder / "config.json").is_file():
            file = folder / "config.json"
            config = json.loads(file.read_text())
        shape = read_shape(config)
        if folder and (folder / "model.safetensors.index.json").is_file():
            file = folder / "model.safetensors.index.json"
            index = json.loads(file.read_text())
            measured["weights"] = json_field(index["metadata"], "total_size", read=lambda size: _gib(size / GIB))
            if any(name.startswith("mtp.") for name in index.get("weight_map", ())):
                measured["mtp_weights"] = 0
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CannotKnow(f"{file} is not understood: {error}.") from None
    return shape, measured


def _gib(found: float) -> int:
    if not 0 <= found < 10**6:
        raise ValueError
    return int(found * GIB)


# --- The memory of one node ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeMemory:
    """MemTotal and MemAvailable of a node in bytes, None if the node did not say."""

    name: str
    total: int | None
    available: int | None


# One of the article's nodes: of 121.7 GiB the system, Docker and an idle Ray had taken 4.3. `plan` computes with this.
SPARK = NodeMemory("a Spark", int(121.7 * GIB), int(117.4 * GIB))


@dataclass(frozen=True)
class Budget:
    """The memory of one node with the model on it.

    vLLM takes `reservation` whatever the context: weights, activations, graphs, and the cache from what they leave.
    `outside` comes on top. `layout` is None where the cache is not computed. `sequences` are decoded at once.
    """

    node: NodeMemory
    demand: Demand
    layout: Layout | None
    weights: int
    activations: int
    graphs: int
    outside: int
    reservation: int
    sequences: int

    @property
    def fixed(self) -> int:
        """The part of the reservation that the cache cannot have."""
        return self.weights + self.activations + self.graphs

    @property
    def cache(self) -> int:
        """The part of the reservation that is left for the cache. Below 0 there is none."""
        return self.reservation - self.fixed

    @property
    def left(self) -> int:
        """The memory that the host keeps once the server is up."""
        return (self.node.available or 0) - self.reservation - self.outside


def node_budget(shape: Shape, measured: Mapping[str, int], demand: Demand, node: NodeMemory) -> Budget:
    """Compute the memory of one node. Raises CannotKnow where the model's cache cannot be computed.

    Weights and activations are allowances. The cache is exact for the memory that they leave. Activations grow with the
    batched tokens and never shrink below the measured ones: nobody has measured which part of them would stay.
    """
    # vLLM's defaults for an API server, by the memory of the device.
    sequences, batched = (1024, 8192) if (node.total or 0) >= 70 * GIB else (256, 2048)
    sequences = demand.sequences or sequences
    batched = demand.batched or min(batched, sequences * demand.length)
    drafts = bool(demand.drafts)
    activations = measured["activations"] + drafts * measured["mtp_activations"]
    return Budget(
        node,
        demand,
        layout=cache_layout(shape, demand) if demand.pp == 1 else None,
        weights=ceil((measured["weights"] + drafts * measured["mtp_weights"]) / (demand.tp * demand.pp)),
        activations=activations * max(batched, MEASURED_BATCH) // MEASURED_BATCH,
        graphs=0 if demand.eager else measured["graphs"],
        outside=measured["outside"],
        reservation=ceil((node.total or 0) * demand.utilization),
        sequences=demand.sequences or min(sequences, batched),
    )


def budget_rows(budget: Budget) -> list[tuple[str, str]]:
    """Return the computation for one node as rows of a table: a label, and a size in GiB."""
    node, layout, length = budget.node, budget.layout, budget.demand.length
    cache = [("KV cache (its tokens are not computed)", in_gib(budget.cache))]
    if layout:
        times = max(budget.cache, 0) // layout.block_bytes / layout.needed(length)
        cache = [
            (f"KV cache: {int(times * length):,} tokens, {times:.2f} x {length:,}", in_gib(budget.cache)),
            (f"  of it {length:,} tokens take", in_gib(layout.least(length))),
        ]
    return [
        ("weights on this rank", in_gib(budget.weights)),
        ("activations (allowance)", in_gib(budget.activations)),
        ("CUDA graphs (allowance)", in_gib(budget.graphs)),
        *cache,
        (f"reserved by vLLM: {budget.demand.utilization:g} x {in_gib(node.total)}", in_gib(budget.reservation)),
        ("server outside it (allowance)", in_gib(budget.outside)),
        ("available now", in_gib(node.available)),
        ("left for the host", in_gib(None if None in (node.total, node.available) else budget.left)),
    ]


def in_gib(size: int | None) -> str:
    """Return a size in GiB with one decimal, or `unknown`."""
    return "unknown" if size is None else f"{size / GIB:.1f}"


# --- The rules -------------------------------------------------------------------------------------------------------


def memory_budgets(
    settings: ModelSettings, nodes: Sequence[NodeMemory], vllm: str, hf_cache: Path | None
) -> tuple[list[Budget], list[Finding]]:
    """Compute the memory of each node with the model on it, and find where that is too little.

    vllm: the version that will run. hf_cache: the Hugging Face folder of this host, None if it must not be read.
    """
    model = settings.model
    folder = checkpoint_folder(hf_cache, settings["MODEL_CKPT"]) if hf_cache else None
    try:
        demand = read_demand(serve_words(settings), vllm_version(vllm))
        shape, measured = read_model(ROOT / model.folder / f"{model.size}.json", folder)
        budgets = [node_budget(shape, measured, demand, node) for node in nodes]
    except CannotKnow as error:
        return [], [Finding("memory-unknown", f"The memory that {model.name} takes is unknown. {error}")]
    found = [finding for budget in budgets for finding in memory_findings(budget, settings)]
    if demand.pp > 1:
        text = (
            f"The KV cache is not computed for --pipeline-parallel-size {demand.pp}. The log of the load has its size."
        )
        found.insert(0, Finding("memory-unknown", text, refuses=False))
    return budgets, found


def memory_findings(budget: Budget, settings: ModelSettings) -> list[Finding]:
    """Return everything that is wrong with the memory of one node."""
    node = budget.node
    if not node.total or node.available is None:
        missing = "MemAvailable" if node.total else "MemTotal"
        text = f"{missing} of {node.name} is unknown, so nobody can say that the model fits. Type there: free -g"
        return [Finding("memory-unknown", text)]
    found = [_host(budget, settings), _context(budget, settings) or _sequences(budget, settings)]
    return [finding for finding in found if finding]


def _host(budget: Budget, settings: ModelSettings) -> Finding | None:
    """The host must keep MEM_FLOOR_GIB. The article's nodes hung when they had too little, and lost their power."""
    floor, warn = (float(settings[name]) * GIB for name in ("MEM_FLOOR_GIB", "MEM_WARN_GIB"))
    low = budget.left < floor
    if not low and budget.left >= warn:
        return None
    limit = "MEM_FLOOR_GIB" if low else "MEM_WARN_GIB"
    share = _highest_share(budget, warn) or (_highest_share(budget, floor) if low else None)
    advice = f"{_util(share)} {settings.launch_line}" if share else "free -g; end what else runs there, and try again"
    text = (
        f"{budget.node.name} would keep {budget.left / GIB:.2f} GiB, less than {limit} ({float(settings[limit]):g}): "
        f"{in_gib(budget.node.available)} are available now, vLLM reserves {in_gib(budget.reservation)}, and its "
        f"processes take about {in_gib(budget.outside)}. Type: {advice}"
    )
    return Finding("memory-floor" if low else "memory-low", text, refuses=low)


def _context(budget: Budget, settings: ModelSettings) -> Finding | None:
    """The longest sequence must fit into the cache. vLLM checks this only after minutes of loading."""
    layout, length = budget.layout, budget.demand.length
    if not layout or (largest := layout.largest(budget.cache)) >= length:
        return None
    least = layout.least(length)
    fits = f"{settings.launch_line} --max-len {largest}" if largest else "none, whatever the --max-len"
    text = (
        f"{length:,} tokens need {least / GIB:.2f} GiB of KV cache, and GPU_MEM_UTIL {budget.demand.utilization:g} "
        f"leaves {budget.cache / GIB:.2f} on {budget.node.name}. The largest that fits: {fits}. "
        f"{_more_cache(budget, least, settings)}"
    )
    return Finding("memory-context", text)


def _sequences(budget: Budget, settings: ModelSettings) -> Finding | None:
    """Each decoded sequence needs a block for its state if decoding is captured in CUDA graphs.

    vLLM 0.20 to 0.32 check this after the load: "exceeds available Mamba cache blocks" in config/compilation.py.
    """
    layout = budget.layout
    if not layout or not layout.states or budget.demand.eager:
        return None
    blocks = max(budget.cache, 0) // layout.block_bytes
    if blocks >= budget.sequences:
        return None
    default = " (MAX_NUM_SEQS is empty: this is vLLM's default for 70 GiB or more; a GB10 may get 256)"
    text = (
        f"vLLM would refuse {budget.sequences} sequences{'' if budget.demand.sequences else default} after loading: "
        f"{budget.node.name} has {blocks} cache blocks, and each sequence needs one. "
        f"Type: MAX_NUM_SEQS={blocks} {settings.launch_line}. "
        f"{_more_cache(budget, budget.sequences * layout.block_bytes, settings)}"
    )
    return Finding("memory-sequences", text)


def _more_cache(budget: Budget, cache: int, settings: ModelSettings) -> str:
    """Return the GPU_MEM_UTIL that leaves so much cache, or the reason why none does."""
    share = least_utilization(budget, cache)
    if share > float(settings["GPU_MEM_UTIL_MAX"]):
        return f"No GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX ({float(settings['GPU_MEM_UTIL_MAX']):g}) would do."
    left = (budget.node.available or 0) - ceil((budget.node.total or 0) * share) - budget.outside
    if left < float(settings["MEM_FLOOR_GIB"]) * GIB:
        return f"{_util(share)} would do, but leave the host {in_gib(left)} GiB."
    return f"Or type: {_util(share)} {settings.launch_line}"


def least_utilization(budget: Budget, cache: int) -> float:
    """Return the lowest GPU_MEM_UTIL, in hundredths, that leaves so many bytes of cache. Above 1 none does."""
    total = budget.node.total or 1
    hundredths = max(1, (budget.fixed + cache) * 100 // total - 1)
    while ceil(total * (hundredths / 100)) - budget.fixed < cache:
        hundredths += 1
    return hundredths / 100


def _highest_share(budget: Budget, keep: float) -> float | None:
    """Return the highest GPU_MEM_UTIL that leaves the host so many bytes, None if the cache would be too small."""
    total, layout = budget.node.total or 1, budget.layout
    share = int(min((budget.node.available or 0) - budget.outside - keep, total) * 100 // total) / 100
    cache = layout.least(budget.demand.length) if layout else 0
    if layout and layout.states and not budget.demand.eager:
        cache = max(cache, budget.sequences * layout.block_bytes)
    return share if share >= least_utilization(budget, cache) else None


def _util(share: float) -> str:
    return f"GPU_MEM_UTIL={share:.2f}"
