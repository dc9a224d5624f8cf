"""The memory that a model takes of each node, computed before the model is loaded. Sizes are in bytes.

docs/memory.md has the formula, and compares it with measured values. The formula comes from engine/arg_utils.py and
v1/worker/utils.py (request_memory) of vLLM 0.21.0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from cluster.finding import GIB, CannotKnow, Finding, vllm_version
from cluster.kv_cache import Demand, Layout, Shape, cache_layout, json_field, read_demand, read_shape
from cluster.models import read_values
from cluster.node import HF_CACHE
from cluster.repository import ROOT
from cluster.server import serve_words
from cluster.settings import ModelSettings

# The sizes that a profile's JSON file gives in GiB, and their defaults. `outside` is what a server takes beside its
# reservation: 3.0 for CUDA context and NCCL, read on an H100, and 5.0 for three Python processes, read without a GPU.
MEASURED = {"weights": None, "mtp_weights": 0, "activations": None, "mtp_activations": 0, "graphs": None,
            "outside": 8.0}  # fmt: skip


# --- The model -------------------------------------------------------------------------------------------------------


def checkpoint_folder(hf_cache: Path, checkpoint: str, revision: str = "") -> Path | None:
    """Return the checkpoint's folder on this host: for a path that path, otherwise the snapshot of the revision."""
    if checkpoint.startswith("/"):
        return Path(checkpoint.replace(f"{HF_CACHE}/", f"{hf_cache}/", 1))
    folder, name = hf_cache / "hub" / f"models--{checkpoint.replace('/', '--')}", revision or "main"
    try:
        return folder / "snapshots" / (folder / "refs" / name).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return folder / "snapshots" / name if (folder / "snapshots" / name).is_dir() else None


def read_model(profile: Path, folder: Path | None = None) -> tuple[Shape | None, dict[str, int | None], str]:
    """Read the shape of a model, and the sizes of MEASURED in bytes. None stands for what is not known.

    profile: the JSON file beside the model's profile. folder: the checkpoint's folder, whose config.json and index of
    the weights count before the profile. The third value is the reason why there is no shape.
    """
    file, sizes = profile, {name: _gib(size) for name, size in MEASURED.items()}
    try:
        kept = json.loads(profile.read_text()) if profile.is_file() else {}
        config = kept.get("config")
        sizes = {name: json_field(kept, f"{name}_gib", read=_gib, default=size) for name, size in MEASURED.items()}
        if folder and (folder / "model.safetensors.index.json").is_file():
            file = folder / "model.safetensors.index.json"
            index = json.loads(file.read_text())
            sizes["weights"] = json_field(index["metadata"], "total_size", read=lambda size: _gib(size / GIB))
            if any(name.startswith("mtp.") for name in index.get("weight_map", ())):
                sizes["mtp_weights"] = 0
        file = profile
        if folder and (folder / "config.json").is_file():
            file = folder / "config.json"
            config = json.loads(file.read_text())
        elif config is None:
            lacks = f"{profile} {'has no config' if profile.is_file() else 'is missing'}"
            return None, sizes, f"No shape of the model is known: {lacks}, and the checkpoint here has no config.json."
        return read_shape(config), sizes, ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return None, sizes, f"{file} is not understood: {error}."


def _gib(found: float | None) -> int | None:
    if found is not None and not 0 <= found < 10**6:
        raise ValueError
    return None if found is None else int(found * GIB)


# --- The memory of one node ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeMemory:
    """MemTotal, MemAvailable, MemFree, Cached and the used swap of a node in bytes, None if the node did not say.

    `device` is the memory that NVML reports for the GPU. A GB10 has none of its own: NVML says "not supported", and
    vLLM takes its share of MemTotal.
    """

    name: str
    total: int | None
    available: int | None
    device: int | None = None
    free: int | None = None
    cached: int | None = None
    swap: int | None = None

    def share(self, utilization: float) -> int:
        """Return the memory that vLLM asks for with this GPU_MEM_UTIL, by request_memory."""
        return ceil((self.device or self.total or 0) * utilization)


# One of the article's nodes: of 121.7 GiB the system, Docker and an idle Ray had taken 4.3. `plan` computes with this.
SPARK = NodeMemory("a Spark", int(121.7 * GIB), int(117.4 * GIB))


@dataclass(frozen=True)
class Loaded:
    """One load as vLLM printed it: its date, its utilization, and sizes of a rank in bytes, 0 if not printed."""

    on: str
    utilization: float
    cache: int
    model: int
    graphs: int


