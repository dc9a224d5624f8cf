"""The state of the cluster, asked on the head: a token through the real API, every rank, memory, links and the GPU.

`look` asks, and `judge` decides. `judge` is pure, so a test can show it every situation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from invoke import Exit

from cluster.agreement import alive_addresses
from cluster.api import Answer, Metrics, generate_token, read_metrics
from cluster.command import Command, render, run, say, tell
from cluster.engine import node_container
from cluster.guards import is_head
from cluster.node import CONTAINER, log_folder
from cluster.recorder import FRESH_S, GIB, LOAD, Recorded, keep_json, kept_json, read_ended, read_recorded
from cluster.served import Served, ask_server, is_earlier
from cluster.settings import Settings

if TYPE_CHECKING:
    from docker.models.containers import Container

# Everything is asked at once, and what has not answered after ASK_S is unknown. With the start of Python and the end of
# a command that must be killed, health answers within 5 s.
ASK_S, TOKEN_S, GPU_S = 4, 3, 3
# vLLM's engine writes this each minute in which the ranks have not taken its next step.
STARVED = "No available shared memory broadcast block"
LOG_END = 2**16
# A node answers the recorder within three seconds. Ray needs ten to restart the process that answers.
DEAF_S = 30
BRING_UP_AGAIN = "inv down; then: inv up --model NAME"
LAUNCH_AGAIN = "inv logs; then: inv stop, and launch again"
NOT_RECORDED = f"the recorder beside the server has written nothing for {FRESH_S} s."
START_RECORDER = "inv up --model NAME: it leaves the server alone and starts the recorder again"
SHOW_LINKS = "ip -brief link, on that node"
LATER = "inv health, later"


# --- What is known of a cluster --------------------------------------------------------------------------------------


class State(Enum):
    """A state's name and its exit status. Programs rely on both, so neither may change."""

    HEALTHY = ("healthy", 0)
    UNKNOWN = ("unknown", 1)
    BUSY = ("busy", 10)
    LOADING = ("loading", 11)
    NOT_RUNNING = ("not running", 12)
    HUNG = ("hung", 13)
    RANK_LOST = ("rank lost", 14)
    KEY_WRONG = ("API key wrong", 15)
    MEMORY_LOW = ("memory low", 16)
    LINKS_DEGRADED = ("links degraded", 17)

    @property
    def code(self) -> int:
        return self.value[1]

    def __str__(self) -> str:
        return self.value[0]


@dataclass(frozen=True)
class Verdict:
    """A state, the reason for it, and the next command to type."""

    state: State
    why: str
    next: str = ""


@dataclass(frozen=True)
class Seen:
    """The answers about a cluster. None stands for a server that was not launched, or for a missing answer.

    `nodes`: the addresses of Ray's nodes. `answer`: the API's answer to the request for one token. `waited`: for how
    many seconds no `inv health` has got a token. `gpus`: for host and container, whether nvidia-smi answered, and its
    words. `ended`: as read_ended. `starved`: the log's last sentence about ranks that do not answer the engine.
    `unasked`: the verdict, where the head's container could not be asked.
    """

    server: Served | None = None
    nodes: Sequence[str] | None = None
    recorded: Recorded | None = None
    answer: Answer | None = None
    waited: float = 0
    metrics: Metrics | None = None
    gpus: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    ended: tuple[str, str] | None = None
    starved: str = ""
    unasked: Verdict | None = None

    @property
    def facts(self) -> dict[str, Mapping]:
        """The recorder's facts of each node that answered the recorder."""
        return {at: facts for at, facts in self.recorded.nodes.items() if facts} if self.recorded else {}

    @property
    def down(self) -> str:
        """The links that the containers were told to use and that are down, as words."""
        return ", ".join(f"{netdev} of {at} is down" for at, facts in self.facts.items() for netdev in facts["down"])


# --- Deciding --------------------------------------------------------------------------------------------------------


