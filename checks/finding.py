"""What a check found: the name of the rule, whether it forbids loading a model, and what a person should know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`rule` is what `--allow` takes; `text` says the cause, the values side by side, and what to type where."""

    rule: str
    text: str
    refuses: bool = True
