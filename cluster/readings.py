"""The memory that vLLM printed when a model was loaded here, kept for the checks before later loads.

`loading.json` in the log folder says which load serve.log is about, and `readings.json` keeps what vLLM printed. The
context is no part of a load's key: it changes only how many tokens one sequence may take of the cache.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cluster.engine import node_container
from cluster.finding import GIB
from cluster.memory import Loaded
from cluster.node import log_folder
from cluster.options import given_options
from cluster.recorder import keep_json, kept_json
from cluster.server import serve_words
from cluster.settings import ModelSettings

if TYPE_CHECKING:
    from docker.models.containers import Container

# What vLLM 0.17 to 0.32 prints of each rank (v1/worker/gpu_worker.py and gpu_model_runner.py), in GiB. A CPU build has
# other words for its cache. With --kv-cache-memory-bytes vLLM does not print how much of its share the cache gets. The
# engine prints the tokens of the whole cache, on the head.
PRINTED = {
    "model": re.compile(r"Model loading took (\d+\.\d+) GiB"),
    "cache": re.compile(r"(?:Available KV cache memory:|(?:Auto|Explicitly) set) \(?(\d+\.\d+)[ /]"),
    "graphs": re.compile(r"Graph capturing finished in \d+ secs, took (\d+\.\d+) GiB"),
    "tokens": re.compile(r"KV cache size: ([\d,]+) tokens"),
}
# Ray writes the address before a line of a rank on another node.
ADDRESS = re.compile(r"\bip=([\d.]+)")
READY = "Application startup complete"
LOG_BYTES = 8 * 2**20  # at the log's start: all of the load
LOADS = 50
# The options and variables that change nothing in the memory of a rank. GPU_MEM_UTIL is kept beside the readings.
NO_MEMORY = {
    "--served-model-name", "--host", "--port", "--max-model-len", "--gpu-memory-utilization", "--reasoning-parser",
    "--reasoning-parser-plugin", "--tool-call-parser", "--enable-auto-tool-choice", "--chat-template", "--seed",
    "--default-chat-template-kwargs", "VLLM_ALLOW_LONG_MAX_MODEL_LEN", "VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "RAY_CGRAPH_get_timeout", "VLLM_ENGINE_READY_TIMEOUT_S", "MEM_ABORT_GIB",
}  # fmt: skip


def note_load(settings: ModelSettings) -> None:
    """Write down which load the server's log is about. serve.sh deletes the note when another server starts."""
    if (head := node_container()) and (share := settings.get("GPU_MEM_UTIL")):
        note = {"on": time.strftime("%Y-%m-%d"), "utilization": float(share)}
        with suppress(OSError):  # a full disk costs the readings, and nothing else
            keep_json(log_folder(settings) / "loading.json", note | {"key": _load_key(settings, head)})


def keep_readings(settings: ModelSettings) -> None:
    """Keep what vLLM has printed of the last load, once, and only if the server came up."""
    folder = log_folder(settings)
    if not (note := kept_json(folder / "loading.json", "key")):
        return
    with suppress(OSError):
        with open(folder / "serve.log", errors="replace") as log:
            printed = log.read(LOG_BYTES)
        if READY in printed:
            loads = kept_json(folder / "readings.json", kind=list) or []
            nodes = read_printed(printed.splitlines(), settings["HEAD_NODE_IP"])
            keep_json(folder / "readings.json", [*loads, note | {"nodes": nodes}][-LOADS:])
            (folder / "loading.json").unlink()


def read_printed(lines: Iterable[str], head: str) -> dict[str, dict[str, float]]:
    """Return the readings of each node's rank in GiB, and the tokens of the cache. head: the head's address."""
    nodes: dict[str, dict[str, float]] = {}
    for line in lines:
        address = found[1] if (found := ADDRESS.search(line)) else head
        for name, pattern in PRINTED.items():
            if found := pattern.search(line):
                nodes.setdefault(address, {})[name] = float(found[1].replace(",", ""))
    return nodes


def loads_here(settings: ModelSettings, head: Container) -> list[Loaded]:
    """Return the kept loads of the same line, each with the worst readings of its nodes. A damaged load is left out."""
    found, key = [], _load_key(settings, head)
    for load in kept_json(log_folder(settings) / "readings.json", kind=list) or []:
        with suppress(LookupError, TypeError, ValueError, AttributeError):
            if load["key"] == key:
                nodes = list(load["nodes"].values())
                cache = min(node["cache"] for node in nodes if "cache" in node)
                model, graphs = (max(node.get(name, 0) for node in nodes) for name in ("model", "graphs"))
                sizes = (int(float(size) * GIB) for size in (cache, model, graphs))
                found.append(Loaded(str(load["on"]), float(load["utilization"]), *sizes))
    return found


def _load_key(settings: ModelSettings, head: Container) -> dict[str, Any]:
    """Return everything that decides the memory of a rank beside its cache."""
    given = [[name, *values] for name, values in given_options(serve_words(settings)) if name not in NO_MEMORY]
    variables = {name: settings[name] for name in settings.forward if name not in NO_MEMORY}
    options = sorted(map(shlex.join, given))
    return {"image": head.image.id, "checkpoint": settings["MODEL_CKPT"], "options": options, "variables": variables}
