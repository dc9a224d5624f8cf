"""The state of a cluster: each of ten, by the answers of the server, the API, the recorder and Ray."""

import json
import shutil
import threading
from dataclasses import replace
from http.client import BadStatusLine, RemoteDisconnected
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import health
from cluster.api import Answer, Metrics
from cluster.health import (
    ASK_S,
    BRING_UP_AGAIN,
    DEAF_S,
    LOG_END,
    START_RECORDER,
    STARVED,
    Seen,
    State,
    judge,
    waited_in_vain,
)
from cluster.recorder import FIRST, GIB, LOAD, Recorded
from cluster.served import Served

NOW = 1_700_000_000.0
HANG, STALL, FLOOR = 300, 600, 6
LIMITS = {"HANG_S": str(HANG), "STALL_S": str(STALL)}
HEAD, WORKER = "10.0.0.1", "10.0.0.2"
WORDS = ("vllm", "serve", "tiny", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "2")
WELL = Answer(200, "{}", 0.21)
SILENT = Answer(None, "timed out", 3.0, silent=True, error=TimeoutError("timed out"))
REFUSED = Answer(None, "refused", 0.0, error=ConnectionRefusedError(111, "Connection refused"))
DEAD = Answer(500, "EngineCore encountered an issue", 0.1)


def facts(**other):
    """The recorder's facts of a node that is well."""
    return {"available": 20 * GIB, "ranks": 1, "cpu": 7.0, "gpu": 0, "down": []} | other


def saw(quiet=0.0, worker=None, unseen=False, answered=True, running=1, **still):
    """The recorder's last look at two nodes: for `quiet` seconds nothing moved and a request waited.

    still: other seconds for single things. unseen: the worker did not answer in time. answered: whether the server has
    answered a request. running: how many run.
    """
    nodes = {HEAD: facts(), WORKER: None if unseen else worker or facts()}
    still = dict.fromkeys((*LOAD, *FIRST, "compiler", "api_cpu", "waiting"), quiet) | still
    return Recorded(nodes, still, floor=FLOOR, answered=answered, running=running)


JUST_MOVED = saw()


def seen(answer=WELL, record=JUST_MOVED, alive=True, nodes=(HEAD, WORKER), **other):
    """The answers about a head with a server of two ranks. A record of None: the recorder does not write."""
    return Seen(Served(alive, NOW - 900, WORDS), nodes, record, answer, **other)


