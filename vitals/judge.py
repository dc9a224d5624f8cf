"""How the states of a cluster are told apart: the first of its troubles, why it is that, and what to type."""

from collections.abc import Mapping, Sequence

from vitals.api import Answer
from vitals.served import Served
from vitals.states import Limits, Seen, State, Verdict

GIB = 2**30
RECORDER = "inv up --model NAME: it leaves the server alone and starts the recorder again"
LINKS = "ip -brief link, on that node"
AGAIN = "inv down; then: inv up --model NAME"
# A node's recorder answers within a second or three, and after a death of its own within ten.
DEAF_S = 30
# What moves while work is done, and what moves while a model is loaded.
WORK, LOAD = ("counters", "cpu", "gpu"), ("log", "memory", "server_cpu", "cpu", "gpu")


def judge(seen: Seen, limits: Limits) -> Verdict:
    """The state of the cluster; the first of its troubles where there are several."""
    if seen.server is None:
        return Verdict(State.NOT_RUNNING, "No server was launched.", "inv launch --model NAME")
    if not seen.server.alive:
        return _ended(seen, seen.server)
    if lost := _lost(seen, seen.server):
        return lost
    if seen.answer is None:
        return Verdict(State.UNKNOWN, "The API was not asked.")
    if seen.answer.key_wrong:
        why = (
            f"The API answers {seen.answer.status}: VLLM_API_KEY here is not the key that the server was launched with."
        )
        return Verdict(State.KEY_WRONG, why, "set VLLM_API_KEY in .env, or: inv stop, and launch again")
    if seen.answer.well:
        return _serving(seen, limits)
    if seen.answer.status is not None:
        return _broken(seen, seen.server, seen.answer)
    if seen.answer.silent:
        return _silent(seen, seen.answer, limits)
    if seen.answer.refused:
        return _loading(seen, limits)
    return Verdict(State.UNKNOWN, f"The API cannot be asked: {seen.answer.text}", "inv logs")


def _ended(seen: Seen, server: Served) -> Verdict:
    if seen.nodes is not None and len(seen.nodes) < server.world_size:
        return Verdict(State.RANK_LOST, f"The server has ended: {_has(seen.nodes, server)}", AGAIN)
    unasked = "; and Ray could not be asked" if seen.nodes is None else ""
    return Verdict(
        State.NOT_RUNNING, f"The server has ended by itself{unasked}.", "inv logs; then: inv up --model NAME"
    )


def _lost(seen: Seen, server: Served) -> Verdict | None:
    """A node that Ray has lost, or one without a rank that does not load still; none if a token just proved all alive.

    One look that a busy node did not answer in time is no loss: then Ray was asked.
    """
    if not seen.fresh or (seen.answer and seen.answer.well):
        return None
    loads = seen.answer and seen.answer.refused
    rankless = [at for at, told in _facts(seen) if not (told["ranks"] or loads)]
    gone = rankless + [at for at, told in seen.fresh.nodes.items() if told is None and _is_gone(seen, at)]
    if not gone or seen.fresh.ranks >= server.world_size:
        return None
    why = f"{seen.fresh.ranks} of {server.world_size} ranks live; none on {', '.join(gone)}."
    return Verdict(State.RANK_LOST, why, AGAIN)


def _is_gone(seen: Seen, address: str) -> bool:
    return seen.nodes is not None and address not in seen.nodes


def _broken(seen: Seen, server: Served, answer: Answer) -> Verdict:
    """Another answer than a token or a refusal of the key; from 500 on, the engine behind the API has died."""
    said = f"The API answers {answer.status}: "
    if answer.status < 500:
        return Verdict(State.UNKNOWN, said + answer.text[:200], "inv logs")
    if seen.nodes is not None and len(seen.nodes) < server.world_size:
        return Verdict(State.RANK_LOST, said + _has(seen.nodes, server), AGAIN)
    return Verdict(State.NOT_RUNNING, said + answer.text[:200], "inv logs; then: inv stop, and launch again")


