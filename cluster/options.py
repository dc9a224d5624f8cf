"""The options of a `vllm serve` line that the image's vLLM refuses, and the knob that takes each off the line.

Without this check vLLM stops a minute after its start, and names the option but not the knob.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from invoke import Exit

from cluster.command import say
from cluster.engine import ask_container, container_environment
from cluster.finding import Finding, vllm_version
from cluster.node import IN_SHELL, INSIDE, log_folder
from cluster.recorder import keep_json, kept_json
from cluster.served import EARLIER, is_earlier
from cluster.server import serve_words
from cluster.settings import ModelSettings

if TYPE_CHECKING:
    from docker.models.containers import Container

T = TypeVar("T")
# `inv build-image` puts the answer of inside/options.py here.
BUILT_IN = "/opt/node-ray/options.json"


@dataclass(frozen=True)
class Known:
    """The version of one vLLM, and the choices of each option in every spelling. None: the option takes any value."""

    vllm: str
    options: Mapping[str, Sequence[str] | None]


# --- What the image's vLLM knows --------------------------------------------------------------------------------------


def ask_inside(head: Container, seconds: float, read: Callable[[Any], T], *words: str) -> T:
    """Run a command in the head's container, for so many seconds at most, and read the JSON in its last line.

    Raises Exit if the command fails, if `read` rejects the JSON, and for a container of an earlier version.
    """
    if is_earlier(head):
        raise Exit(EARLIER)
    limited = ("timeout", "--signal=KILL", str(seconds), *words)
    answer = ask_container(head, "/bin/bash", "-c", IN_SHELL, "bash", *limited)
    try:
        return read(json.loads(answer.splitlines()[-1]))
    except (ValueError, LookupError, TypeError) as error:
        raise Exit(f"{words[1]} in {head.name} gave an unreadable answer ({error!r}): {answer[-200:]!r}") from None


def known_options(head: Container, settings: ModelSettings) -> Known:
    """Read the options of the image's vLLM from this host's file, the image's file, or vLLM itself. May raise Exit."""
    kept = log_folder(settings) / f"options-{head.image.id.removeprefix('sha256:')[:12]}.json"
    if told := kept_json(kept, "vllm", "options"):
        return Known(**told)
    try:
        known = ask_inside(head, 20, _read_known, "cat", BUILT_IN)
    except Exit:
        say("Asking the image's vLLM for its options. That takes half a minute, once for each image.")
        known = ask_inside(head, 180, _read_known, "python3", f"{INSIDE}/options.py")
    with contextlib.suppress(OSError):  # with a full disk vLLM is asked again at the next launch
        keep_json(kept, vars(known))
    return known


def _read_known(told: Any) -> Known:  # noqa: ANN401 - JSON of any form
    vllm_version(told["vllm"])
    return Known(told["vllm"], dict(told["options"]))


# --- The options that this vLLM refuses -------------------------------------------------------------------------------


def examine(words: Sequence[str], known: Known, env: Mapping[str, str]) -> dict[str, str]:
    """Return a sentence for each option that this vLLM refuses. env: the variables of its containers.

    vLLM's parser accepts the first three, but its start refuses them: read in eight releases from 0.11.0 to 0.32.0.
    """
    given, vllm = given_options(words), vllm_version(known.vllm)
    last = {name: " ".join(values) for name, values in given}
    found = {}
    # The older executor, RayDistributedExecutor, runs unless the newer one is asked for or is the default.
    newer = env.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1" if vllm >= (0, 21, 0) else "0") == "1" and vllm >= (0, 20)
    overlaps = "--async-scheduling" in last and "--no-async-scheduling" not in last
    if overlaps and last.get("--distributed-executor-backend") == "ray" and not newer:
        found["--async-scheduling"] = "Ray's executor before vLLM 0.21 does not support it"
    from_plugin = ["super_v3"] if vllm >= (0, 17, 1) else ["super_v3", "nemotron_v3"]
    if last.get("--reasoning-parser") in from_plugin and "--reasoning-parser-plugin" not in last:
        found["--reasoning-parser"] = "no plugin brings it, and nemotron_v3 came with vLLM 0.17.1"
    if '"moe_backend"' in last.get("--speculative-config", "") and vllm < (0, 19, 0):
        found["--speculative-config"] = "the drafter's moe_backend came with vLLM 0.19.0"
    for name, values in given:
        option = name.partition(".")[0]
        if option not in known.options:
            found[name] = "vLLM's parser has no such option"
        elif (choices := known.options[option]) is not None:
            for value in set(values) - set(choices):
                found[name] = f"{value} is none of its choices, {', '.join(choices)}"
    return {option: f"{option}: {why}; this image has vLLM {known.vllm}." for option, why in found.items()}