# The recorder's facts of the worker, and the nodes that Ray has: each pair means that a rank is gone.
LOST = {
    "without a look": (None, [HEAD]),
    "without a rank": (facts(ranks=0), [HEAD, WORKER]),
    "without a rank, Ray not asked": (facts(ranks=0), None),
}
GUARDED = ("The server was ended by the memory guard: 10.0.0.2 had 3.9 GiB.", "inv up, with a lower GPU_MEM_UTIL")
CUT = facts(down=["enp1s0f0np0", "enp1s0f1np1"])
TABLE = {
    "nothing launched": (Seen(), State.NOT_RUNNING, "No server was launched."),
    "ended, every node there": (seen(None, alive=False), State.NOT_RUNNING, "ended by itself"),
    "ended, a node gone": (seen(None, alive=False, nodes=[HEAD]), State.RANK_LOST, "Ray has 1 of 2 nodes (10.0.0.1)"),
    "ended, Ray not asked": (seen(None, alive=False, nodes=None), State.NOT_RUNNING, "ended by itself"),
    "ended since the last look": (
        seen(None, replace(saw(), alive=True), alive=False),
        State.NOT_RUNNING,
        "has just ended. The recorder asks every node whether its memory guard",
    ),
    "ended, a node did not answer": (seen(None, saw(unseen=True), alive=False), State.NOT_RUNNING, "has just ended"),
    "ended by the guard since": (
        seen(None, replace(saw(), alive=True), alive=False, ended=GUARDED),
        State.NOT_RUNNING,
        GUARDED[0],
    ),
    "ended by the guard": (seen(None, alive=False, ended=GUARDED), State.NOT_RUNNING, GUARDED[0]),
    "ended by the guard, a node gone": (
        seen(None, alive=False, nodes=[HEAD], ended=GUARDED),
        State.RANK_LOST,
        f"Ray has 1 of 2 nodes (10.0.0.1). {GUARDED[0]}",
    ),
    "being ended by the guard": (seen(REFUSED, ended=GUARDED), State.NOT_RUNNING, GUARDED[0]),
    "healthy": (seen(), State.HEALTHY, "One token in 0.21 s."),
    "healthy, idle for a day": (seen(record=saw(quiet=86400)), State.HEALTHY, "One token"),
    "rank gone": (seen(SILENT, saw(worker=facts(ranks=0))), State.RANK_LOST, "1 of 2 ranks live; none on 10.0.0.2."),
    "401": (seen(Answer(401, "Unauthorized", 0.1)), State.KEY_WRONG, "answers 401"),
    "403": (seen(Answer(403, "Forbidden", 0.1)), State.KEY_WRONG, "answers 403"),
    "low": (
        seen(record=saw(worker=facts(available=5.9 * GIB))),
        State.MEMORY_LOW,
        "(6) is available: 10.0.0.2 5.9 GiB",
    ),
    "just not low": (seen(record=saw(worker=facts(available=6 * GIB))), State.HEALTHY, ""),
    "a link down": (
        seen(record=saw(worker=CUT)),
        State.LINKS_DEGRADED,
        "The server answers, but enp1s0f0np0 of 10.0.0.2 is down, enp1s0f1np1 of 10.0.0.2 is down.",
    ),
    "answers, no recorder": (seen(record=None), State.UNKNOWN, "has written nothing for 10 s"),
    "GPU broken": (
        seen(gpus={"GPU on the host": (False, "none"), "GPU in the container": (True, "GB10")}),
        State.UNKNOWN,
        "The server answers, but GPU on the host: none",
    ),
    "5xx, every node there": (seen(DEAD), State.NOT_RUNNING, "The API answers 500: EngineCore encountered"),
    "5xx, Ray not asked": (seen(DEAD, None, nodes=None), State.NOT_RUNNING, "The API answers 500: EngineCore"),
    "5xx, a node gone": (seen(DEAD, None, nodes=[HEAD]), State.RANK_LOST, "answers 500: Ray has 1 of 2 nodes"),
    "silent, a queue": (
        seen(SILENT, saw(), metrics=Metrics(2, 5, frozenset())),
        State.BUSY,
        "No token within 3 s (2 requests run, 5 wait); 0 s ago a counter of the engine moved",
    ),
    "silent, just moved": (seen(SILENT, saw(quiet=HANG - 1)), State.BUSY, "299 s ago"),
    "silent, ranks that starve": (
        seen(SILENT, saw(quiet=HANG), starved="No available shared memory broadcast block found in 60 seconds."),
        State.HUNG,
        "no counter of the engine has moved. The log says: No available shared memory broadcast block found in 60",
    ),
    "first request, quiet": (
        seen(SILENT, saw(quiet=HANG, answered=False)),
        State.HUNG,
        "and no counter, rank or GPU has moved.",
    ),
    "silent, quiet": (seen(SILENT, saw(quiet=HANG)), State.HUNG, "have waited 300 s (HANG_S: 300)"),
    "silent, idle until now": (
        seen(SILENT, saw(quiet=86400, waiting=0)),
        State.BUSY,
        "; 0 s ago a counter of the engine moved, or no request waited",
    ),
    "silent, asked for a while": (seen(SILENT, saw(quiet=86400, waiting=HANG - 1)), State.BUSY, "299 s ago"),
    "silent, asked for long": (
        seen(SILENT, saw(quiet=86400, waiting=HANG)),
        State.HUNG,
        "have waited 300 s (HANG_S: 300)",
    ),
    "silent, health waits": (seen(SILENT, saw(quiet=86400, waiting=0), waited=HANG - 1), State.BUSY, "299 s ago"),
    "silent, health waited": (seen(SILENT, saw(quiet=86400, waiting=0), waited=HANG), State.HUNG, "have waited 300 s"),
    "silent, all wait": (
        seen(SILENT, saw(quiet=86400, waiting=HANG), waited=HANG + 50),
        State.HUNG,
        "have waited 350 s",
    ),
    "silent, waited, moved": (seen(SILENT, saw(quiet=10, waiting=9999), waited=9999), State.BUSY, "; 10 s ago"),
    "silent, waited, no recorder": (seen(SILENT, None, waited=9999), State.UNKNOWN, "has written nothing"),
    "healthy, others waited": (seen(WELL, saw(quiet=9999), waited=9999), State.HEALTHY, "One token"),
    "silent, a link down": (
        seen(SILENT, saw(quiet=HANG - 1, worker=CUT)),
        State.LINKS_DEGRADED,
        "No token within 3 s, and enp1s0f0np0 of 10.0.0.2 is down, enp1s0f1np1",
    ),
    "silent, a link down, moving": (seen(SILENT, saw(worker=CUT)), State.LINKS_DEGRADED, ""),
    "silent, a link down, quiet": (
        seen(SILENT, saw(quiet=HANG, worker=CUT)),
        State.HUNG,
        "enp1s0f1np1 of 10.0.0.2 is down; requests have waited 300 s (HANG_S: 300), and no counter",
    ),
    "silent, no look, Ray has it": (seen(SILENT, saw(unseen=True)), State.BUSY, "0 s ago"),
    "silent, no look, Ray not asked": (seen(SILENT, saw(unseen=True), nodes=None), State.BUSY, "0 s ago"),
    "silent, no look, quiet": (seen(SILENT, saw(quiet=HANG, unseen=True), nodes=None), State.HUNG, "have waited 300 s"),
    "silent, no recorder": (seen(SILENT, None), State.UNKNOWN, "No token within 3 s, and the recorder beside"),
    "refused": (seen(REFUSED, saw(quiet=STALL - 1, answered=False)), State.LOADING, "does not listen yet"),
    "refused, no rank yet": (seen(REFUSED, saw(worker=facts(ranks=0), answered=False), nodes=[]), State.LOADING, ""),
    "refused, quiet": (seen(REFUSED, saw(quiet=STALL, answered=False)), State.HUNG, "For 600 s (STALL_S: 600)"),
    "refused after answers": (seen(REFUSED, saw()), State.NOT_RUNNING, "does not listen any more: it is ending"),
    "refused, no recorder": (seen(REFUSED, None), State.LOADING, ""),
}