def _serving(seen: Seen, limits: Limits) -> Verdict:
    low = [
        f"{at} {told['available'] / GIB:.1f} GiB" for at, told in _facts(seen) if told["available"] < limits.warn * GIB
    ]
    if low:
        why = f"It answers, but less than MEM_WARN_GIB ({limits.warn:g}) is available: {', '.join(low)}."
        return Verdict(State.MEMORY_LOW, why, "inv memory; a lower GPU_MEM_UTIL leaves the host more")
    if down := _down(seen):
        return Verdict(State.LINKS_DEGRADED, f"It answers, but {down}.", LINKS)
    if not seen.fresh:
        return Verdict(State.UNKNOWN, f"It answers, but {_no_recorder(seen)}", RECORDER)
    if deaf := [f"{at} for {told:.0f} s" for at, told in seen.fresh.silent.items() if told >= DEAF_S]:
        why = f"It answers, but the recorder hears nothing of {', '.join(deaf)}: memory and links there are unknown."
        return Verdict(State.UNKNOWN, why, "inv logs, for what the memory guard says; inv status")
    if seen.broken:
        why = "It answers, but " + "; ".join(f"{what}: {said}" for what, said in seen.broken.items())
        return Verdict(State.UNKNOWN, why, "nvidia-smi")
    return Verdict(State.HEALTHY, f"One token in {seen.answer.seconds:.2f} s.")


def _silent(seen: Seen, answer: Answer, limits: Limits) -> Verdict:
    """No token in time: a long prompt may be before it in the line, and a host must not be power-cycled for that."""
    down = _down(seen)
    late = f"No token within {answer.seconds:.0f} s{_queue(seen)}" + (f", and {down}" if down else "")
    # An idle server has nothing to move: what counts is for how long somebody has waited while nothing did.
    still = seen.fresh and min(seen.fresh.quiet(*WORK), max(seen.waited, seen.fresh.quiet("waiting")))
    if still is not None and still >= limits.hang and not seen.moving:
        why = f"{late}; for {still:.0f} s (HANG_S: {limits.hang:g}) no counter, processor or GPU of a rank has moved."
        return Verdict(State.HUNG, why, "inv logs; then: inv stop, and launch again")
    if down:
        return Verdict(State.LINKS_DEGRADED, f"{late}.", LINKS)
    if seen.moving:
        return Verdict(State.BUSY, f"{late}, but its counters move.", "inv health, later")
    if still is None:
        return Verdict(State.UNKNOWN, f"{late}; whether anything moves is unknown: {_no_recorder(seen)}", RECORDER)
    why = f"{late}; that anything moved, or nobody waited, was {still:.0f} s ago (HANG_S: {limits.hang:g})."
    return Verdict(State.BUSY, why, "inv health, later")


def _queue(seen: Seen) -> str:
    return f" ({seen.metrics.running} requests run, {seen.metrics.waiting} wait)" if seen.metrics else ""


def _loading(seen: Seen, limits: Limits) -> Verdict:
    if seen.fresh and (quiet := seen.fresh.quiet(*LOAD)) >= limits.stall:
        why = f"It does not listen yet, and in {quiet:.0f} s (STALL_S: {limits.stall:g}) neither log nor memory moved."
        return Verdict(State.HUNG, why, "inv logs; then: inv stop")
    return Verdict(State.LOADING, "The server lives and does not listen yet.", "inv logs --follow")


def _facts(seen: Seen) -> list[tuple[str, Mapping]]:
    """What the recorder says of each node that answered it."""
    return [(address, told) for address, told in (seen.fresh.nodes if seen.fresh else {}).items() if told]


def _down(seen: Seen) -> str:
    """The links that the containers were told to use and that are not up; or nothing."""
    return ", ".join(f"{netdev} of {at} is down" for at, told in _facts(seen) for netdev in told["down"])


def _no_recorder(seen: Seen) -> str:
    age = f"wrote {seen.recorded.age:.0f} s ago" if seen.recorded else "has written nothing"
    return f"the recorder beside the server {age}."


def _has(nodes: Sequence[str], server: Served) -> str:
    return f"Ray has {len(nodes)} of {server.world_size} nodes ({', '.join(nodes) or 'none'})."
