"""A `vllm serve` line, read as vLLM's parser reads it: which options stand on it, and with which values."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One option of a line: its name with dashes, and the words that follow it."""

    name: str
    values: tuple[str, ...]


def read(words: Sequence[str]) -> tuple[Option, ...]:
    """The options of a line in order; what stands before the first (`vllm serve MODEL`) is none.

    `--a_b=c` is `--a-b c`, as in vLLM's FlexibleArgumentParser. A word is an option if it starts with two dashes, or
    with one and a letter; a negative number is a value.
    """
    found: list[Option] = []
    for word in words:
        if word[:2] == "--" or (word[:1] == "-" and word[1:2].isalpha()):
            name, *value = word.split("=", 1)
            found.append(Option(_dashed(name), tuple(value)))
        elif found:
            found[-1] = Option(found[-1].name, (*found[-1].values, word))
    return tuple(found)


def value(options: Sequence[Option], *names: str) -> str | None:
    """The value of the last option that has one of these names, "" for one without; None if there is no such option."""
    given = [option.values for option in options if option.name in names]
    return " ".join(given[-1]) if given else None


def flag(options: Sequence[Option], name: str) -> bool | None:
    """Whether the last of `--name` and its negation says yes; None if neither is on the line."""
    no = ("--no-" + name.removeprefix("--"), "--disable-" + name.removeprefix("--enable-"))
    said = [option.name == name for option in options if option.name == name or option.name in no]
    return said[-1] if said else None


def _dashed(name: str) -> str:
    """The part in front of a dot with dashes: `--speculative_config.method` is `--speculative-config.method`."""
    head, dot, rest = name.partition(".")
    return head.replace("_", "-") + dot + rest
