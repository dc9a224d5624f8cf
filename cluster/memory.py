"""The memory that a model takes of each node, computed before the model is loaded. Sizes are in bytes.

docs/memory.md has the formula, and compares it with measured values. The formula comes from engine/arg_utils.py and
v1/worker/utils.py of vLLM 0.21.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from cluster.finding import GIB, CannotKnow, Finding, vllm_version
from cluster.kv_cache import STATE, Demand, Layout, Shape, cache_layout, json_field, read_demand, read_shape
from cluster.node import HF_CACHE
from cluster.repository import ROOT
from cluster.server import serve_words
from cluster.settings import ModelSettings

# The sizes that a profile's JSON file gives in GiB, and their defaults. `outside` is what a server takes beside its
# reservation: 3.0 for CUDA context and NCCL, read on an H100, and 5.0 for three Python processes, read without a GPU.
MEASURED = {"weights": None, "mtp_weights": 0, "activations": None, "mtp_activations": 0, "graphs": None,
            "outside": 8.0}  # fmt: skip


# --- The model -------------------------------------------------------------------------------------------------------


def checkpoint_folder(hf_cache: Path, checkpoint: str) -> Path | None:
    """Return the checkpoint's folder on this host: for a path that path, otherwise the snapshot in refs/main."""
    if checkpoint.startswith("/"):
        return Path(checkpoint.replace(f"{HF_CACHE}/", f"{hf_cache}/", 1))
    folder = hf_cache / "hub" / f"models--{checkpoint.replace('/', '--')}"
    try:
        return folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_model(profile: Path, folder: Path | None = None) -> tuple[Shape, dict[str, int]]:
    """Read the shape of a model, and the sizes of MEASURED in bytes.

    profile: the JSON file beside the model's profile. folder: the checkpoint's folder. If it has a config.json or an
    index of the weights, that file is read in place of the profile. Raises CannotKnow with the file and the key.
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
    """MemTotal, MemAvailable, MemFree, Cached and the used swap of a node in bytes, None if the node did not say.

    `device` is the memory that NVML reports for the GPU. A GB10 has none of its own: NVML says "not supported".
    """

    name: str
    total: int | None
    available: int | None
    device: int | None = None
    free: int | None = None
    cached: int | None = None
    swap: int | None = None


# One of the article's nodes: of 121.7 GiB the system, Docker and an idle Ray had taken 4.3. `plan` computes with this.
SPARK = NodeMemory("a Spark", int(121.7 * GIB), int(117.4 * GIB))


@dataclass(frozen=True)
class Budget:
    """The memory of one node with the model on it.

    vLLM takes `reservation` at any context length. Weights, activations and graphs come first, and the cache gets what
    they leave. `outside` comes on top. `layout` is None where the cache is not computed. Each of the `sequences` needs
    a block of the cache. The number is 0 unless the model has states and decoding is captured in CUDA graphs.
    `batched` is the number of tokens that one step computes at most.
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
    batched: int

    @property
    def cache(self) -> int:
        """The part of the reservation that is left for the cache. The other parts are too large if it is below 0."""
        return self.reservation - self.weights - self.activations - self.graphs

    @property
    def blocks(self) -> int:
        """The blocks of the cache, 0 where it is not computed."""
        return max(self.cache, 0) // self.layout.block_bytes if self.layout else 0

    @property
    def left(self) -> int:
        """The memory that the host keeps once the server is up."""
        return (self.node.available or 0) - self.reservation - self.outside


def node_budget(shape: Shape, measured: Mapping[str, int], demand: Demand, node: NodeMemory) -> Budget:
    """Compute the memory of one node. Raises CannotKnow where the model's cache cannot be computed.

    Weights and activations are estimates. The cache is exact for the memory that they leave. Activations were measured
    with 8192 batched tokens. More tokens are scaled up. Fewer are not scaled down, because nobody has measured that.
    """
    # vLLM's defaults for an API server, by get_batch_defaults in engine/arg_utils.py of 0.17.1 to 0.32.0. All of these
    # ask NVML alone. vLLM's PR 57378, not merged in October 2026, asks CUDA on a GB10: then 1024 and 8192 there, too.
    sequences, batched = (1024, 8192) if (node.device or 0) >= 70 * GIB else (256, 2048)
    batched = demand.batched or min(batched, (demand.sequences or sequences) * demand.length)
    captured = STATE in shape.layers and not demand.eager
    drafts = bool(demand.drafts)
    activations = measured["activations"] + drafts * measured["mtp_activations"]
    return Budget(
        node,
        demand,
        layout=cache_layout(shape, demand) if demand.pp == 1 else None,
        weights=ceil((measured["weights"] + drafts * measured["mtp_weights"]) / (demand.tp * demand.pp)),
        activations=activations * max(batched, 8192) // 8192,
        graphs=0 if demand.eager else measured["graphs"],
        outside=measured["outside"],
        reservation=ceil((node.total or 0) * demand.utilization),
        sequences=(demand.sequences or min(sequences, batched)) if captured else 0,
        batched=batched,
    )


def budget_rows(budget: Budget) -> list[tuple[str, str]]:
    """Return the computation for one node as rows of a table: a label, and a size in GiB."""
    node, layout, length = budget.node, budget.layout, budget.demand.length
    cache = [("KV cache (its tokens are not computed)", in_gib(budget.cache))]
    if layout:
        times = budget.blocks / layout.needed(length)
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
        ("left for the host", in_gib(None if None in (node.total, node.available) else budget.left)),
    ]


def in_gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f}"


# --- The rules -------------------------------------------------------------------------------------------------------


