"""What an image's vLLM would stop at on a `vllm serve` line: by the list of its options, and by its version."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from checks import line
from checks.line import Option

Version = tuple[int, ...]
Environment = Mapping[str, str]


@dataclass(frozen=True)
class Known:
    """What one vLLM knows: its version, and each spelling of each option with its choices, None for any value.

    `checks/ask_options.py` prints one as JSON: {"vllm": "0.21.0", "options": {"--moe-backend": ["auto", ...]}}.
    """

    vllm: str
    options: Mapping[str, Sequence[str] | None]


@dataclass(frozen=True)
class Problem:
    """An option that this vLLM would stop at, and why in words."""

    option: str
    why: str


@dataclass(frozen=True)
class Rule:
    """What an option list cannot show: an option that parses, and that this vLLM then refuses."""

    option: str
    why: str
    applies: Callable[[Sequence[Option], Version, Environment], bool]


def version(text: str) -> Version:
    """The release's three numbers: 0.21.0+2325b6f0.nvinternal is (0, 21, 0); raises ValueError for anything else."""
    found = re.match(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text, re.ASCII)
    if not found:
        raise ValueError(f"{text[:60]!r} is no version of vLLM.")
    return tuple(int(number or 0) for number in found.groups())


def known(answer: object) -> Known:
    """What `ask_options.py` printed, loaded; raises ValueError if it is anything else."""
    options = answer.get("options") if isinstance(answer, dict) else None
    if not isinstance(options, dict) or not options or not isinstance(answer.get("vllm"), str):
        raise ValueError("The image's answer is no list of options.")
    for name, choices in options.items():
        if choices is not None and not (isinstance(choices, list) and all(isinstance(one, str) for one in choices)):
            raise ValueError(f"The image's answer has no choices for {name}: {repr(choices)[:60]}")
    version(answer["vllm"])
    return Known(answer["vllm"], options)


def examine(words: Sequence[str], image: Known, env: Environment) -> list[Problem]:
    """All that this vLLM would stop at; env is what its containers start with."""
    options, vllm = line.read(words), version(image.vllm)
    found = [problem for option in options for problem in _unknown(option, image)]
    return found + [Problem(rule.option, rule.why) for rule in RULES if rule.applies(options, vllm, env)]


def _unknown(option: Option, image: Known) -> list[Problem]:
    """An option that the list lacks, or a value that is not among its choices; a dotted one is its head's."""
    name = option.name.partition(".")[0]
    if name not in image.options:
        return [Problem(option.name, "vLLM's parser has no such option")]
    choices = image.options[name]
    strangers = [value for value in option.values if choices is not None and value not in choices]
    return [Problem(option.name, f"{value} is none of its choices, {', '.join(choices)}") for value in strangers]


def _async_under_ray(options: Sequence[Option], vllm: Version, env: Environment) -> bool:
    """Ray's older executor, RayDistributedExecutor, runs unless the newer one is asked for, or is the default."""
    newer = env.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1" if vllm >= (0, 21, 0) else "0") == "1"
    on_ray = line.value(options, "--distributed-executor-backend") == "ray"
    return on_ray and bool(line.flag(options, "--async-scheduling")) and not (newer and vllm >= (0, 20, 0))


def _parser_not_built_in(options: Sequence[Option], vllm: Version, _: Environment) -> bool:
    """A parser that no plugin brings and that this vLLM has not registered."""
    asked, brought = line.value(options, "--reasoning-parser"), line.value(options, "--reasoning-parser-plugin")
    return not brought and (asked == "super_v3" or (asked == "nemotron_v3" and vllm < (0, 17, 1)))


def _drafter_backend(options: Sequence[Option], vllm: Version, _: Environment) -> bool:
    """The drafter's own moe_backend is a field of SpeculativeConfig from 0.19.0 on; an unknown field is an error."""
    return '"moe_backend"' in (line.value(options, "--speculative-config") or "") and vllm < (0, 19, 0)


# Read in the sources of 0.11.0, 0.12.0, 0.17.1, 0.18.0, 0.19.0, 0.20.2, 0.21.0 and 0.32.0. (0.11.0 has no such check
# for async scheduling, but its only Ray executor is the older one.)
RULES = (
    Rule("--async-scheduling", "Ray's executor before vLLM 0.21 does not support it", _async_under_ray),
    Rule("--reasoning-parser", "no plugin brings it, and nemotron_v3 came with vLLM 0.17.1", _parser_not_built_in),
    Rule("--speculative-config", "the drafter's moe_backend came with vLLM 0.19.0", _drafter_backend),
)