def verdict(found):
    """The verdict with the limits of these tests."""
    return judge(found, hang=HANG, stall=STALL)


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_each_state_by_its_answers(row):
    """A verdict has a state and a reason. Unless the state is healthy, the verdict also has the next command."""
    found, state, why = row
    said = verdict(found)
    assert said.state is state and why in said.why
    assert bool(said.next) == (state is not State.HEALTHY)


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_a_rank_that_is_gone_is_the_first_trouble(lost):
    """Whatever the API answers, both nodes have to be brought up again. The verdict names the node without a rank."""
    worker, nodes = lost
    record = Recorded({HEAD: facts(available=0), WORKER: worker}, saw(quiet=9999).still)
    for answer in (SILENT, DEAD, Answer(401, "", 0.1)):
        said = verdict(seen(answer, record, nodes=nodes))
        assert (said.state, said.next) == (State.RANK_LOST, BRING_UP_AGAIN) and "none on 10.0.0.2" in said.why


def test_a_token_beats_a_look_that_failed():
    """A token proves that every rank lives, even if the recorder's last look failed."""
    for worker, nodes in LOST.values():
        record = Recorded({HEAD: facts(), WORKER: worker}, saw().still)
        assert verdict(seen(WELL, record, nodes=nodes)).state is State.HEALTHY


@pytest.mark.parametrize(
    ("worker", "nodes", "state"),
    [
        (None, [HEAD], State.RANK_LOST),
        (None, [HEAD, WORKER], State.LOADING),
        (facts(ranks=0), [HEAD, WORKER], State.LOADING),
    ],
    ids=["Ray has lost it", "did not answer once", "no rank yet"],
)
def test_a_load_without_a_node_is_a_lost_rank(worker, nodes, state):
    """A load has no ranks at first, and that is no trouble. A load that lacks a node never ends."""
    record = Recorded({HEAD: facts(ranks=0), WORKER: worker}, saw().still)
    assert verdict(seen(REFUSED, record, nodes=nodes)).state is state