@dataclass(frozen=True)
class Budget:
    """The memory of one node with the model on it.

    vLLM takes `reservation` at any context length. The cache gets what weights, activations and graphs leave of it.
    `outside` comes on top. A size in `lacking` is not known and counts as 0. Each of the `sequences` needs a block of
    the cache; their number is 0 unless the model has states and decoding is captured in CUDA graphs. A step computes at
    most `batched` tokens. `loaded` is the date of the load that gave the sizes, empty if they are estimates.
    """

    node: NodeMemory
    demand: Demand
    layout: Layout | None
    lacking: tuple[str, ...]
    weights: int
    activations: int
    graphs: int
    outside: int
    sequences: int
    batched: int
    loaded: str = ""

    @property
    def own(self) -> int:
        """The memory of the model itself, as far as its parts are known."""
        return self.weights + self.activations + self.graphs

    @property
    def reservation(self) -> int:
        """The memory that vLLM takes: its share or, with --kv-cache-memory-bytes, the model and that cache.

        By determine_available_memory of v1/worker/gpu_worker.py. Where a part is not known, the larger one counts.
        """
        share = self.node.share(self.demand.utilization)
        given = self.own + self.demand.cache if self.demand.cache else share
        return max(share, given) if self.lacking or self.demand.unknown else given

    @property
    def cache(self) -> int | None:
        """The memory of the cache, None if it is not known. The other parts are too large if it is below 0."""
        unknown = not self.loaded and (self.lacking or self.demand.unknown)
        return self.demand.cache or (None if unknown else self.reservation - self.own)

    @property
    def blocks(self) -> int:
        """The blocks of the cache, 0 where it is not computed."""
        return max(self.cache or 0, 0) // self.layout.block_bytes if self.layout else 0

    @property
    def taken(self) -> int:
        """The memory that the server takes of the host: without the reservation if the GPU has its own memory."""
        return self.outside + (0 if self.node.device else self.reservation)

    @property
    def left(self) -> int:
        """The memory that the host keeps once the server is up."""
        return (self.node.available or 0) - self.taken


def node_budget(layout: Layout | None, sizes: Mapping[str, int | None], demand: Demand, node: NodeMemory) -> Budget:
    """Estimate the memory of one node. sizes: those of MEASURED in bytes.

    Activations were measured with 8192 batched tokens. Nobody has measured fewer, so only more tokens are scaled.
    """
    # vLLM's defaults for an API server, by get_batch_defaults in engine/arg_utils.py of 0.17.1 to 0.32.0. All of these
    # ask NVML alone. vLLM's PR 57378, not merged in October 2026, asks CUDA on a GB10: then 1024 and 8192 there, too.
    sequences, batched = (1024, 8192) if (node.device or 0) >= 70 * GIB else (256, 2048)
    batched = demand.batched or min(batched, (demand.sequences or sequences) * demand.length)
    captured = layout and layout.growing + layout.fixed > 1 and not demand.eager  # each running sequence has states
    size = {name: known or 0 for name, known in sizes.items()}
    drafts = bool(demand.drafts)
    activations = size["activations"] + drafts * size["mtp_activations"]
    return Budget(
        node,
        demand,
        layout,
        lacking=tuple(name for name, known in sizes.items() if known is None),
        weights=ceil((size["weights"] + drafts * size["mtp_weights"]) / (demand.tp * demand.pp)),
        activations=activations * max(batched, 8192) // 8192,
        graphs=0 if demand.eager else size["graphs"],
        outside=size["outside"],
        sequences=(demand.sequences or min(sequences, batched)) if captured else 0,
        batched=batched,
    )


def as_loaded(budget: Budget, loads: Sequence[Loaded]) -> Budget:
    """Put what vLLM printed here in place of the estimates. Of several loads the last one that took most counts.

    vLLM's share less its cache is all that a rank takes beside the cache. It is the same for any utilization.
    """
    if not loads or budget.demand.cache:
        return budget
    share = budget.node.share
    load = max(reversed(loads), key=lambda load: share(load.utilization) - load.cache)
    weights = load.model or budget.weights
    activations = max(share(load.utilization) - load.cache - weights - load.graphs, 0)
    known = replace(budget, weights=weights, activations=activations, graphs=load.graphs)
    return replace(known, lacking=(), loaded=load.on)


