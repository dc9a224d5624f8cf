"""The layout of the KV cache, compared with vLLM's own get_kv_cache_configs in the stand-in image."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from cluster.finding import GIB, CannotKnow
from cluster.kv_cache import Demand, cache_layout, kept_states
from cluster.memory import read_model
from cluster.models import known_models
from cluster.repository import ROOT
from rehearsal.flow import IMAGE

ASK = Path(__file__).with_name("kv_cache_configs.py")
QUIET = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
VERSION = (0, 32, 0)


def demands(shape):
    """Ranks, dtypes, MTP, prefix caching and lengths, as far as the model has them."""
    spaces = (1, 2, 4), ("auto", "fp8"), ("auto", "float16"), (0, 3), (False, True), (4096, 131072, 1048576)
    for tp, cache, state, drafts, prefix, length in product(*spaces):
        if (shape.mtp or not drafts) and (shape.state or not (prefix or state != "auto")):
            yield Demand(length, 0.7, tp, 1, cache, state, drafts, prefix=prefix, vllm=VERSION)


def case(shape, demand, room):
    """One case for vLLM: the model, the demand, and the bytes for the cache."""
    state = shape.state
    own = {2: "bfloat16", 4: "float32"}[state.element] if state else ""
    return {
        "layers": shape.layers + (shape.mtp if demand.drafts else ()),
        "kv_heads": max(1, shape.kv_heads // demand.tp),
        "head_dim": shape.head_dim,
        "cache_bytes": 1 if demand.cache_dtype == "fp8" else 2,
        "state": vars(state) if state else None,
        "state_dtype": own if demand.state_dtype == "auto" else demand.state_dtype,
        "family": "mamba2" if shape.caches_all_states else "delta",
        "mode": kept_states(shape, demand) if state else "none",
        "tp": demand.tp,
        "drafts": demand.drafts,
        "length": demand.length,
        "bytes": room,
    }


def ours(shape, demand, room):
    """The answer of cluster/kv_cache.py to the same case."""
    layout = cache_layout(shape, demand)
    if layout.largest(room) < demand.length:
        return None
    blocks = room // layout.block_bytes
    times = blocks / layout.needed(demand.length)
    return {"block": layout.block, "blocks": blocks, "concurrency": times, "tokens": int(times * demand.length)}


def everything():
    """Yield every case with our answer. A length that does not fit becomes the largest that does, and one more."""
    for model in known_models().values():
        shape, *_ = read_model(ROOT / model.folder / f"{model.size}.json")
        for demand, room in product(
            demands(shape) if shape else (), (int(5.3 * GIB), int(20.01 * GIB), int(36.5 * GIB))
        ):
            try:
                largest = cache_layout(shape, demand).largest(room)
            except CannotKnow:
                continue
            lengths = {demand.length} if largest >= demand.length else {largest, largest + 1} - {0}
            for length in lengths:
                asked = replace(demand, length=length)
                yield case(shape, asked, room), ours(shape, asked, room)


@pytest.mark.rehearsal
def test_vllm_itself_lays_out_every_cache_the_same_way(rig):
    """Blocks, concurrency and tokens are vLLM's in every case, and vLLM refuses the same lengths, to the token."""
    cases, expected = zip(*everything(), strict=True)
    quiet = [word for name, value in QUIET.items() for word in ("-e", f"{name}={value}")]
    words = ("docker", "run", "--rm", "-i", *quiet, "--entrypoint", "python3", IMAGE, "-c", ASK.read_text())
    done = rig.hosts[0].run(*words, input=json.dumps(cases), stdin=None)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    wrong = [
        (asked, mine, theirs)
        for asked, mine, theirs in zip(cases, expected, answers, strict=True)
        if mine != (None if "refused" in theirs else theirs)
    ]
    assert len(answers) > 1000 and not wrong, wrong[:3]
