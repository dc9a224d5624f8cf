"""How the cluster is, asked on the head: a token through the real API, every rank, memory, links, the GPU."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from invoke import Exit

from checks import nodes
from cluster import guards
from cluster.node import CONTAINER
from command import run, template
from command.command import Command, say, tell
from host import engine
from settings.resolve import Settings
from vitals import api, recorded, served, unanswered
from vitals.judge import GIB, judge
from vitals.states import Limits, Seen, State, Verdict

if TYPE_CHECKING:
    from docker.models.containers import Container

TOKEN_S = 3


@dataclass(frozen=True)
class Health:
    """The verdict, and what each part said: whether it is well, its name, its words."""

    verdict: Verdict
    parts: tuple[tuple[bool, str, str], ...]


def gpu() -> Command:
    """The command that names this host's GPU; its memory columns would say [N/A] on GB10."""
    return Command(template.render("nvidia_smi.j2", container=None), "this node")


def gpu_inside() -> Command:
    """The same in the node's container."""
    return Command(template.render("nvidia_smi.j2", container=CONTAINER), "this node")


def report(settings: Settings, as_json: bool) -> State:
    """Say how every part is, whatever the others are, and what it comes to; the state."""
    found = look(settings)
    for well, name, words in found.parts:
        say(f"{'ok  ' if well else 'FAIL'}  {name}: {words}")
    verdict = found.verdict
    say(f"{verdict.state}: {verdict.why}" + (f" Next: {verdict.next}" if verdict.next else ""))
    if as_json:
        parts = {name: {"well": well, "says": words} for well, name, words in found.parts}
        state = {"state": str(verdict.state), "code": verdict.state.code, "why": verdict.why, "next": verdict.next}
        tell(json.dumps(state | {"parts": parts}, indent=1))
    return verdict.state


def look(settings: Settings) -> Health:
    """Ask every part, all at once; raises Exit on a worker, which cannot tell, or where Docker cannot be asked."""
    with ThreadPoolExecutor() as pool:
        gpus = {"GPU on the host": pool.submit(_gpu, gpu()), "GPU in the container": pool.submit(_gpu, gpu_inside())}
        head = _head()
        seen = _seen(settings, head) if head else Seen()
        if head is None:
            del gpus["GPU in the container"]
        told = {name: asked.result() for name, asked in gpus.items()}
    seen = replace(seen, broken={name: words for name, (well, words) in told.items() if not well})
    verdict = judge(seen, limits(settings)) if head else _nothing()
    parts = [*_parts(seen), *((well, name, words) for name, (well, words) in told.items())]
    return Health(verdict, tuple(parts))


def limits(settings: Settings) -> Limits:
    """What the settings say of patience and memory."""
    return Limits(int(settings["HANG_S"]), int(settings["STALL_S"]), float(settings["MEM_WARN_GIB"]))


def _head() -> Container | None:
    found = engine.node()
    if found is None or found.status != "running":
        return None
    guards.is_head(found)
    return found


def _nothing() -> Verdict:
    return Verdict(State.NOT_RUNNING, f"No {CONTAINER} runs on this node.", "inv up --model NAME, or: inv head")


def _seen(settings: Settings, head: Container) -> Seen:
    """What the head's container, its server and, where the recorder does not tell, Ray say."""
    found = served.ask(head)
    seen = _api(settings, Seen(found))
    # Read after the token was waited for: what the ranks did meanwhile counts.
    seen = replace(seen, recorded=recorded.read(settings) if found else None)
    if seen.answer:
        seen = replace(seen, waited=unanswered.note(settings, seen.answer.silent))
    broken = seen.answer and seen.answer.status and seen.answer.status >= 500
    if found and found.alive and seen.fresh and all(seen.fresh.nodes.values()) and not broken:
        return replace(seen, nodes=list(seen.fresh.nodes))
    return replace(seen, nodes=_nodes(head))


def _api(settings: Settings, seen: Seen) -> Seen:
    """The same with the API's answer to one token, and whether its counters moved meanwhile."""
    if not (seen.server and seen.server.alive):
        return seen
    url = seen.server.url
    with ThreadPoolExecutor() as pool:
        before = pool.submit(api.metrics, url)
        answer = api.generate(url, settings.get("VLLM_API_KEY"), TOKEN_S)
        if not answer.silent:
            return replace(seen, answer=answer)
        first, last = before.result(), api.metrics(url)
    moving = first is not None and last is not None and first.moving != last.moving
    return replace(seen, answer=answer, moving=moving, metrics=last or first)


def _nodes(head: Container) -> list[str] | None:
    """The addresses of the nodes that Ray has, busy or not; None if Ray could not be asked."""
    try:
        return [node.address for node in nodes.ask(head)]
    except Exit:
        return None


def _parts(seen: Seen) -> list[tuple[bool, str, str]]:
    facts = (seen.fresh.nodes if seen.fresh else {}) if seen.server and seen.server.alive else {}
    counted = [f"{at} (ranks: {facts[at]['ranks']})" if facts.get(at) else at for at in seen.nodes or ()]
    told = f"{len(counted)} nodes: {', '.join(counted)}" if counted else "it does not answer, or runs not here"
    parts = [(bool(counted), "Ray", told)]
    if seen.answer:
        said = seen.answer.text[:100] if not seen.answer.well else f"one token in {seen.answer.seconds:.2f} s"
        parts.append((seen.answer.well, "API", f"{seen.answer.status or 'no answer'}: {said}"))
    left = [f"{at} {told['available'] / GIB:.1f} GiB" for at, told in facts.items() if told]
    if left:
        parts.append((True, "Memory available", ", ".join(left)))
    return parts


def _gpu(command: Command) -> tuple[bool, str]:
    try:
        named = run.output(command)
        return bool(named), named or "nvidia-smi named none"
    except Exit as error:
        return False, str(error.message)
