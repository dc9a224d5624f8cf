"""vLLM's key-value cache: the options of a `vllm serve` line, the model's config.json, and the blocks that follow.

The blocks are exact, to the token. docs/memory.md has the formulas, and the readings of real starts that they were
compared with. The sources are files of vLLM 0.21.0: platforms/interface.py, v1/core/kv_cache_utils.py and
model_executor/layers/mamba/mamba_utils.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, lcm
from typing import Any, TypeVar

from cluster.finding import CannotKnow

# Bytes of one element. vLLM runs a float32 model in 16 bits. Other dtypes of the cache pack in ways of their own.
MODEL_BYTES = {"bfloat16": 2, "float16": 2, "float32": 2}
CACHE_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KERNEL_BLOCK = 16

T = TypeVar("T")


# --- The options of a `vllm serve` line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demand:
    """The options of a line that decide about memory. vLLM chooses where a value is None.

    `length` is the longest sequence in tokens, `drafts` the tokens that MTP drafts, `mode` the states that prefix
    caching keeps.
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
    vllm: tuple[int, ...] = (0, 21, 0)


# The effect of these options is not computed, unless they are 0.
NOT_COMPUTED = (
    *("--block-size", "--cpu-offload-gb", "--decode-context-parallel-size", "--hf-overrides", "--mamba-block-size"),
    *("--kv-cache-memory-bytes", "--mamba-cache-dtype", "--num-gpu-blocks-override", "--kv-cache-dtype-skip-layers"),
)