def judge(seen: Seen, *, hang: float, stall: float) -> Verdict:
    """Name the first trouble of a cluster. hang and stall are seconds (HANG_S, STALL_S)."""
    server, answer, recorded = seen.server, seen.answer, seen.recorded
    if seen.unasked:
        return seen.unasked
    if server is None:
        return Verdict(State.NOT_RUNNING, "No server was launched.", "inv launch --model NAME")
    node_gone = seen.nodes is not None and len(seen.nodes) < server.world_size
    have = f"Ray has {len(seen.nodes or ())} of {server.world_size} nodes ({', '.join(seen.nodes or ()) or 'none'})."
    if not server.alive and node_gone:
        how = f" {seen.ended[0]}" if seen.ended else ""
        return Verdict(State.RANK_LOST, f"The server has ended: {have}{how}", BRING_UP_AGAIN)
    if seen.ended:  # its last processes may take some seconds to end
        return Verdict(State.NOT_RUNNING, *seen.ended)
    if not server.alive and recorded and (recorded.alive or not recorded.whole):
        why = "The server has just ended. The recorder asks every node whether its memory guard has ended the server."
        return Verdict(State.NOT_RUNNING, why, LATER)
    if not server.alive:
        return Verdict(State.NOT_RUNNING, "The server has ended by itself.", "inv logs; then: inv up --model NAME")
    assert answer, "a server that lives has been asked"
    if recorded and (lost := _without_rank(seen, recorded, answer, server.world_size)):
        why = f"{recorded.ranks} of {server.world_size} ranks live; none on {', '.join(lost)}."
        return Verdict(State.RANK_LOST, why, BRING_UP_AGAIN)
    if answer.key_wrong:
        why = f"The API answers {answer.status}: VLLM_API_KEY here is not the key that the server was launched with."
        return Verdict(State.KEY_WRONG, why, "set VLLM_API_KEY in .env, or: inv stop, and launch again")
    if answer.well:
        return _serving(seen, answer)
    if answer.silent:
        return _silent(seen, answer, hang)
    if answer.refused:
        if recorded and recorded.answered:
            why = "The server has answered requests and does not listen any more: it is ending."
            return Verdict(State.NOT_RUNNING, why, LAUNCH_AGAIN)
        if recorded and (quiet := recorded.quiet(*LOAD)) >= stall:
            why = f"The server does not listen. For {quiet:.0f} s (STALL_S: {stall:g}) neither log nor memory moved."
            return Verdict(State.HUNG, why, "inv logs; then: inv stop")
        fetched = f" vLLM downloads the weights: {recorded.downloads}." if recorded and recorded.downloads else ""
        return Verdict(State.LOADING, f"The server lives and does not listen yet.{fetched}", "inv logs --follow")
    said = f"The API answers {answer.status or 'nothing'}: {answer.text[:200]}"
    if answer.status is None or answer.status < 500:
        return Verdict(State.UNKNOWN, said, "inv logs")
    # The API lives, and the engine behind it has died.
    if node_gone:
        return Verdict(State.RANK_LOST, f"The API answers {answer.status}: {have}", BRING_UP_AGAIN)
    return Verdict(State.NOT_RUNNING, said, LAUNCH_AGAIN)


def _without_rank(seen: Seen, recorded: Recorded, answer: Answer, world_size: int) -> list[str]:
    """Return the nodes that have lost their rank.

    A token that was just generated proves that every rank lives. While a model loads there are no ranks yet. A node
    that does not answer the recorder may be busy, so that node counts as lost only if Ray has lost it too.
    """
    if recorded.ranks >= world_size or answer.well:
        return []
    rankless = [at for at, facts in seen.facts.items() if not facts["ranks"] and not answer.refused]
    unheard = [at for at in recorded.nodes if at not in seen.facts]
    return rankless + [at for at in unheard if seen.nodes is not None and at not in seen.nodes]


def _serving(seen: Seen, answer: Answer) -> Verdict:
    floor = seen.recorded.floor if seen.recorded else 0
    free = {at: facts["available"] / GIB for at, facts in seen.facts.items()}
    if low := [f"{at} {gib:.1f} GiB" for at, gib in free.items() if gib < floor]:
        why = f"The server answers, but less than MEM_FLOOR_GIB ({floor:g}) is available: {', '.join(low)}."
        return Verdict(State.MEMORY_LOW, why, "inv memory; a lower GPU_MEM_UTIL leaves the host more")
    if seen.down:
        return Verdict(State.LINKS_DEGRADED, f"The server answers, but {seen.down}.", SHOW_LINKS)
    if not seen.recorded:
        return Verdict(State.UNKNOWN, f"The server answers, but {NOT_RECORDED}", START_RECORDER)
    if deaf := [f"{at} ({seconds:.0f} s)" for at, seconds in seen.recorded.silent.items() if seconds >= DEAF_S]:
        why = f"The server answers, but the recorder does not reach {', '.join(deaf)}. Memory and links are unknown."
        return Verdict(State.UNKNOWN, why, "inv logs, for the lines of the recorder; inv status")
    if broken := [f"{place}: {words}" for place, (well, words) in seen.gpus.items() if not well]:
        return Verdict(State.UNKNOWN, f"The server answers, but {'; '.join(broken)}", "nvidia-smi")
    return Verdict(State.HEALTHY, f"One token in {answer.seconds:.2f} s.")


