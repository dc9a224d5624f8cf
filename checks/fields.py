"""Fields of a config.json that someone else wrote: each is checked as it is read."""

from collections.abc import Mapping

ATTENTION, STATE, OTHER = "attention", "state", "other"
MOST = 10**7

# The letters of `hybrid_override_pattern`, and the words of `layers_block_type` and `layer_types` (transformers 5).
_LETTERS = {"*": ATTENTION, "M": STATE, "E": OTHER, "-": OTHER}
_WORDS = {
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mamba": STATE,
    "linear_attention": STATE,
    "moe": OTHER,
    "mlp": OTHER,
}


class CannotKnow(ValueError):
    """What a check would have to guess; the text says what, and where it was looked for."""


class Fields:
    """Fields of a config.json that someone else wrote, each checked as it is read."""

    def __init__(self, fields: Mapping, source: str) -> None:
        self.fields, self.source = fields, source

    def wrong(self, name: str) -> CannotKnow:
        """The error that says what the field called name is instead."""
        return CannotKnow(f"{self.source}: {name} is {repr(self.fields.get(name))[:60]}.")

    def text(self, name: str, otherwise: str | None = None) -> str:
        """A field of text; raises CannotKnow."""
        found = self.fields.get(name, otherwise)
        if not isinstance(found, str):
            raise self.wrong(name)
        return found

    def count(self, name: str, otherwise: int | None = None, least: int = 1) -> int:
        """A whole number from least to MOST; raises CannotKnow."""
        found = self.fields.get(name)
        found = otherwise if found is None else found
        if type(found) is not int or not least <= found <= MOST:
            raise self.wrong(name)
        return found

    def kinds(self, name: str) -> tuple[str, ...]:
        """The kinds of layers that a pattern of letters, or a list of words, spells; raises CannotKnow."""
        found = self.fields.get(name)
        names = _LETTERS if isinstance(found, str) else _WORDS
        if not isinstance(found, str | list) or not 0 < len(found) <= MOST:
            raise self.wrong(name)
        if any(not isinstance(kind, str) or kind not in names for kind in found):
            raise self.wrong(name)
        return tuple(names[kind] for kind in found)

    def dtype(self) -> str:
        """The model's own dtype, by its newer or its older name."""
        return self.text("dtype" if self.fields.get("dtype") is not None else "torch_dtype")

    def attention(self) -> dict[str, int | str]:
        """What every model with attention says of its heads; a head that is not said is a share of the hidden size."""
        heads = self.count("num_attention_heads")
        head_dim = self.fields.get("head_dim") or self.count("hidden_size") // heads
        sizes = Fields({**self.fields, "head_dim": head_dim}, self.source)
        kv_heads = sizes.count("num_key_value_heads", heads)
        return {"heads": heads, "kv_heads": kv_heads, "head_dim": sizes.count("head_dim"), "dtype": self.dtype()}