@pytest.mark.parametrize(("seconds", "state"), [(DEAF_S - 1, State.HEALTHY), (DEAF_S, State.UNKNOWN)])
def test_a_node_that_the_recorder_does_not_reach_is_not_called_healthy(seconds, state):
    """A token proves nothing about the node's memory and links. A short silence is no trouble."""
    record = Recorded({HEAD: facts(), WORKER: None}, saw().still, {WORKER: seconds})
    said = verdict(seen(WELL, record))
    assert said.state is state and (state is State.HEALTHY or "does not reach 10.0.0.2 (30 s)" in said.why)


def test_a_node_that_the_recorder_does_not_reach_is_named_without_a_token():
    """A node that is cut off is lost only when Ray gives it up. Until then the server looks like a busy one."""
    said = verdict(seen(SILENT, replace(saw(unseen=True), silent={WORKER: 31})))
    assert said.state is State.BUSY and "3 s, and the recorder does not reach 10.0.0.2 for 31 s; 0 s ago" in said.why


def test_one_look_that_was_missed_is_no_lost_rank():
    """A busy node may answer late. Its rank counts as lost only if Ray has lost the node too."""
    for nodes in ([HEAD, WORKER], None):
        for answer in (SILENT, DEAD, Answer(401, "", 0.1)):
            assert verdict(seen(answer, saw(unseen=True), nodes=nodes)).state is not State.RANK_LOST


def test_without_the_recorder_the_next_command_is_up():
    """`inv up` starts the recorder again, and leaves the server alone."""
    assert START_RECORDER.startswith("inv up ")
    assert {verdict(seen(answer, None)).next for answer in (WELL, SILENT)} == {START_RECORDER}


# For each situation of a silent server the things that show that it works. Nothing else keeps it from being hung.
WORK = {
    "first request": ({"answered": False}, {"counters", "cpu", "gpu"}),
    "a request runs": ({"running": 1}, {"counters", "compiler"}),
    "no request runs": ({"running": 0}, {"counters", "compiler", "api_cpu"}),
}


@pytest.mark.parametrize(("situation", "things"), WORK.values(), ids=WORK)
def test_only_the_engine_s_own_work_is_no_hang(situation, things):
    """A rank that spins in a collective keeps its processor and its GPU busy. After the first answer that is a hang.

    Compilers work for the engine. So does the API's process while it unpacks a prompt, before the request runs.
    """
    looks = {thing: saw(quiet=9999, **situation, **{thing: 1}) for thing in saw().still if thing != "waiting"}
    states = {thing: verdict(seen(SILENT, look, waited=9999)).state for thing, look in looks.items()}
    assert {thing for thing, state in states.items() if state is State.BUSY} == things
    assert {state for thing, state in states.items() if thing not in things} == {State.HUNG}


@pytest.mark.parametrize(("thing", "answered"), [("cpu", False), ("compiler", True)])
def test_one_node_that_works_is_no_hang(thing, answered):
    """One rank may work while the others wait for that rank."""
    still = {"counters": 9999, "gpu": 9999, "waiting": 9999, f"{thing} {HEAD}": 9999, f"{thing} {WORKER}": 9999}
    for at in (HEAD, WORKER):
        looks = [replace(saw(answered=answered), still=still | moved) for moved in ({}, {f"{thing} {at}": 1})]
        assert [verdict(seen(SILENT, look)).state for look in looks] == [State.HUNG, State.BUSY]


def test_a_recorder_without_a_look_is_no_hang():
    """A recorder that has just started has not yet looked at work, load or waiting requests."""
    new = replace(saw(), still={})
    assert verdict(seen(SILENT, new, waited=9999)).state is State.BUSY
    assert verdict(seen(SILENT, replace(new, still={"counters": 9999, "compiler": 9999}))).state is State.BUSY
    assert verdict(seen(REFUSED, replace(new, answered=False))).state is State.LOADING


def test_one_thing_that_moves_is_a_load():
    """If log, memory, a processor or a GPU moves, the load goes on."""
    looks = [saw(quiet=9999, answered=False, **{thing: 1}) for thing in LOAD]
    assert {verdict(seen(REFUSED, look)).state for look in looks} == {State.LOADING}