def budget_rows(budget: Budget) -> list[tuple[str, str]]:
    """Return the computation for one node as rows of a table: a label, and a size in GiB."""
    node, layout, length, share = budget.node, budget.layout, budget.demand.length, budget.demand.utilization
    source = f"as loaded here on {budget.loaded}" if budget.loaded else "allowance"
    parts = {"weights": "weights on this rank", "activations": f"activations ({source})"}
    parts |= {"graphs": f"CUDA graphs ({source})"}
    cache = [("KV cache (its tokens are not computed)", in_gib(budget.cache))]
    if layout:
        times = budget.blocks / layout.needed(length)
        cache = [
            (f"KV cache: {int(times * length):,} tokens, {times:.2f} x {length:,}", in_gib(budget.cache)),
            (f"  of it {length:,} tokens take", in_gib(layout.least(length))),
        ]
    formula = "" if budget.demand.cache else f": {share:g} x {in_gib(node.device or node.total)}"
    return [
        *((label, in_gib(None if name in budget.lacking else getattr(budget, name))) for name, label in parts.items()),
        *cache,
        (f"reserved by vLLM{formula}", in_gib(budget.reservation)),
        ("server outside it (allowance)", in_gib(budget.outside)),
        ("left for the host", in_gib(None if None in (node.total, node.available) else budget.left)),
    ]


def in_gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f}"


# --- The rules -------------------------------------------------------------------------------------------------------


def memory_budgets(
    settings: ModelSettings, nodes: Sequence[NodeMemory], vllm: str, hf_cache: Path | None, loads: Sequence[Loaded] = ()
) -> tuple[list[Budget], list[Finding]]:
    """Compute the memory of each node with the model on it, and find the nodes that have too little.

    vllm: the version that will run. hf_cache: this host's Hugging Face folder; with None the profile alone is read.
    """
    try:
        demand = read_demand(serve_words(settings), vllm_version(vllm))
    except CannotKnow as error:
        return [], [Finding("memory-unknown", f"The memory that {settings.model.name} takes is unknown. {error}")]
    profile, folder = _figures(settings, hf_cache)
    shape, sizes, reason = read_model(profile, folder)
    layout, why = None, [reason, demand.unknown]
    try:
        layout = cache_layout(shape, demand) if shape and not demand.unknown else None
    except CannotKnow as error:
        why.append(str(error))
    budgets = [as_loaded(node_budget(layout, sizes, demand, node), loads) for node in nodes]
    if lacking := [f"{name}_gib" for name in (budgets[0].lacking if budgets else ())]:
        why.append(f"{profile} gives no {', '.join(lacking)}.")
    found = list(dict.fromkeys(finding for budget in budgets for finding in memory_findings(budget, settings)))
    if any(why):
        text = f"How many tokens the KV cache holds is not computed. {' '.join(filter(None, why))}"
        if demand.cache and (lacking or demand.unknown):
            text += " With --kv-cache-memory-bytes vLLM takes more where the weights need more."
        found.insert(0, Finding("memory-unknown", text, refuses=False))
    return budgets, found


def beyond_limit(settings: ModelSettings, hf_cache: Path | None = None) -> list[str]:
    """Return a sentence if the context is longer than the model's own limit, max_position_embeddings."""
    (shape, _, _), length = read_model(*_figures(settings, hf_cache)), int(settings["MAX_MODEL_LEN"])
    if not shape or not shape.limit or length <= shape.limit:
        return []
    allowed = "1, so vLLM serves them. The answers may be worse."
    if settings.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
        allowed = f"not 1, so vLLM may refuse to start. Within it: {settings.line(MAX_MODEL_LEN=str(shape.limit))}"
    limit = f"{length:,} tokens are beyond the model's own limit of {shape.limit:,} (max_position_embeddings)"
    return [f"{limit}. VLLM_ALLOW_LONG_MAX_MODEL_LEN is {allowed}"]


def _figures(settings: ModelSettings, hf_cache: Path | None) -> tuple[Path, Path | None]:
    """Return the JSON file beside the profile, and the checkpoint's folder. Another MODEL_CKPT has no JSON file."""
    model, checkpoint = settings.model, settings["MODEL_CKPT"]
    own = checkpoint in [read_values(file).get("MODEL_CKPT") for file in model.profiles]
    file = f"{model.folder}/{model.size}.json" if own else f"{model.folder}/{checkpoint.replace('/', '--')}.json"
    return ROOT / file, checkpoint_folder(hf_cache, checkpoint, settings["REVISION"]) if hf_cache else None