def _silent(seen: Seen, answer: Answer, hang: float) -> Verdict:
    """Tell busy from hung. A long prompt may be served before ours, and must not look like a hang."""
    queue = f" ({seen.metrics.running:g} requests run, {seen.metrics.waiting:g} wait)" if seen.metrics else ""
    late = f"No token within {answer.seconds:.0f} s{queue}" + (f", and {seen.down}" if seen.down else "")
    # On an idle server nothing moves, so only seconds in which a request waited count.
    still, thing = 0.0, "counter, rank or GPU"
    if recorded := seen.recorded:
        deaf = [f"{at} for {seconds:.0f} s" for at, seconds in recorded.silent.items()]
        late += f", and the recorder does not reach {', '.join(deaf)}" if deaf else ""
        still = min(recorded.quiet(*recorded.work), max(seen.waited, recorded.quiet("waiting")))
        thing = "counter of the engine" if recorded.answered else thing
    if still >= hang:
        why = f"{late}; requests have waited {still:.0f} s (HANG_S: {hang:g}), and no {thing} has moved."
        return Verdict(State.HUNG, why + (f" The log says: {seen.starved}" if seen.starved else ""), LAUNCH_AGAIN)
    if seen.down:
        return Verdict(State.LINKS_DEGRADED, f"{late}.", SHOW_LINKS)
    if not recorded:
        return Verdict(State.UNKNOWN, f"{late}, and {NOT_RECORDED}", START_RECORDER)
    why = f"{late}; {still:.0f} s ago a {thing} moved, or no request waited (HANG_S: {hang:g})."
    return Verdict(State.BUSY, why, LATER)


# --- Asking ----------------------------------------------------------------------------------------------------------


def report_health(settings: Settings, as_json: bool) -> State:
    """Print every part of the cluster, the state, and the next command. Return the state."""
    verdict, seen = look(settings)
    parts = _parts(seen)
    for name, (well, words) in parts.items():
        say(f"{'ok  ' if well else 'FAIL'}  {name}: {words}")
    say(f"{verdict.state}: {verdict.why}" + (f" Next: {verdict.next}" if verdict.next else ""))
    if as_json:
        told = {name: {"well": well, "says": words} for name, (well, words) in parts.items()}
        state = {"state": str(verdict.state), "code": verdict.state.code, "why": verdict.why, "next": verdict.next}
        tell(json.dumps(state | {"parts": told}, indent=1))
    return verdict.state


def look(settings: Settings, nodes: Sequence[str] | None = None) -> tuple[Verdict, Seen]:
    """Ask every part of the cluster and judge the answers. nodes: the addresses of Ray's nodes, if they are known.

    Raises Exit on a worker, which does not know the whole cluster.
    """
    until = time.monotonic() + ASK_S
    with ThreadPoolExecutor() as pool:
        gpus = {"GPU on the host": pool.submit(_ask_gpu)}
        head = _find_head()
        if isinstance(head, Verdict):
            seen = Seen(unasked=head)
        else:
            gpus["GPU in the container"] = pool.submit(_ask_gpu, CONTAINER)
            seen = _ask_head(settings, head, nodes, until)
        seen = replace(seen, gpus={place: answer.result() for place, answer in gpus.items()})
    return judge(seen, hang=float(settings["HANG_S"]), stall=float(settings["STALL_S"])), seen


def gpu_command(container: str | None = None) -> Command:
    """Name the GPU of this host, or of a container on it."""
    return Command(render("nvidia_smi.j2", container=container), "this node")


def _find_head() -> Container | Verdict:
    """Return the head's container, or a verdict if this version cannot ask it. Raises Exit on a worker."""
    try:
        head = node_container(ASK_S)
    except Exit as error:
        return _no_answer(error)
    if head is None or head.status != "running":
        return Verdict(State.NOT_RUNNING, f"No {CONTAINER} runs on this node.", "inv up --model NAME, or: inv head")
    is_head(head)
    if is_earlier(head):
        why = "An earlier version of this repository started the containers, so this version cannot ask them."
        return Verdict(State.UNKNOWN, why, BRING_UP_AGAIN)
    return head


