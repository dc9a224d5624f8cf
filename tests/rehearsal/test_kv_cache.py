"""The cache's arithmetic against vLLM's own get_kv_cache_configs, in the stand-in image."""

import json
from itertools import product
from pathlib import Path

import pytest

from checks import cache, footprint
from checks.demand import Demand
from checks.fields import CannotKnow
from checks.footprint import GIB
from checks.options import version
from rehearsal.flow import IMAGE
from settings.models import ROOT, known

ASK = Path(__file__).with_name("kv_cache_configs.py")
QUIET = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
VERSION = version("0.32.0")


def shapes():
    """Each profile's shape by its name."""
    files = {model.name: ROOT / model.folder / f"{model.size}.json" for model in known().values()}
    return {name: footprint.load(file, None, "none")[0] for name, file in files.items()}


def demands(shape):
    """Ranks, dtypes, MTP, prefix caching and lengths, as far as the shape has them and they can be reckoned."""
    spaces = (1, 2, 4), (1, 2, 3), ("auto", "fp8"), ("auto", "float16"), (0, 3), (False, True), (4096, 131072, 1048576)
    for tp, pp, kept, state, drafted, prefix, length in product(*spaces):
        if (drafted and not shape.mtp) or (not shape.state and (prefix or state != "auto")):
            continue
        if pp <= len(shape.layers):
            yield Demand(length, 0.7, tp, pp, kept, state, drafted, prefix=prefix, vllm=VERSION)


def case(shape, demand, room):
    """One case for vLLM: what the model and the demand say, and so many bytes."""
    state = shape.state
    own = state.dtype if state and demand.state_dtype == "auto" else demand.state_dtype
    return {
        "layers": shape.layers + (shape.mtp if demand.speculative else ()),
        "main": len(shape.layers),
        "kv_heads": max(1, shape.kv_heads // demand.tp),
        "head_dim": shape.head_dim,
        "cache_bytes": 1 if demand.cache_dtype == "fp8" else 2,
        "state": vars(state) if state else None,
        "chunk": state.chunk if state else 0,
        "state_dtype": own,
        "family": "mamba2" if shape.caches_all_states else "delta",
        "mode": cache.mode(shape, demand) if state else "none",
        "pp": demand.pp,
        "tp": demand.tp,
        "speculative": demand.speculative,
        "length": demand.length,
        "bytes": room,
    }


def ours(shape, demand, room):
    """What this project makes of the same case."""
    cut = cache.layout(shape, demand)
    blocks = cut.blocks(room)
    if cut.largest(blocks) < demand.length:
        return None
    numbers = {"concurrency": cut.concurrency(blocks, demand.length), "tokens": cut.tokens(blocks, demand.length)}
    return {"block": cut.block, "blocks": blocks} | numbers


def everything():
    """Cases with our answers: for what does not fit, the largest length that does, and one token more."""
    for shape in shapes().values():
        for demand, room in product(demands(shape), (int(5.3 * GIB), int(20.01 * GIB), int(36.5 * GIB))):
            try:
                cut = cache.layout(shape, demand)
            except CannotKnow:
                continue
            largest = cut.largest(cut.blocks(room))
            lengths = {demand.length} if largest >= demand.length else {largest, largest + 1} - {0}
            for length in lengths:
                asked = Demand(**(vars(demand) | {"length": length}))
                yield case(shape, asked, room), ours(shape, asked, room)


@pytest.mark.rehearsal
def test_vllm_itself_cuts_every_cache_the_same_way(rig):
    """Blocks, concurrency and tokens are vLLM's for thousands of shapes, and so is what it refuses, to the token."""
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
    assert len(answers) > 2000 and not wrong, wrong[:3]