def memory_budgets(
    settings: ModelSettings, nodes: Sequence[NodeMemory], vllm: str, hf_cache: Path | None
) -> tuple[list[Budget], list[Finding]]:
    """Compute the memory of each node with the model on it, and find the nodes that have too little.

    vllm: the version that will run. hf_cache: this host's Hugging Face folder. With None the profile alone is read.
    """
    model = settings.model
    folder = checkpoint_folder(hf_cache, settings["MODEL_CKPT"]) if hf_cache else None
    try:
        demand = read_demand(serve_words(settings), vllm_version(vllm))
        shape, measured = read_model(ROOT / model.folder / f"{model.size}.json", folder)
        budgets = [node_budget(shape, measured, demand, node) for node in nodes]
    except CannotKnow as error:
        return [], [Finding("memory-unknown", f"The memory that {model.name} takes is unknown. {error}")]
    found = list(dict.fromkeys(finding for budget in budgets for finding in memory_findings(budget, settings)))
    if demand.pp > 1:
        text = f"The KV cache is not computed for PP_SIZE={demand.pp}. The log of the load has its size."
        found.insert(0, Finding("memory-unknown", text, refuses=False))
    return budgets, found


def memory_findings(budget: Budget, settings: ModelSettings) -> list[Finding]:
    """Return everything that is wrong with the memory of one node.

    A Spark with too little memory hangs until its power is cut. vLLM itself checks only the cache, after minutes of
    loading. Its check of the sequences is in config/compilation.py, 0.20 to 0.32: "exceeds available Mamba cache
    blocks".
    """
    node, demand, layout = budget.node, budget.demand, budget.layout
    if not node.total or node.available is None:
        text = f"MemTotal or MemAvailable of {node.name} is unknown, so the model may not fit. Type there: free -g"
        return [Finding("memory-unknown", text)]
    found = []
    for rule, limit in (("memory-floor", "MEM_FLOOR_GIB"), ("memory-low", "MEM_WARN_GIB")):
        if budget.left < float(settings[limit]) * GIB:
            text = f"{node.name} would keep {budget.left / GIB:.2f} GiB, less than {limit} ({settings[limit]}). "
            keeps = (limit,) if rule == "memory-low" else KEEPS  # a lower limit would propose more than was asked for
            found.append(Finding(rule, text + _proposal(budget, settings, max, keeps), refuses=rule == "memory-floor"))
            break
    # Public reports of GB10 with the cache full: vLLM 56824 (NV_ERR_NO_MEMORY), and a load at a tenth of its speed.
    taken = budget.reservation + budget.outside
    if node.free is not None and node.free < taken <= node.available:
        text = (
            f"{node.name} has {in_gib(node.free)} GiB of free pages, and this model takes {in_gib(taken)}. The kernel "
            "would have to give page cache back during the load. A GB10 can then load slowly, or fail with "
            f"NV_ERR_NO_MEMORY. Type on {node.name}: sync; echo 1 | sudo tee /proc/sys/vm/drop_caches"
        )
        found.append(Finding("page-cache", text, refuses=False))
    if layout and (largest := layout.largest(budget.cache)) < demand.length:
        fits = settings.line(MAX_MODEL_LEN=str(largest)) if largest else "none, whatever the --max-len"
        text = (
            f"{demand.length:,} tokens need {layout.least(demand.length) / GIB:.2f} GiB of KV cache, and GPU_MEM_UTIL "
            f"{demand.utilization:g} leaves {budget.cache / GIB:.2f} on {node.name}. The largest that fits: {fits}. "
        )
        found.append(Finding("memory-context", text + _proposal(budget, settings, min)))
    elif layout and budget.blocks < budget.sequences:
        default = "" if demand.sequences else " (vLLM's default on this GPU)"
        text = (
            f"vLLM would refuse MAX_NUM_SEQS {budget.sequences}{default} after loading: each sequence needs a cache "
            f"block, and {node.name} has {budget.blocks}. Type: {settings.line(MAX_NUM_SEQS=str(budget.blocks))}. "
        )
        found.append(Finding("memory-sequences", text + _proposal(budget, settings, min)))
    if layout and budget.batched < layout.least_batched:
        default = "" if demand.batched else " (vLLM's default on this GPU)"
        text = (
            f"vLLM {'.'.join(map(str, demand.vllm))} would die after loading: MAX_NUM_BATCHED_TOKENS is "
            f"{budget.batched}{default}, and with prefix caching a step must hold the {layout.least_batched} tokens of "
            f"a cache block. Type: {settings.line(MAX_NUM_BATCHED_TOKENS=str(1 << layout.block.bit_length()))}"
        )
        found.append(Finding("memory-batched", text))
    return found


KEEPS = ("MEM_WARN_GIB", "MEM_FLOOR_GIB")


def _proposal(
    budget: Budget, settings: ModelSettings, choose: Callable[[list[float]], float], keeps: Sequence[str] = KEEPS
) -> str:
    """Return the command with a GPU_MEM_UTIL, in hundredths, that holds the cache and leaves the host enough.

    keeps: the limits of which the host is left at least one, tried in this order.
    """
    most, lowest = float(settings["GPU_MEM_UTIL_MAX"]), budget.reservation - budget.cache
    if layout := budget.layout:
        lowest += max(layout.least(budget.demand.length), budget.sequences * layout.block_bytes)
    shares = [hundredth / 100 for hundredth in range(1, 101) if hundredth / 100 <= most]
    for keep in (float(settings[name]) for name in keeps):
        highest = budget.reservation + budget.left - keep * GIB
        if fitting := [share for share in shares if lowest <= ceil((budget.node.total or 0) * share) <= highest]:
            return f"Type: {settings.line(GPU_MEM_UTIL=f'{choose(fitting):.2f}')}"
    return (
        f"No GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX ({most:g}) holds the cache and leaves the host {keep:g} GiB. "
        f"To see what else runs on {budget.node.name}, type there: free -g"
    )
