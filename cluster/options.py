"""The options of a `vllm serve` line that the image's vLLM would stop at, and the knob that takes each off the line.

Without this check vLLM stops by itself, a minute after the start, and names the option but no way on.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.command import render, say, words_of
from cluster.engine import ask_container, container_environment
from cluster.finding import Finding, vllm_version
from cluster.node import IN_SHELL, INSIDE, log_folder
from cluster.recorder import keep_json, kept_json
from cluster.server import EARLIER, is_earlier, serve_values
from cluster.settings import ModelSettings

if TYPE_CHECKING:
    from docker.models.containers import Container

# `inv build-image` leaves the answer of inside/options.py here.
BUILT_IN = "/opt/node-ray/options.json"


@dataclass(frozen=True)
class Known:
    """The version of one vLLM, and every spelling of its options: the choices of each, or None where any value fits."""

    vllm: str
    options: Mapping[str, Sequence[str] | None]


# --- What the image's vLLM knows --------------------------------------------------------------------------------------


def ask_inside(head: Container, seconds: int, script: str, *words: str) -> str:
    """Run a script of cluster/inside in the head's container, for so many seconds at most; its standard output.

    Raises Exit if it fails, and where an earlier version of this repository started the container.
    """
    if is_earlier(head):
        raise Exit(EARLIER)
    limited = ("timeout", "--kill-after=2", str(seconds), "python3", f"{INSIDE}/{script}", *words)
    return ask_container(head, "/bin/bash", "-c", IN_SHELL, "bash", *limited)


def known_options(head: Container, settings: ModelSettings) -> Known:
    """The options of the vLLM in the head's container, which this host keeps by the image's id.

    Asks the file that `inv build-image` put into the image, else vLLM itself. Raises Exit if neither tells.
    """
    kept = log_folder(settings) / f"options-{head.image.id.removeprefix('sha256:')[:12]}.json"
    if (told := kept_json(kept)) is None:
        try:
            answer = ask_container(head, "cat", BUILT_IN)
        except Exit:
            say("Asking the image's vLLM for its options. That takes half a minute, once for each image.")
            answer = ask_inside(head, 180, "options.py").strip().rpartition("\n")[2]
        try:
            told = json.loads(answer)
            vllm_version(told["vllm"])
            dict(told["options"])
        except (ValueError, KeyError, TypeError) as error:
            raise Exit(f"The image's vLLM did not tell its options ({error!r}): {answer[:60]!r}") from None
        with contextlib.suppress(OSError):  # a full disk costs half a minute at the next launch, and nothing else
            keep_json(kept, told)
    return Known(told["vllm"], told["options"])


# --- The options that this vLLM would stop at -------------------------------------------------------------------------


def examine(words: Sequence[str], known: Known, env: Mapping[str, str]) -> dict[str, str]:
    """A sentence for each option of a line that this vLLM would stop at; env: the variables of its containers."""
    given = given_options(words)
    found = dict(_refused_later(given, vllm_version(known.vllm), env))
    for name, values in given:
        option = name.partition(".")[0]
        if option not in known.options:
            found[name] = "vLLM's parser has no such option"
        elif (choices := known.options[option]) is not None:
            for value in set(values) - set(choices):
                found[name] = f"{value} is none of its choices, {', '.join(choices)}"
    return {option: f"{option}: {why}; this image has vLLM {known.vllm}." for option, why in found.items()}


def given_options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The options of a line with their values, read as vLLM's parser reads them: `--a_b=c` is `--a-b c`."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or (word.startswith("-") and word[1:2].isalpha()):  # -1 is a value
            name, equals, value = word.partition("=")
            option, dot, field = name.partition(".")
            found.append((option.replace("_", "-") + dot + field, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


def _refused_later(
    given: Sequence[tuple[str, list[str]]], vllm: tuple[int, ...], env: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Options that vLLM's parser takes and its start then refuses.

    Read in the sources of vLLM 0.11.0, 0.12.0, 0.17.1, 0.18.0, 0.19.0, 0.20.2, 0.21.0 and 0.32.0. (0.11.0 does not
    refuse asynchronous scheduling, but its only Ray executor is the older one.)
    """
    last = {name: " ".join(values) for name, values in given}
    # RayDistributedExecutor, the older executor, runs unless the newer one is asked for, or is the default.
    newer = env.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1" if vllm >= (0, 21, 0) else "0") == "1" and vllm >= (0, 20)
    asked = [name for name, _ in given if name in ("--async-scheduling", "--no-async-scheduling")]
    on_ray = last.get("--distributed-executor-backend") == "ray"
    if asked[-1:] == ["--async-scheduling"] and on_ray and not newer:
        yield "--async-scheduling", "Ray's executor before vLLM 0.21 does not support it"
    parser = last.get("--reasoning-parser")
    if "--reasoning-parser-plugin" not in last and (
        parser == "super_v3" or (parser == "nemotron_v3" and vllm < (0, 17, 1))
    ):
        yield "--reasoning-parser", "no plugin brings it, and nemotron_v3 came with vLLM 0.17.1"
    if '"moe_backend"' in last.get("--speculative-config", "") and vllm < (0, 19, 0):
        yield "--speculative-config", "the drafter's moe_backend came with vLLM 0.19.0"