def memory_findings(budget: Budget, settings: ModelSettings) -> list[Finding]:
    """Return everything that is wrong with the memory of one node.

    A Spark with too little memory hangs until its power is cut. vLLM itself checks only the cache, after minutes of
    loading, and the sequences in config/compilation.py of 0.20 to 0.32 ("exceeds available Mamba cache blocks").
    """
    node, demand, layout = budget.node, budget.demand, budget.layout
    if not node.total or node.available is None:
        text = f"MemTotal or MemAvailable of {node.name} is unknown, so the model may not fit. Type there: free -g"
        return [Finding("memory-unknown", text)]
    found = []
    where = f"{node.name}, as loaded here on {budget.loaded}" if budget.loaded else node.name
    for rule, limit in (("memory-floor", "MEM_FLOOR_GIB"), ("memory-low", "MEM_WARN_GIB")):
        if budget.left < float(settings[limit]) * GIB:
            text = f"{node.name} would keep {budget.left / GIB:.2f} GiB, less than {limit} ({settings[limit]}). "
            found.append(Finding(rule, text + _proposal(budget, settings, max, limit), refuses=rule == "memory-floor"))
            break
    # request_memory of v1/worker/utils.py wants the share free at the start, however little vLLM takes after that.
    if not node.device and budget.reservation < (share := node.share(demand.utilization)) > node.available:
        text = f"At its start vLLM wants {in_gib(share)} GiB free on {node.name}, which has {in_gib(node.available)}. "
        highest = max((node.available - budget.outside) * 100 // node.total, 1) / 100
        found.append(Finding("memory-floor", f"{text}Type: {settings.line(GPU_MEM_UTIL=f'{highest:.2f}')}"))
    # Public reports of GB10 with the cache full: vLLM 56824 (NV_ERR_NO_MEMORY), and a load at a tenth of its speed.
    if node.free is not None and node.free < budget.taken <= node.available:
        text = (
            f"{node.name} has {in_gib(node.free)} GiB of free pages, and this model takes {in_gib(budget.taken)}. The "
            "kernel must give page cache back, and a GB10 can load slowly or fail with NV_ERR_NO_MEMORY. Type on "
            f"{node.name}: sync; echo 1 | sudo tee /proc/sys/vm/drop_caches"
        )
        found.append(Finding("page-cache", text, refuses=False))
    if layout and budget.cache is not None and (largest := layout.largest(budget.cache)) < demand.length:
        fits = settings.line(MAX_MODEL_LEN=str(largest)) if largest else "none, whatever the --max-len"
        source = "--kv-cache-memory-bytes gives" if demand.cache else f"GPU_MEM_UTIL {demand.utilization:g} leaves"
        text = (
            f"{demand.length:,} tokens need {layout.least(demand.length) / GIB:.2f} GiB of KV cache, and {source} "
            f"{budget.cache / GIB:.2f} on {where}. The largest that fits: {fits}. "
        )
        found.append(Finding("memory-context", text + _proposal(budget, settings, min)))
    elif layout and budget.cache is not None and budget.blocks < budget.sequences:
        default = "" if demand.sequences else " (vLLM's default on this GPU)"
        text = (
            f"vLLM would refuse MAX_NUM_SEQS {budget.sequences}{default} after loading: each sequence needs a cache "
            f"block, and there are {budget.blocks} on {where}. Type: "
            f"{settings.line(MAX_NUM_SEQS=str(budget.blocks))}. Or make the cache larger. "
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


def _proposal(
    budget: Budget, settings: ModelSettings, choose: Callable[[list[float]], float], limit: str = "MEM_FLOOR_GIB"
) -> str:
    """Return the command with a GPU_MEM_UTIL, in hundredths, that holds the cache and leaves the host enough.

    For --kv-cache-memory-bytes only the value is returned, because that option stands in SERVE_EXTRA or in the model's
    template. limit: the least that the host must keep. A proposal that keeps MEM_WARN_GIB is preferred.
    """
    if budget.node.device and choose is max:  # no share of the GPU's own memory gives the host more
        return f"Type on {budget.node.name}: free -g"
    demand, layout, most = budget.demand, budget.layout, float(settings["GPU_MEM_UTIL_MAX"])
    lowest = budget.own + (max(layout.least(demand.length), budget.sequences * layout.block_bytes) if layout else 1)
    shares = [hundredth / 100 for hundredth in range(1, 101) if hundredth / 100 <= most]
    for keep in (float(settings[name]) for name in ("MEM_WARN_GIB", limit)):
        highest = budget.reservation + int(budget.left - keep * GIB)
        # Another GPU_MEM_UTIL changes neither such a cache nor, where its bytes are too many, what the host keeps.
        by_bytes = demand.cache and (choose is min or budget.own + demand.cache > highest)
        if by_bytes and lowest <= highest:
            return f"Give --kv-cache-memory-bytes {int(choose([lowest, highest])) - budget.own}."
        fitting = [share for share in shares if lowest <= budget.node.share(share) <= highest]
        if fitting and not by_bytes:
            return f"Type: {settings.line(GPU_MEM_UTIL=f'{choose(fitting):.2f}')}"
    option = "--kv-cache-memory-bytes" if by_bytes else f"GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX ({most:g})"
    return f"No {option} holds the cache and leaves the host {keep:g} GiB. Type on {budget.node.name}: free -g"
