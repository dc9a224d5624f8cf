"""The result of a rule: a disagreement or a shortage that was found before a model is loaded."""

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """`rule` is the name that `--allow` takes. `text` says the cause, the values, and the command to type.

    A finding that refuses keeps the model from being loaded. The others are warnings.
    """

    rule: str
    text: str
    refuses: bool = True


class CannotKnow(ValueError):
    """A rule would have to guess. The text says which value is missing or not understood, and where it stands."""


def vllm_version(text: str) -> tuple[int, ...]:
    """Return the three numbers of a release: 0.21.0+2325b6f0.nvinternal is (0, 21, 0). Raises ValueError otherwise."""
    found = re.match(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text, re.ASCII)
    if not found:
        raise ValueError(f"{text[:60]!r} is no version of vLLM.")
    return tuple(int(number or 0) for number in found.groups())