def test_the_first_trouble_is_the_verdict():
    """If several things are wrong, the verdict names the trouble to correct first, and then the next one."""
    low, cut = facts(available=GIB, down=["enp1s0f0np0"]), facts(down=["enp1s0f0np0"])
    key, bad = Answer(401, "", 0.1), {"gpus": {"GPU on the host": (False, "none")}}
    steps = [
        (Seen(None, [HEAD], saw(worker=facts(ranks=0)), key, **bad), State.NOT_RUNNING),
        (seen(key, saw(worker=facts(ranks=0)), False, [HEAD], **bad), State.RANK_LOST),
        (seen(key, saw(worker=facts(ranks=0)), False, **bad), State.NOT_RUNNING),
        (seen(key, saw(worker=facts(ranks=0)), **bad), State.RANK_LOST),
        (seen(key, saw(worker=low), **bad), State.KEY_WRONG),
        (seen(WELL, saw(worker=low), **bad), State.MEMORY_LOW),
        (seen(WELL, saw(worker=cut), **bad), State.LINKS_DEGRADED),
        (seen(WELL, None, **bad), State.UNKNOWN),
        (seen(WELL, **bad), State.UNKNOWN),
        (seen(WELL), State.HEALTHY),
    ]
    assert [verdict(found).state for found, _ in steps] == [state for _, state in steps]


def test_only_a_refused_connection_is_a_load():
    """Without an HTTP answer or a refused connection the state is unknown, however long nothing moves."""
    no_letters = UnicodeEncodeError("latin-1", "ключ", 0, 4, "ordinal not in range(256)")
    for error in (no_letters, RemoteDisconnected("closed"), BadStatusLine("TLS"), OSError(113, "No route")):
        answer = Answer(None, str(error), 0.0, error=error)
        assert {verdict(seen(answer, saw(quiet=quiet))).state for quiet in (0, STALL)} == {State.UNKNOWN}, error


def test_a_refusal_is_no_dead_engine():
    """An answer below 500 comes from a server that works, so the next command does not stop the server."""
    refused = [Answer(status, "refused", 0.1) for status in (302, 400, 404, 429, 499)]
    assert {verdict(seen(answer)).state for answer in refused} == {State.UNKNOWN}
    assert verdict(seen(refused[0])).why == "The API answers 302: refused"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Looks at a live server once for each answer; `before` and `after` it the recorder tells these."""
    now, looks = [NOW], []
    monkeypatch.setattr(health, "ask_server", lambda *_: Served(True, NOW - 9000, WORDS))
    monkeypatch.setattr(health, "read_recorded", lambda _: looks[-1])
    monkeypatch.setattr(health, "read_metrics", lambda _: None)
    monkeypatch.setattr(health, "read_ended", lambda _: None)
    monkeypatch.setattr(health, "log_folder", lambda _: tmp_path)
    monkeypatch.setattr(health, "time", SimpleNamespace(time=lambda: now[-1], monotonic=lambda: 0.0))
    idle = saw(quiet=86400, waiting=0)

    def ask(*answers, every=HANG / 2, before=idle, after=idle):
        states, left = [], list(answers)
        monkeypatch.setattr(health, "generate_token", lambda *_: (looks.append(after), left.pop(0))[1])
        while left:
            looks.append(before)
            states.append(verdict(health._ask_head({"HANG_S": str(HANG)}, None, None, ASK_S)).state)
            now.append(now[-1] + every)
        return states

    return ask


def test_a_move_during_the_wait_for_the_token_counts(asked):
    """The first token after an idle hour may be late. Counters that move meanwhile are no hang."""
    assert asked(*[SILENT] * 9, before=saw(quiet=3600), after=saw(quiet=1))[-1] is State.BUSY


def test_an_idle_server_whose_first_token_is_slow_is_busy(asked):
    """A server that was idle is hung only after health itself has waited HANG_S."""
    assert asked(SILENT, SILENT, SILENT) == [State.BUSY, State.BUSY, State.HUNG]
    assert asked(WELL, SILENT, SILENT) == [State.HEALTHY, State.BUSY, State.BUSY]


def test_looks_far_apart_make_no_hang(asked):
    """Between two looks an hour apart other clients may have got their tokens."""
    assert asked(*[SILENT] * 9, every=HANG / 2 + 1) == [State.BUSY] * 9


def test_a_refused_connection_is_no_wait(asked):
    """A server that was launched again is loading, so earlier waiting does not count."""
    assert asked(SILENT, SILENT, REFUSED, SILENT, SILENT)[-1] is State.BUSY


@pytest.fixture
def looked(asked, monkeypatch):
    """Health's answers when recorder and Ray tell these, and how often Ray was asked."""

    def look(record, *addresses, error=None, answer=SILENT, told=None):
        calls = []

        def ask(_, seconds):
            calls.append(seconds)
            if error:
                raise error
            return list(addresses)

        monkeypatch.setattr(health, "read_metrics", lambda _: told)
        monkeypatch.setattr(health, "generate_token", lambda *_: answer)
        monkeypatch.setattr(health, "read_recorded", lambda _: record)
        monkeypatch.setattr(health, "alive_addresses", ask)
        return health._ask_head({"HANG_S": str(HANG)}, None, None, ASK_S), len(calls)

    return look


