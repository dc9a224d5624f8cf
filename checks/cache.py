"""vLLM's key-value cache in numbers: pages, blocks, and how many tokens they hold. Exact, as vLLM reckons it.

Sources, in vLLM 0.21.0: platforms/interface.py (_align_hybrid_block_size), v1/kv_cache_interface.py,
v1/core/kv_cache_utils.py (blocks, concurrency), model_executor/layers/mamba/mamba_utils.py (state shapes). Checked to
the token against readings of a real start, and against vLLM's own get_kv_cache_configs; see docs/memory.md.
"""

from dataclasses import dataclass
from math import lcm

from checks import groups
from checks.demand import CACHE_BYTES, STATE_BYTES, Demand
from checks.fields import ATTENTION, STATE, CannotKnow
from checks.shape import Shape, State

KERNEL_BLOCK = 16
# Where prefix caching has one mode only, and the start counts the null block that is never given out; 0.21.0 has
# neither yet, and which release between them brought each was not looked up.
ONE_MODE = (0, 32, 0)
NULL_BLOCK = (0, 21, 1)
MODEL_BYTES = {"bfloat16": 2, "float16": 2, "float32": 2}


@dataclass(frozen=True)
class Layout:
    """How the cache of one rank is cut: `block` tokens in a block, `block_bytes` bytes for it in all layers of a group.

    A sequence takes `growing` blocks for every `block` tokens, and `fixed` blocks whatever its length; `held` blocks
    are never given out. With `states`, a sequence that is decoded needs a block of its own.
    """

    block: int
    block_bytes: int
    growing: int
    fixed: int
    states: bool
    held: int

    def blocks(self, cache: int) -> int:
        """The blocks in so many bytes: vLLM's `get_num_blocks`."""
        return max(cache, 0) // self.block_bytes

    def needed(self, length: int) -> int:
        """The blocks of one sequence of so many tokens: vLLM's `_max_memory_usage_bytes_from_groups`, in blocks."""
        return self.growing * -(-length // self.block) + self.fixed

    def least(self, length: int) -> int:
        """The least bytes per rank with which vLLM starts for sequences of so many tokens."""
        return (self.needed(length) + self.held) * self.block_bytes

    def largest(self, blocks: int) -> int:
        """The most tokens that one sequence may have in so many blocks; 0 if it may have none."""
        return max((blocks - self.held - self.fixed) // self.growing, 0) * self.block

    def concurrency(self, blocks: int, length: int) -> float:
        """How many sequences of so many tokens fit at once, as vLLM's log says it."""
        return blocks / self.needed(length)

    def tokens(self, blocks: int, length: int) -> int:
        """What vLLM's log calls "GPU KV cache size"."""
        return int(self.concurrency(blocks, length) * length)


def layout(shape: Shape, demand: Demand) -> Layout:
    """How vLLM cuts the cache of a model for a demand; raises CannotKnow where tp does not divide its heads."""
    layers = _layers(shape, demand)
    states = layers.count(STATE)
    kept = mode(shape, demand) if states else "none"
    token = _token_bytes(shape, demand)
    block = _block(shape, demand, token, kept) if states else KERNEL_BLOCK
    size = groups.size(layers)
    width = groups.widest(layers, len(layers) - len(shape.layers), size, demand.pp)
    of_states = -(-states // size)
    growing = -(-layers.count(ATTENTION) // size) + (of_states if kept == "all" else 0)
    held = 1 if demand.vllm >= NULL_BLOCK else 0
    once = {"none": 1 + demand.speculative, "align": 2 + demand.speculative, "all": 0}[kept]
    return Layout(block, block * token * width, growing, of_states * once, states > 0, held)


def state_bytes(state: State, demand: Demand, dtype: str) -> int:
    """The bytes of one layer's state on one rank: convolution in the model's dtype, the rest in the state's own.

    Mamba-2 and the gated delta net alike; vLLM's mamba2_state_shape and gated_delta_net_state_shape.
    """
    for name, count in (("heads", state.heads), ("groups", state.groups)):
        if count % demand.tp:
            raise CannotKnow(f"The state has {count} {name}, which --tensor-parallel-size {demand.tp} does not divide.")
    channels = (state.heads * state.head_dim + 2 * state.groups * state.columns) // demand.tp
    own = state.dtype if demand.state_dtype == "auto" else demand.state_dtype
    if own not in STATE_BYTES:
        raise CannotKnow(f"The state's dtype {own!r} is not known here.")
    convolution = (state.kernel - 1 + demand.speculative) * channels * _model_bytes(dtype)
    return convolution + state.heads // demand.tp * state.head_dim * state.columns * STATE_BYTES[own]


def mode(shape: Shape, demand: Demand) -> str:
    """Which states vLLM keeps: one of a sequence, two with prefix caching (`align`), or one in every block (`all`)."""
    if not demand.prefix:
        return "none"
    keeps_all = shape.caches_all_states and demand.vllm < ONE_MODE
    return (demand.mode if keeps_all else "align") or ("align" if demand.speculative else "all")


def _layers(shape: Shape, demand: Demand) -> tuple[str, ...]:
    """The layers that the demand runs, MTP's last."""
    if demand.speculative and not shape.mtp:
        raise CannotKnow("MTP is asked for, but config.json has no MTP layers.")
    if ATTENTION not in shape.layers:
        raise CannotKnow("A model without attention has no cache that this reckons.")
    return shape.layers + (shape.mtp if demand.speculative else ())


def _block(shape: Shape, demand: Demand, token: int, kept: str) -> int:
    """The fewest tokens, in whole kernel blocks, whose keys and values take as much as one state."""
    step = lcm(shape.state.chunk, KERNEL_BLOCK) if kept == "all" else KERNEL_BLOCK
    return step * -(-state_bytes(shape.state, demand, shape.dtype) // (step * token))


def _token_bytes(shape: Shape, demand: Demand) -> int:
    """Bytes of one token's keys and values in one layer on one rank; every rank has a KV head at least."""
    heads, tp = shape.kv_heads, demand.tp
    if shape.heads % tp or (heads % tp and tp % heads):
        raise CannotKnow(
            f"{shape.heads} heads, {heads} for keys and values: --tensor-parallel-size {tp} splits neither."
        )
    each = _model_bytes(shape.dtype) if demand.cache_dtype == "auto" else CACHE_BYTES[demand.cache_dtype]
    return 2 * max(1, heads // tp) * shape.head_dim * each


def _model_bytes(dtype: str) -> int:
    """Bytes of the model's own dtype; vLLM runs a float32 checkpoint in 16 bits."""
    if dtype not in MODEL_BYTES:
        raise CannotKnow(f"The model's dtype {dtype!r} is not known here.")
    return MODEL_BYTES[dtype]