def read_demand(words: Sequence[str], vllm: tuple[int, ...] = (0, 21, 0)) -> Demand:
    """Read the line that will run: SERVE_EXTRA may differ from the settings.

    vllm: the version that will run. For a model with constant states, 0.21.0 leaves prefix caching off and 0.32.0
    switches it on. Between the two the larger need is assumed. Raises CannotKnow for an option that is not computed.
    """
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("--max-model-len", dest="length", type=_positive, default=0)
    parser.add_argument("--gpu-memory-utilization", dest="utilization", type=float, default=0.0)
    parser.add_argument("--tensor-parallel-size", "-tp", dest="tp", type=_positive, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", dest="pp", type=_positive, default=1)
    parser.add_argument("--kv-cache-dtype", dest="cache_dtype", choices=("auto", *CACHE_BYTES), default="auto")
    parser.add_argument("--mamba-ssm-cache-dtype", dest="state_dtype", choices=("auto", *STATE_BYTES), default="auto")
    parser.add_argument("--speculative-config", dest="drafts", type=_drafts, default=0)
    parser.add_argument("--max-num-seqs", dest="sequences", type=_positive)
    parser.add_argument("--max-num-batched-tokens", dest="batched", type=_positive)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--enable-prefix-caching", dest="prefix", action=switch, default=vllm > (0, 21, 0))
    parser.add_argument("--mamba-cache-mode", dest="mode", choices=("none", "align", "all"), default="none")
    parser.add_argument("--enforce-eager", dest="eager", action=switch, default=False)
    parser.add_argument("--data-parallel-size", "-dp", dest="other", type=_only("1"))
    parser.add_argument("--dtype", dest="other", type=_only("auto", "bfloat16", "float16", "half"))
    for option in NOT_COMPUTED:
        parser.add_argument(option, dest="other", nargs="*", type=_only("0"))
    try:
        known, unknown = parser.parse_known_args([_dashed(word) for word in words])
    except argparse.ArgumentError as error:
        raise CannotKnow(f"In the `vllm serve` line, {error}.") from None
    if any(word.startswith("--speculative-config.") for word in unknown):
        raise CannotKnow("--speculative-config is given in parts, which are not read here.")
    if not known.length or not 0 < known.utilization <= 1:
        raise CannotKnow("The line needs --max-model-len, and --gpu-memory-utilization above 0 and at most 1.")
    return Demand(**{name: value for name, value in vars(known).items() if name != "other"}, vllm=vllm)


def _dashed(word: str) -> str:
    """Spell an option with dashes, as vLLM does: `--a_b=c_d` is `--a-b=c_d`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _only(*harmless: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in harmless:
            raise argparse.ArgumentTypeError(f"the effect of {text!r} on memory is not computed")
        return text

    return read


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _drafts(text: str) -> int:
    """Return the number of tokens that MTP drafts. Any other method loads a model of unknown size."""
    try:
        config = json.loads(text)
        if config["method"] == "mtp":
            return json_field(config, "num_speculative_tokens", read=_number)
    except (ValueError, LookupError, TypeError):
        pass  # refused below, as another method is
    raise argparse.ArgumentTypeError("this is not MTP with its number of tokens, and its memory is not computed")


# --- The shape of a model --------------------------------------------------------------------------------------------

ATTENTION, STATE, OTHER = "attention", "state", "other"
# Layers by the letters of hybrid_override_pattern, and by the words of layers_block_type and layer_types.
LAYERS = {
    "*": ATTENTION, "attention": ATTENTION, "full_attention": ATTENTION, "M": STATE, "mamba": STATE,
    "linear_attention": STATE, "E": OTHER, "-": OTHER, "moe": OTHER, "mlp": OTHER,
}  # fmt: skip


@dataclass(frozen=True)
class State:
    """The constant state of one layer: Mamba-2's, or a gated delta net's, whose sizes play the same parts.

    `groups` of `columns` stand beside the heads in the convolution, which has `kernel` steps. `chunk` tokens are
    computed at once, and `element` is the bytes of one element.
    """

    heads: int
    head_dim: int
    columns: int
    groups: int
    kernel: int
    chunk: int
    element: int


@dataclass(frozen=True)
class Shape:
    """The layers of a model in order, the layers that MTP adds, and the sizes of an attention layer."""

    layers: tuple[str, ...]
    mtp: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    state: State | None
    caches_all_states: bool


def read_shape(config: object) -> Shape:
    """Read a config.json, of a vision model its text_config. Raises ValueError with the key at fault."""
    if not isinstance(config, dict) or not isinstance(config.get("text_config", {}), dict):
        raise ValueError("config or text_config is no JSON object")
    config = {**config, **config.get("text_config", {})}
    number = partial(json_field, config, read=_number)
    kind = config.get("model_type")
    if kind == "nemotron_h":
        layers, mtp, state = _nemotron(config)
    elif kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"):
        layers, mtp, state = _delta_net(config)
    elif kind in ("qwen3", "qwen3_moe", "llama") and not config.get("use_sliding_window", config.get("sliding_window")):
        layers, mtp, state = (ATTENTION,) * number("num_hidden_layers"), (), None
    else:
        raise ValueError(f"model_type {kind!r:.60} has no formula here, or it has a sliding_window")
    heads = number("num_attention_heads")
    head_dim = number("head_dim") if config.get("head_dim") else number("hidden_size") // heads
    kv_heads = number("num_key_value_heads", default=heads)
    element = json_field(config, "dtype", "torch_dtype", read=MODEL_BYTES.__getitem__)
    return Shape(layers, mtp, heads, kv_heads, head_dim, element, state, caches_all_states=kind == "nemotron_h")


def _nemotron(config: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], State | None]:
    """Return the layers, the layers of MTP and the state, as vLLM reads them in nemotron_h.py and nemotron_h_mtp.py."""
    number = partial(json_field, config, read=_number)
    mtp: tuple[str, ...] = ()
    if config.get("num_nextn_predict_layers"):
        mtp = json_field(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type", read=_layers)
        mtp *= number("num_nextn_predict_layers")
    state = State(
        heads=number("mamba_num_heads"),
        head_dim=number("mamba_head_dim"),
        columns=number("ssm_state_size"),
        groups=number("n_groups"),
        kernel=number("conv_kernel"),
        chunk=number("chunk_size", default=128),
        element=json_field(config, "mamba_ssm_cache_dtype", read=STATE_BYTES.__getitem__, default="float32"),
    )
    return json_field(config, "hybrid_override_pattern", "layers_block_type", read=_layers), mtp, state


def _delta_net(config: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...], State | None]:
    """Return the same for Qwen3-Next and Qwen3.5, most of whose layers are a gated delta net, as in qwen3_5.py."""
    number = partial(json_field, config, read=_number)
    if config.get("layer_types"):
        layers = json_field(config, "layer_types", read=_layers)
    else:
        every = number("full_attention_interval")
        layers = tuple(STATE if layer % every else ATTENTION for layer in range(1, number("num_hidden_layers") + 1))
    mtp = (ATTENTION,) * number("mtp_num_hidden_layers") if config.get("mtp_num_hidden_layers") else ()
    state = State(
        heads=number("linear_num_value_heads"),
        head_dim=number("linear_value_head_dim"),
        columns=number("linear_key_head_dim"),
        groups=number("linear_num_key_heads"),
        kernel=number("linear_conv_kernel_dim"),
        chunk=number("chunk_size", default=64),
        element=json_field(config, "mamba_ssm_dtype", "dtype", "torch_dtype", read=STATE_BYTES.__getitem__),
    )
    return layers, mtp, state


def json_field(fields: Mapping[str, Any], *keys: str, read: Callable[[Any], T], default: object = None) -> T:
    """Read the first of these keys that is set, otherwise the default. Raises ValueError with the key and its value."""
    found = next((fields[key] for key in keys if fields.get(key) is not None), default)
    try:
        return read(found)
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{' or '.join(keys)} is {found!r:.60}") from None


def _number(found: object) -> int:
    if type(found) is not int or not 0 < found <= 10**7:
        raise ValueError
    return found


def _layers(found: str | list[str]) -> tuple[str, ...]:
    if not found:
        raise ValueError
    return tuple(LAYERS[layer] for layer in found)


# --- The KV cache ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The blocks of one rank's cache: `block` tokens and `block_bytes` bytes each.

    A sequence takes `growing` blocks for each `block` tokens, and `fixed` blocks whatever its length. `held` blocks are
    never given out. With `states`, each sequence that is decoded needs a block of its own.
    """

    block: int
    block_bytes: int
    growing: int
    fixed: int
    held: int
    states: bool

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
    """Return the blocks of the cache as vLLM makes them on one pipeline stage, exact to the token.

    Raises CannotKnow where tensor parallelism does not divide the heads.
    """
    if demand.drafts and not shape.mtp:
        raise CannotKnow("The line asks for MTP, but config.json has no MTP layers.")
    layers = shape.layers + (shape.mtp if demand.drafts else ())
    attention, states = layers.count(ATTENTION), layers.count(STATE)
    if not attention or shape.heads % demand.tp or (shape.kv_heads % demand.tp and demand.tp % shape.kv_heads):
        raise CannotKnow(
            f"--tensor-parallel-size {demand.tp} cannot divide {attention} attention layers of {shape.heads} heads, and "
            f"{shape.kv_heads} heads for keys and values."
        )
    # Every rank has one head for keys and values at least.
    each = shape.element if demand.cache_dtype == "auto" else CACHE_BYTES[demand.cache_dtype]
    token = 2 * max(1, shape.kv_heads // demand.tp) * shape.head_dim * each
    held = int(demand.vllm > (0, 21, 0))  # newer versions count a block that is never given out
    if not shape.state or not states:
        return Layout(KERNEL_BLOCK, KERNEL_BLOCK * token * attention, growing=1, fixed=0, held=held, states=False)
    kept = kept_states(shape, demand)
    # A block has the fewest tokens whose keys and values are as large as one state.
    step = lcm(shape.state.chunk, KERNEL_BLOCK) if kept == "all" else KERNEL_BLOCK
    block = step * ceil(state_bytes(shape.state, demand, shape.element) / (step * token))
    # A group has as many layers as the rarer kind, or as the other kind if that has less than half more.
    few, many = sorted((attention, states))
    group = many if many < few * 1.5 else few
    of_states = ceil(states / group)
    growing = ceil(attention / group) + (of_states if kept == "all" else 0)
    fixed = of_states * {"none": 1 + demand.drafts, "align": 2 + demand.drafts, "all": 0}[kept]
    return Layout(block, block * token * group, growing, fixed, held, states=True)


def kept_states(shape: Shape, demand: Demand) -> str:
    """Return the states that vLLM keeps: `none` is one of a sequence, `align` two, and `all` one in every block."""
    if not demand.prefix:
        return "none"
    if not shape.caches_all_states or demand.vllm >= (0, 32, 0):  # 0.32.0 has this mode alone
        return "align"
    return demand.mode if demand.mode != "none" else "align" if demand.drafts else "all"


def state_bytes(state: State, demand: Demand, element: int) -> int:
    """Return the bytes of one layer's state on one rank. Its convolution has the model's element size."""
    if state.heads % demand.tp or state.groups % demand.tp:
        parts = f"the {state.heads} heads and {state.groups} groups of a state"
        raise CannotKnow(f"--tensor-parallel-size {demand.tp} cannot divide {parts}.")
    channels = (state.heads * state.head_dim + 2 * state.groups * state.columns) // demand.tp
    convolution = (state.kernel - 1 + demand.drafts) * channels * element
    own = state.element if demand.state_dtype == "auto" else STATE_BYTES[demand.state_dtype]
    return convolution + state.heads // demand.tp * state.head_dim * state.columns * own