# --- The knobs that take an option off the line -----------------------------------------------------------------------


def gated(
    settings: ModelSettings, head: Container, known: Known
) -> tuple[ModelSettings, Sequence[str], Sequence[Finding]]:
    """Settings to go on with, a sentence for each knob that IMAGE_GATES=auto has emptied, and what is still wrong."""
    env, launch = container_environment(head), settings.launch_line
    emptied: list[str] = []
    said: list[str] = []
    while problems := examine(_line(settings, emptied), known, env):
        knobs = {option: knob for option in problems if (knob := _knob(settings, emptied, option))}
        if not knobs or settings["IMAGE_GATES"] != "auto":
            break
        option, knob = next(iter(knobs.items()))
        emptied.append(knob)
        said.append(f"{problems[option]} IMAGE_GATES=auto sets {_spelled(knob)}")
    findings = []
    for option, problem in problems.items():
        if option in knobs:
            do = f"Type: {_spelled(knobs[option])} {launch}; or: IMAGE_GATES=auto {launch}"
        else:
            in_template = option in dict(given_options(_line(settings, ["SERVE_EXTRA"])))
            place = f"{settings.model.serve}, which has no knob for it," if in_template else "SERVE_EXTRA"
            do = f"Take it out of {place} or serve with another image: VLLM_IMAGE=... {launch}"
        findings.append(Finding("options", f"{problem} {do}"))
    return settings.emptied(emptied, "IMAGE_GATES=auto"), said, findings


def _spelled(knob: str) -> str:
    """The words with which a person empties a knob: `ENABLE_X=0`, and `NAME=` for the others."""
    return f"{knob}={'0' if knob.startswith('ENABLE_') else ''}"


def _line(settings: ModelSettings, emptied: Sequence[str]) -> list[str]:
    """The words of the `vllm serve` line with some knobs emptied."""
    return words_of(render(settings.model.serve, **serve_values(settings) | dict.fromkeys(emptied, "")))


def _knob(settings: ModelSettings, emptied: Sequence[str], option: str) -> str | None:
    """The knob that drops the option: an ENABLE_ one before others, then the one that drops the fewest words."""
    dropping = {}
    for knob in settings.model.knobs - {"SERVE_EXTRA"}:
        if settings.get(knob) and option not in dict(given_options(words := _line(settings, [*emptied, knob]))):
            dropping[knob] = len(words)
    return min(dropping, key=lambda knob: (not knob.startswith("ENABLE_"), -dropping[knob], knob), default=None)
