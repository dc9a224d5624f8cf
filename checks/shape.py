"""A model's shape: what of its config.json decides how much memory its cache takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from checks.fields import ATTENTION, STATE, CannotKnow, Fields


@dataclass(frozen=True)
class State:
    """A layer's constant state: Mamba-2's, or a gated delta net's, whose sizes play the same parts.

    `heads` of `head_dim` rows and `columns` columns; `groups` of `columns` beside them in the convolution, `kernel`
    steps wide; `chunk` tokens are computed at once; `dtype` is what `--mamba-ssm-cache-dtype auto` comes to.
    """

    heads: int
    head_dim: int
    columns: int
    groups: int
    kernel: int
    chunk: int
    dtype: str


@dataclass(frozen=True)
class Shape:
    """The layers of a model in order, then those that `mtp` adds; heads and sizes of the attention layers; `state`."""

    layers: tuple[str, ...]
    mtp: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    state: State | None = None
    caches_all_states: bool = False


def read(config: object, source: str) -> Shape:
    """The shape that a config.json describes; raises CannotKnow for an architecture or a value that is not known.

    source: how messages call the file. A vision model's text_config is the one that counts.
    """
    if not isinstance(config, Mapping):
        raise CannotKnow(f"{source} is no JSON object.")
    text = config.get("text_config", {})
    if not isinstance(text, Mapping):
        raise CannotKnow(f"{source}: text_config is no JSON object.")
    fields = Fields({**config, **text}, source)
    reader = _READERS.get(fields.text("model_type"))
    if reader is None:
        raise CannotKnow(f"{source}: model_type {fields.text('model_type')!r} has no memory formula here.")
    return reader(fields)


def _nemotron(fields: Fields) -> Shape:
    """NemotronH, as vLLM 0.21 reads it (nemotron_h.py, nemotron_h_mtp.py, models/config.py)."""
    pattern, extra = (
        name if name in fields.fields else f"{name.removesuffix('hybrid_override_pattern')}layers_block_type"
        for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern")
    )
    state = State(
        heads=fields.count("mamba_num_heads"),
        head_dim=fields.count("mamba_head_dim"),
        columns=fields.count("ssm_state_size"),
        groups=fields.count("n_groups"),
        kernel=fields.count("conv_kernel"),
        chunk=fields.count("chunk_size", 128),
        dtype=fields.text("mamba_ssm_cache_dtype", "float32"),
    )
    steps = fields.count("num_nextn_predict_layers", 0, least=0)
    mtp = fields.kinds(extra) * steps if steps else ()
    return Shape(fields.kinds(pattern), mtp, **fields.attention(), state=state, caches_all_states=True)


def _linear(fields: Fields) -> Shape:
    """Qwen3-Next and Qwen3.5: a gated delta net in most layers (vLLM 0.21 mamba_utils.py, qwen3_5.py)."""
    state = State(
        heads=fields.count("linear_num_value_heads"),
        head_dim=fields.count("linear_value_head_dim"),
        columns=fields.count("linear_key_head_dim"),
        groups=fields.count("linear_num_key_heads"),
        kernel=fields.count("linear_conv_kernel_dim"),
        chunk=fields.count("chunk_size", 64),
        dtype=fields.text("mamba_ssm_dtype", fields.dtype()),
    )
    mtp = (ATTENTION,) * fields.count("mtp_num_hidden_layers", 0, least=0)
    return Shape(_mixed(fields), mtp, **fields.attention(), state=state)


def _mixed(fields: Fields) -> tuple[str, ...]:
    """The layers by name, or every `full_attention_interval`th one with attention."""
    count = fields.count("num_hidden_layers")
    if fields.fields.get("layer_types") is not None:
        kinds = fields.kinds("layer_types")
        if len(kinds) != count:
            raise fields.wrong("num_hidden_layers")
        return kinds
    every = fields.count("full_attention_interval")
    return tuple(STATE if (layer + 1) % every else ATTENTION for layer in range(count))


def _plain(fields: Fields) -> Shape:
    """A transformer with full attention in every layer; a sliding window would need a formula of its own."""
    if fields.fields.get("use_sliding_window") or (
        fields.fields.get("sliding_window") and "use_sliding_window" not in fields.fields
    ):
        raise fields.wrong("sliding_window")
    return Shape((ATTENTION,) * fields.count("num_hidden_layers"), (), **fields.attention())


_READERS = {
    "nemotron_h": _nemotron,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"), _linear),
    **dict.fromkeys(("qwen3", "qwen3_moe", "llama"), _plain),
}