def given_options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the options of a line with their values, as vLLM's parser reads them: `--a_b=c` is `--a-b c`."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or (word.startswith("-") and word[1:2].isalpha()):  # -1 is a value
            name, equals, value = word.partition("=")
            option, dot, field = name.partition(".")
            found.append((option.replace("_", "-") + dot + field, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


# --- The knobs that take an option off the line -----------------------------------------------------------------------


def gated(settings: ModelSettings, head: Container, known: Known) -> tuple[ModelSettings, list[str], list[Finding]]:
    """Return the settings for the launch, a sentence for each knob that IMAGE_GATES=auto emptied, and the findings."""
    findings: list[Finding] = []
    for option, problem in examine(serve_words(settings), known, container_environment(head)).items():
        if knob := _knob(settings, option):
            off = "0" if knob.startswith("ENABLE_") else ""
            if settings["IMAGE_GATES"] == "auto":  # the line is read anew, because one knob may write several options
                settings, said, findings = gated(settings.emptied([knob], "IMAGE_GATES=auto"), head, known)
                return settings, [f"{problem} IMAGE_GATES=auto sets {knob}={off}", *said], findings
            do = f"Type: {settings.line(**{knob: off})}; or: {settings.line(IMAGE_GATES='auto')}"
        else:
            in_template = option in dict(given_options(serve_words(settings.emptied(["SERVE_EXTRA"], "a trial"))))
            place = f"{settings.model.serve}, which has no knob for it," if in_template else "SERVE_EXTRA"
            do = f"Take it out of {place} or serve with another image: {settings.line(VLLM_IMAGE='...')}"
        findings.append(Finding("options", f"{problem} {do}"))
    return settings, [], findings


def uncontradicted(settings: ModelSettings) -> ModelSettings:
    """Return the settings. Raise Exit if SERVE_EXTRA has an option of a knob: recorder and checks go by the knob."""
    plain = settings.emptied(["SERVE_EXTRA"], "a trial")
    written = dict(given_options(serve_words(plain)))
    # `--no-x` is --x, `--x.y` is a part of --x, and `-tp` is --tensor-parallel-size.
    long = {"-" + "".join(part[:1] for part in name[2:].removesuffix("-size").split("-")): name for name in written}
    for extra, _ in given_options(shlex.split(settings["SERVE_EXTRA"])):
        option = extra.partition(".")[0].replace("--no-", "--", 1)
        option = long.get(option, option)
        for knob, words in _lines_without(plain).items():
            if dict(given_options(words)).get(option) != written.get(option):
                raise Exit(f"SERVE_EXTRA has {extra}, which {knob} writes. Take it out of SERVE_EXTRA, and set {knob}.")
    return settings


def _lines_without(settings: ModelSettings) -> dict[str, list[str]]:
    """Return the server's line without each knob that is set. In this order ENABLE_X comes behind X."""
    knobs = sorted(filter(settings.get, settings.model.knobs - {"SERVE_EXTRA"}), reverse=True)
    return {knob: serve_words(settings.emptied([knob], "a trial")) for knob in knobs}


def _knob(settings: ModelSettings, option: str) -> str | None:
    """Choose the knob that drops the option: an ENABLE_ one before others, then the one that drops the fewest words."""
    lines = _lines_without(settings)
    dropping = {knob: len(words) for knob, words in lines.items() if option not in dict(given_options(words))}
    return min(dropping, key=lambda knob: (not knob.startswith("ENABLE_"), -dropping[knob], knob), default=None)
