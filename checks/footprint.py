"""What of a model was measured rather than computed, and where both are read: the HF cache, else beside the profile."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from checks.fields import CannotKnow
from checks.shape import Shape, read

GIB = 2**30
IN_CONTAINER = "/root/.cache/huggingface"
MOST_GIB = 10**5

# Bytes that a node gives up beside the reservation once its server has started, on top of what Ray has taken already:
# nvidia-smi showed 3.0 GiB more than asked for on an H100 (CUDA context, NCCL), and API server, engine and worker are
# three Python processes of 1.8 GB as they were measured without a GPU: 3.0 + 5.0. Only the head has all three; the
# worker is reckoned the same, on the safe side.
OUTSIDE_GIB = 8.0


@dataclass(frozen=True)
class Footprint:
    """Bytes: weights of all ranks together (`mtp` more with MTP); on each rank activations at 8192 batched tokens, CUDA
    graphs, and what the server takes outside its reservation. `source` says where the weights' size was read."""

    weights: int
    mtp_weights: int
    activations: int
    mtp_activations: int
    graphs: int
    outside: int
    source: str


def load(profile: Path, cache: Path | None, checkpoint: str) -> tuple[Shape, Footprint, str]:
    """A model's shape, its footprint, and where the shape was read.

    profile: the JSON file beside the model's profile; cache: this host's Hugging Face folder; checkpoint: MODEL_CKPT.
    config.json and the size of the weights come from the cache where it has them, the rest and what is missing from
    profile. Raises CannotKnow if neither has it, or has it in a form that is not known.
    """
    kept = _json(profile)
    folder = located(cache, checkpoint) if cache else None
    own = folder / "config.json" if folder else None
    config, source = (_json(own), str(own)) if own and own.is_file() else (kept.get("config"), str(profile))
    return read(config, source), _footprint(kept, profile, folder), source


def located(cache: Path, checkpoint: str) -> Path | None:
    """Where the cache has the checkpoint: the snapshot that refs/main names, or the folder that a path names."""
    if checkpoint.startswith(f"{IN_CONTAINER}/"):
        return cache / checkpoint.removeprefix(f"{IN_CONTAINER}/")
    if checkpoint.startswith("/"):
        return Path(checkpoint)
    folder = cache / "hub" / f"models--{checkpoint.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / "snapshots" / revision if revision.isalnum() else None


def _footprint(kept: Mapping, profile: Path, folder: Path | None) -> Footprint:
    indexed = _indexed(folder / "model.safetensors.index.json") if folder else None
    weights, mtp, source = indexed or (_gib(kept, "weights_gib", profile), None, str(profile))
    return Footprint(
        weights=weights,
        mtp_weights=_gib(kept, "mtp_weights_gib", profile, 0.0) if mtp is None else mtp,
        activations=_gib(kept, "activations_gib", profile),
        mtp_activations=_gib(kept, "mtp_activations_gib", profile, 0.0),
        graphs=_gib(kept, "graphs_gib", profile),
        outside=_gib(kept, "outside_gib", profile, OUTSIDE_GIB),
        source=source,
    )


def _indexed(index: Path) -> tuple[int, int | None, str] | None:
    """The weights' bytes by the checkpoint's own index, and 0 for MTP where they are among them; None without one."""
    if not index.is_file():
        return None
    found = _json(index)
    size = found["metadata"].get("total_size") if isinstance(found.get("metadata"), Mapping) else None
    if type(size) is not int or not 0 < size <= MOST_GIB * GIB:
        raise CannotKnow(f"{index}: metadata.total_size is {repr(size)[:60]}.")
    names = found.get("weight_map")
    has_mtp = isinstance(names, Mapping) and any(str(name).startswith("mtp.") for name in names)
    return size, 0 if has_mtp else None, str(index)


def _gib(kept: Mapping, name: str, profile: Path, otherwise: float | None = None) -> int:
    found = kept.get(name, otherwise)
    if type(found) not in (int, float) or not 0 <= found <= MOST_GIB:
        raise CannotKnow(f"{profile}: {name} is {repr(found)[:60]}.")
    return int(Decimal(str(found)) * GIB)


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CannotKnow(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CannotKnow(f"{file} is no JSON object.")
    return found