def _no_answer(error: Exit) -> Verdict:
    why, _, remedy = str(error.message).partition(" Type: ")
    return Verdict(State.UNKNOWN, why, remedy or "docker ps")


def _ask_head(settings: Settings, head: Container, nodes: Sequence[str] | None, until: float) -> Seen:
    def ask_ray() -> list[str] | None:
        with suppress(Exit):
            return alive_addresses(head, max(0.1, until - time.monotonic()))
        return None

    recorded = read_recorded(settings)
    with ThreadPoolExecutor() as pool:
        # Ray takes seconds to answer, so Ray is asked only if the recorder or the server leaves a doubt.
        ray = pool.submit(ask_ray) if nodes is None and not (recorded and recorded.whole) else None
        try:
            server = ask_server(head, ASK_S)
        except Exit as error:
            return Seen(unasked=_no_answer(error))
        seen = Seen(server, recorded=recorded)
        if server and server.alive:
            seen = _ask_for_token(settings, server, until)
    engine_lives = seen.answer is not None and (seen.answer.status or 0) < 500
    if ray:
        nodes = ray.result()
    elif nodes is None:
        nodes = list(seen.facts) if engine_lives and seen.recorded and seen.recorded.whole else ask_ray()
    return replace(seen, nodes=nodes, ended=read_ended(settings))


def _ask_for_token(settings: Settings, server: Served, until: float) -> Seen:
    folder, seconds = log_folder(settings), max(1, min(TOKEN_S, until - time.monotonic()))
    with ThreadPoolExecutor() as pool:  # a server that hangs would keep both questions waiting, one after the other
        asked = pool.submit(read_metrics, server.url)
        answer = generate_token(server.url, settings.get("VLLM_API_KEY"), seconds)
        metrics = asked.result()
    waited = waited_in_vain(folder / "unanswered.json", answer.silent, float(settings["HANG_S"]))
    starved = _starved(folder / "serve.log") if answer.silent else ""
    # The recorder's file is read after the wait for the token, so that work of the ranks during the wait counts.
    return Seen(server, None, read_recorded(settings), answer, waited, metrics, starved=starved)


def _starved(log: Path) -> str:
    """Return the last sentence with STARVED in the last LOG_END bytes of the server's log, if there is one."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END))
        _, found, after = file.read().decode(errors="replace").rpartition(STARVED)
        return found + after.partition("\n")[0].partition(".")[0] + "." if found else ""
    return ""


def waited_in_vain(file: Path, silent: bool, hang: float) -> float:
    """Note in file whether a token came. Return for how many seconds none has come.

    vLLM's counters do not show a request that hangs the engine, so health keeps its own count. Two looks more than half
    of `hang` seconds apart say nothing of the time between them, so the count begins anew.
    """
    now = time.time()
    since, last = (kept_json(file, "since", "last") or {"since": 0, "last": 0}).values()
    if not silent or not since <= last <= now <= last + hang / 2:
        since = now
    try:
        keep_json(file, {"since": since, "last": now if silent else 0})
    except OSError:
        return 0  # a count that cannot be kept must not call a server hung
    return now - since


def _parts(seen: Seen) -> dict[str, tuple[bool, str]]:
    """Return whether each part of the cluster is well, and its words."""
    facts = seen.facts if seen.server and seen.server.alive else {}
    nodes = [f"{at} (ranks: {facts[at]['ranks']})" if at in facts else at for at in seen.nodes or ()]
    told = f"{len(nodes)} nodes: {', '.join(nodes)}" if nodes else "does not answer, or does not run here"
    parts = {"Ray": (bool(nodes), told)}
    if answer := seen.answer:
        said = f"one token in {answer.seconds:.2f} s" if answer.well else answer.text[:100]
        parts["API"] = (answer.well, f"{answer.status or 'no answer'}: {said}")
    if facts:
        free = [f"{at} {one['available'] / GIB:.1f} GiB" for at, one in facts.items()]
        parts["Memory available"] = (True, ", ".join(free))
    return {**parts, **seen.gpus}


def _ask_gpu(container: str | None = None) -> tuple[bool, str]:
    try:
        name = run(gpu_command(container), capture=True, seconds=GPU_S)
        return bool(name), name or "nvidia-smi names no GPU"
    except Exit as error:
        return False, str(error.message)
