"""The blocks of vLLM's KV cache, computed from the options of a `vllm serve` line and from the model's config.json.

The blocks are exact, to the token. docs/memory.md has the formulas, and compares them with real starts. The formulas
come from vLLM 0.21.0: platforms/interface.py, v1/core/kv_cache_utils.py and model_executor/layers/mamba/mamba_utils.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, lcm
from typing import Any, TypeVar

from cluster.finding import CannotKnow
from cluster.settings import TOKENS

# vLLM runs a model of each of these dtypes in 16 bits, also one of float32. Other dtypes are not computed.
MODEL_DTYPES, MODEL_BYTES = ("bfloat16", "float16", "float32"), 2
# The bytes of one element of the cache, and of a state.
CACHE_BYTES = {"auto": MODEL_BYTES, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

T = TypeVar("T")


# --- The options of a `vllm serve` line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """The options of a line that change how much memory is needed. None leaves the choice to vLLM.

    `length` is the longest sequence in tokens, `drafts` the tokens that MTP drafts, and `mode` --mamba-cache-mode.
    `cache` is the size of the KV cache in bytes, and `unit` the tokens of the smallest block. `unknown` is the reason
    why the cache is not computed.
    """

    length: int
    utilization: float
    tp: int = 1
    pp: int = 1
    cache_dtype: str = "auto"
    state_dtype: str = "auto"
    drafts: int = 0
    sequences: int | None = None
    batched: int | None = None
    prefix: bool = False
    mode: str = "none"
    eager: bool = False
    cache: int | None = None
    unit: int = 16
    unknown: str = ""
    vllm: tuple[int, ...] = (0, 21, 0)


def read_demand(words: Sequence[str], vllm: tuple[int, ...] = (0, 21, 0)) -> Demand:
    """Read the line and not the settings, because SERVE_EXTRA may repeat an option with another value.

    vllm: the version that will run. With constant states, 0.28.0 is the first that switches prefix caching on by itself
    (engine/arg_utils.py). An option that is not computed goes into `unknown`. Raises CannotKnow where even the memory
    that vLLM reserves is not known.
    """
    # SUPPRESS leaves an option that is not in the line to the default of Demand.
    make = partial(argparse.ArgumentParser, exit_on_error=False, allow_abbrev=False, add_help=False)
    reserved, cached = make(argument_default=argparse.SUPPRESS), make(argument_default=argparse.SUPPRESS)
    option = reserved.add_argument
    option("--gpu-memory-utilization", dest="utilization", type=float, default=0.0)
    option("--tensor-parallel-size", "-tp", dest="tp", type=whole_number)
    option("--pipeline-parallel-size", "-pp", dest="pp", type=whole_number)
    option("--kv-cache-memory-bytes", dest="cache", type=lambda text: int(TOKENS.read(text)))  # 8G is 8 GiB, 8g is 8e9
    option("--cpu-offload-gb", dest="other", type=float, choices=(0,))  # the host keeps these beside the reservation
    option = cached.add_argument
    option("--max-model-len", dest="length", type=whole_number, default=0)
    option("--block-size", dest="unit", type=whole_number)
    option("--kv-cache-dtype", dest="cache_dtype", choices=CACHE_BYTES)
    option("--mamba-ssm-cache-dtype", dest="state_dtype", choices=("auto", *STATE_BYTES))
    option("--speculative-config", dest="drafts", type=mtp_tokens)
    option("--max-num-seqs", dest="sequences", type=whole_number)
    option("--max-num-batched-tokens", dest="batched", type=whole_number)
    option("--enable-prefix-caching", dest="prefix", action=argparse.BooleanOptionalAction, default=vllm >= (0, 28, 0))
    option("--mamba-cache-mode", dest="mode", choices=("none", "align", "all"))
    option("--enforce-eager", dest="eager", action=argparse.BooleanOptionalAction)
    option("--data-parallel-size", "-dp", dest="other", choices=("1",))
    option("--dtype", dest="other", choices=("auto", "bfloat16", "float16", "half"))
    # The effect of these options is not computed, so 0 is the only value that they may have. MTP is read as JSON only.
    for name in (
        "decode-context-parallel-size", "hf-overrides", "mamba-block-size", "mamba-cache-dtype",
        "num-gpu-blocks-override", "kv-cache-dtype-skip-layers", "speculative-config.method",
    ):  # fmt: skip
        option(f"--{name}", dest="other", nargs="*", choices=("0",))
    # vLLM takes --a_b=c_d for --a-b=c_d.
    dashed = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words]
    found, unknown, odd = argparse.Namespace(), "", "in the `vllm serve` line has a value that is not computed"
    try:
        _, others = reserved.parse_known_args(dashed, found)
    except argparse.ArgumentError as error:
        raise CannotKnow(f"{error.argument_name} {odd}. Take it out of SERVE_EXTRA or of serve.j2.") from None
    if not 0 < found.utilization <= 1:
        raise CannotKnow("The line needs --gpu-memory-utilization above 0 and at most 1.")
    try:
        cached.parse_known_args(others, found)
    except argparse.ArgumentError as error:
        unknown = f"{error.argument_name} {odd}."
    given = {name: value for name, value in vars(found).items() if name != "other"}
    return Demand(**given, vllm=vllm, unknown=unknown or ("" if found.length else "The line has no --max-model-len."))


def whole_number(found: object) -> int:
    """Read a number from 1 to 10**8. A larger size is a mistake."""
    if not str(found).isdecimal() or not 0 < int(str(found)) <= 10**8:
        raise ValueError
    return int(str(found))


def mtp_tokens(text: str) -> int:
    """Return the number of tokens that MTP drafts. Other methods load a second model, whose size is unknown."""
    config = dict(json.loads(text))
    json_field(config, "method", read=("mtp",).index)  # refuses other methods
    return whole_number(config.get("num_speculative_tokens"))


# --- The shape of a model --------------------------------------------------------------------------------------------

ATTENTION, STATE, OTHER = "attention", "state", "other"
# Layers by the letters of hybrid_override_pattern, and by the words of layers_block_type and layer_types.
LAYERS = {
    "*": ATTENTION, "attention": ATTENTION, "full_attention": ATTENTION, "M": STATE, "mamba": STATE,
    "linear_attention": STATE, "E": OTHER, "-": OTHER, "moe": OTHER, "mlp": OTHER,
}  # fmt: skip
# The keys of config.json from which State gets `heads` to `kernel`, in that order, for the two kinds of state.
MAMBA = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
DELTA_NET = ("linear_num_value_heads", "linear_value_head_dim", "linear_key_head_dim", "linear_num_key_heads",
             "linear_conv_kernel_dim")  # fmt: skip


@dataclass(frozen=True)
class State:
    """The state of one layer, whose size does not grow with the sequence.

    `chunk` is the number of tokens that are computed at once. An element has `element` bytes. The convolution has
    `kernel` steps, over the heads and over `groups` of `columns`.
    """

    chunk: int
    element: int
    heads: int
    head_dim: int
    columns: int
    groups: int
    kernel: int


@dataclass(frozen=True)
class Shape:
    """The layers of a model in order, the layers that MTP adds, and the sizes of an attention layer."""

    layers: tuple[str, ...]
    mtp: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    state: State | None
    caches_all_states: bool
    limit: int | None = None  # the model's own limit of the context in tokens


def read_shape(config: dict[str, Any]) -> Shape:
    """Read the content of a config.json. A vision model has its layers in text_config. Raises ValueError."""
    config = {**config, **config.get("text_config", {})}
    number = partial(json_field, config, read=whole_number)
    layers_of = partial(json_field, config, read=_layers)
    kind = config.get("model_type")
    mtp: tuple[str, ...] = ()
    state = None
    if kind == "nemotron_h":  # as in vLLM's nemotron_h.py and nemotron_h_mtp.py
        layers = layers_of("hybrid_override_pattern", "layers_block_type")
        if config.get("num_nextn_predict_layers"):
            mtp = layers_of("mtp_hybrid_override_pattern", "mtp_layers_block_type") * number("num_nextn_predict_layers")
        element = json_field(config, "mamba_ssm_cache_dtype", read=STATE_BYTES.__getitem__, default="float32")
        state = State(number("chunk_size", default=128), element, *map(number, MAMBA))
    elif kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"):  # as in qwen3_5.py
        if config.get("layer_types"):
            layers = layers_of("layer_types")
        else:
            every = number("full_attention_interval")
            layers = tuple(STATE if layer % every else ATTENTION for layer in range(1, number("num_hidden_layers") + 1))
        if config.get("mtp_num_hidden_layers"):
            mtp = (ATTENTION,) * number("mtp_num_hidden_layers")
        element = json_field(config, "mamba_ssm_dtype", "dtype", "torch_dtype", read=STATE_BYTES.__getitem__)
        state = State(number("chunk_size", default=64), element, *map(number, DELTA_NET))
    elif kind in ("qwen3", "qwen3_moe", "llama") and not config.get("use_sliding_window", config.get("sliding_window")):
        layers = (ATTENTION,) * number("num_hidden_layers")
    else:
        raise ValueError(f"model_type {kind!r:.60} has no formula here, or it has a sliding_window")
    heads = number("num_attention_heads")
    head_dim = number("head_dim") if config.get("head_dim") else number("hidden_size") // heads
    kv_heads = number("num_key_value_heads", default=heads)
    json_field(config, "dtype", "torch_dtype", read=MODEL_DTYPES.index)  # refuses other dtypes
    limit = number("max_position_embeddings") if config.get("max_position_embeddings") else None
    return Shape(layers, mtp, heads, kv_heads, head_dim, state, kind == "nemotron_h", limit)


def json_field(fields: Mapping[str, Any], *keys: str, read: Callable[[Any], T], default: object = None) -> T:
    """Read the first of these keys that is set, otherwise the default. The ValueError names the keys and the value."""
    found = next((fields[key] for key in keys if fields.get(key) is not None), default)
    try:
        return read(found)
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{' or '.join(keys)} is {found!r:.60}") from None


def _layers(found: str | list[str]) -> tuple[str, ...]:
    if not found:
        raise ValueError
    return tuple(LAYERS[layer] for layer in found)


# --- The KV cache ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The blocks of one rank's cache: `block` tokens and `block_bytes` bytes each.

    A sequence takes `growing` blocks for each `block` tokens, and `fixed` blocks at any length. No sequence gets the
    `held` blocks. vLLM refuses, after the load, to compute fewer than `least_batched` tokens in a step.
    """

    block: int
    block_bytes: int
    growing: int
    fixed: int
    held: int
    least_batched: int = 0

    def needed(self, length: int) -> int:
        """Return the blocks of one sequence of so many tokens."""
        return self.growing * ceil(length / self.block) + self.fixed

    def least(self, length: int) -> int:
        """Return the smallest cache in bytes with which vLLM starts for sequences of so many tokens."""
        return (self.needed(length) + self.held) * self.block_bytes

    def largest(self, cache: int) -> int:
        """Return the tokens of the longest sequence that fits into so many bytes, 0 if none does."""
        return max((cache // self.block_bytes - self.held - self.fixed) // self.growing, 0) * self.block


def cache_layout(shape: Shape, demand: Demand) -> Layout:
    """Return vLLM's blocks. Raises CannotKnow if the ranks cannot share the heads, and for pipeline parallelism."""
    tp = demand.tp
    if demand.pp > 1:
        raise CannotKnow(f"There is no formula for PP_SIZE={demand.pp}.")
    if demand.drafts and not shape.mtp:
        raise CannotKnow("The line asks for MTP, but config.json has no MTP layers.")
    layers = shape.layers + (shape.mtp if demand.drafts else ())
    attention, states = layers.count(ATTENTION), layers.count(STATE)
    whole = [shape.heads, *((shape.state.heads, shape.state.groups) if shape.state and states else ())]
    if not attention or any(heads % tp for heads in whole) or (shape.kv_heads % tp and tp % shape.kv_heads):
        raise CannotKnow(f"The model has no attention layer, or --tensor-parallel-size {tp} does not divide its heads.")
    # Every rank has at least one head for keys and values.
    token = 2 * max(1, shape.kv_heads // tp) * shape.head_dim * CACHE_BYTES[demand.cache_dtype]
    held = int(demand.vllm >= (0, 29, 0))  # get_kv_cache_configs then reserves the block that no sequence gets
    if not shape.state or not states:
        return Layout(demand.unit, demand.unit * token * attention, growing=1, fixed=0, held=held)
    kept = kept_states(shape, demand)
    # A block has so many --block-size that its keys and values are at least as large as a state.
    step = lcm(shape.state.chunk, demand.unit) if kept == "all" else demand.unit
    block = step * ceil(state_bytes(shape.state, demand) / (step * token))
    # A group has as many layers as the rarer kind. If the other kind has less than half more, it has as many as that.
    few, many = sorted((attention, states))
    group = many if many < few * 1.5 else few
    of_states = ceil(states / group)
    growing = ceil(attention / group) + (of_states if kept == "all" else 0)
    # MambaSpec in v1/kv_cache_interface.py: 0.22.0 was the first to add the drafted tokens' blocks to `all`.
    also = demand.drafts if demand.vllm >= (0, 22, 0) else 0
    fixed = of_states * {"none": 1 + demand.drafts, "align": 2 + demand.drafts, "all": also}[kept]
    # validate_block_size in config/vllm.py, up to 0.26.0. 0.17 compares in the configuration, before the load.
    least_batched = block if kept == "align" and demand.vllm < (0, 27, 0) else 0
    return Layout(block, block * token * group, growing, fixed, held, least_batched)


def kept_states(shape: Shape, demand: Demand) -> str:
    """Return the mode in which vLLM keeps states: `none` keeps one a sequence, `align` two, `all` one in each block.

    By MambaModelConfig in model_executor/models/config.py, read in 0.17.1 to 0.32.0. Without a mode on the line 0.20
    and 0.21 take `align` beside a drafter, and 0.28 and later always. Others take `all`, which 0.32 no longer has.
    """
    if not demand.prefix:
        return "none"
    if not shape.caches_all_states or demand.vllm >= (0, 32, 0):
        return "align"
    aligned = demand.vllm >= (0, 28, 0) or (demand.drafts and (0, 20, 0) <= demand.vllm < (0, 22, 0))
    return demand.mode if demand.mode != "none" else "align" if aligned else "all"


def state_bytes(state: State, demand: Demand) -> int:
    """Return the bytes of one layer's state on one rank."""
    channels = (state.heads * state.head_dim + 2 * state.groups * state.columns) // demand.tp
    convolution = (state.kernel - 1 + demand.drafts) * channels * MODEL_BYTES
    own = state.element if demand.state_dtype == "auto" else STATE_BYTES[demand.state_dtype]
    return convolution + state.heads // demand.tp * state.head_dim * state.columns * own