def test_ray_is_asked_only_without_the_recorders_look(looked):
    """Ray needs seconds to answer. If the recorder has just seen every node, Ray is not asked."""
    assert [looked(saw())[1], looked(None)[1], looked(saw(unseen=True))[1]] == [0, 1, 1]
    assert looked(saw())[0].nodes == [HEAD, WORKER] and looked(saw(), answer=DEAD)[1] == 1


def test_ray_is_asked_after_a_missed_look(looked):
    """Ray's answer shows whether the node is lost or busy. Without Ray's answer no node counts as lost."""
    assert verdict(looked(saw(unseen=True), HEAD, WORKER)[0]).state is State.BUSY
    assert verdict(looked(saw(unseen=True), HEAD)[0]).state is State.RANK_LOST
    lost, _ = looked(saw(unseen=True), error=Exit("Ray does not answer"))
    assert lost.nodes is None and verdict(lost).state is State.BUSY


def test_the_queue_is_shown_without_a_token(looked):
    """The numbers come from the metrics that were read during the wait."""
    assert "(1 requests run, 3 wait)" in verdict(looked(saw(), told=Metrics(1, 3, frozenset()))[0]).why


@pytest.fixture
def on(monkeypatch):
    """Has a container on this node: its status, and the variables that it started with."""

    def put(status, **env):
        container = SimpleNamespace(status=status, attrs={"Config": {"Env": [f"{k}={v}" for k, v in env.items()]}})
        monkeypatch.setattr(health, "node_container", lambda *_: container if status else None)
        monkeypatch.setattr(health, "_ask_gpu", lambda *_: (True, "NVIDIA GB10"))

    return put


EARLIER = {"VLLM_HOST_IP": HEAD, "MASTER_ADDR": HEAD}


@pytest.mark.parametrize(
    ("status", "state", "next_command"),
    [
        (None, State.NOT_RUNNING, "inv up --model NAME, or: inv head"),
        ("exited", State.NOT_RUNNING, "inv up --model NAME, or: inv head"),
        ("running", State.UNKNOWN, "inv down; then: inv up --model NAME"),
    ],
    ids=["no container", "a container that has ended", "an earlier version's"],
)
def test_a_container_that_cannot_be_asked_has_a_state(status, state, next_command, on, capsys):
    """Without a container the state is `not running`. A container of an earlier version is named, and not asked."""
    on(status, **EARLIER)
    assert health.report_health(LIMITS, as_json=True) is state
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["state"], told["code"], told["next"]) == (str(state), state.code, next_command)
    assert told["parts"].keys() == {"Ray", "GPU on the host"} and told["why"] in err
    assert ("earlier version" in told["why"]) == (status == "running")


def test_a_worker_names_the_head(on):
    """A worker does not know the whole cluster, so the message names the head."""
    on("running", **EARLIER | {"VLLM_HOST_IP": WORKER})
    with pytest.raises(Exit, match=r"This node is a worker \(10.0.0.2\). Type the same command on the head, 10.0.0.1."):
        health.look({})


def no_docker(*_, **__):
    """Fails as a question to a Docker Engine that hangs does."""
    raise Exit("Docker cannot be reached: timed out. Type: systemctl status docker")


def test_a_docker_engine_that_does_not_answer_is_unknown(on, monkeypatch, capsys):
    """The state is `unknown`, for programs too, whether Docker names no container or runs nothing in it."""
    on("running", **EARLIER | {"NODE_RAY_REPOSITORY": "sha"})
    monkeypatch.setattr(health, "read_recorded", lambda _: saw())
    for question in ("ask_server", "node_container"):
        monkeypatch.setattr(health, question, no_docker)
        assert health.report_health(LIMITS, as_json=True) is State.UNKNOWN
        told = json.loads(capsys.readouterr().out)
        assert (told["why"], told["next"]) == ("Docker cannot be reached: timed out.", "systemctl status docker")


def test_ray_is_asked_while_the_token_is_awaited(asked, monkeypatch):
    """The two have one time limit together, which is the limit of `inv health`."""
    begun, limits = threading.Event(), []
    monkeypatch.setattr(health, "read_recorded", lambda _: saw(unseen=True))
    monkeypatch.setattr(health, "generate_token", lambda *words: (limits.append(words[-1]), begun.wait(5), SILENT)[2])
    monkeypatch.setattr(health, "alive_addresses", lambda _, limit: (limits.append(limit), begun.set(), [HEAD])[2])
    found = health._ask_head({"HANG_S": str(HANG)}, None, None, ASK_S - 0.5)
    assert begun.is_set() and found.nodes == [HEAD] and sorted(limits) == [3, 3.5]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("INFO one\nINFO two\n", ""),
        (f"(EngineCore) INFO {STARVED} found in 60 seconds. This typically\nGET\n", f"{STARVED} found in 60 seconds."),
        (f"{STARVED} found in 60 seconds. This\n{STARVED} found in 120", f"{STARVED} found in 120."),
        (f"{STARVED} found\n" + "x" * LOG_END, ""),
    ],
    ids=["none", "one", "the last", "long ago"],
)
def test_the_log_s_last_word_about_starving_ranks(text, sentence, asked, tmp_path):
    """vLLM's own sign of a hang is said with it, unless the log has gone on since. A missing log has none."""
    assert health._starved(tmp_path / "serve.log") == ""
    (tmp_path / "serve.log").write_text(text)
    assert health._starved(tmp_path / "serve.log") == sentence


@pytest.fixture
def waited(tmp_path, monkeypatch):
    """Looks some seconds after the look before, without a token or with one; returns for how long none has come."""
    clock = SimpleNamespace(now=NOW)
    monkeypatch.setattr(health, "time", SimpleNamespace(time=lambda: clock.now))

    def look(later=0.0, silent=True):
        clock.now += later
        return waited_in_vain(tmp_path / "logs/unanswered.json", silent, HANG)

    look.file = tmp_path / "logs/unanswered.json"
    look.file.parent.mkdir()
    return look


LOOKS = {
    "a first look": ([(0, True)], [0]),
    "close together": ([(60, True)] * 5, [0, 60, 120, 180, 240]),
    "just close enough": ([(HANG / 2, True)] * 3, [0, 150, 300]),
    "too far apart": ([(0, True), (100, True), (HANG / 2 + 1, True), (100, True)], [0, 100, 0, 100]),
    "a token between": ([(0, True), (100, True), (1, False), (1, True), (9, True)], [0, 100, 0, 0, 9]),
    "the clock set back": ([(0, True), (100, True), (-50, True), (100, True)], [0, 100, 0, 100]),
    "the clock set forward": ([(0, True), (100, True), (86400, True), (100, True)], [0, 100, 0, 100]),
}


@pytest.mark.parametrize(("looks", "seconds"), LOOKS.values(), ids=LOOKS)
def test_looks_without_a_token_add_up(looks, seconds, waited):
    """Looks add up if they are close together, no token came between them, and the clock was not set."""
    assert [waited(later, silent) for later, silent in looks] == seconds


@pytest.mark.parametrize("text", ["", "null", "[1, "])
def test_a_file_of_looks_that_cannot_be_read_begins_anew(text, waited):
    """A broken file brings no traceback, and the next look finds a whole file."""
    waited.file.write_text(text)
    assert [waited(), waited(100)] == [0, 100]


def test_the_next_health_knows_the_looks_before(waited):
    """Each `inv health` is a new process, so a file keeps the looks."""
    waited.file.write_text(json.dumps({"since": NOW - 250, "last": NOW - 100}))
    assert waited() == 250
    assert [file.name for file in waited.file.parent.iterdir()] == ["unanswered.json"]


def test_looks_that_cannot_be_kept_do_not_count(waited):
    """If the folder is missing, no waiting counts, and health reports the rest as usual."""
    shutil.rmtree(waited.file.parent)
    assert [waited(later) for later in (0, 100, 100)] == [0, 0, 0]
