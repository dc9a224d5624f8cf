"""Which state a cluster is in, by what was asked of it, and what the API is asked: one token, and its metrics."""

import http.server
import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.client import BadStatusLine, RemoteDisconnected
from types import SimpleNamespace

import pytest
from invoke import Exit

from checks.nodes import Node
from vitals import api, health, recorded, unanswered
from vitals.api import Answer, Metrics
from vitals.judge import AGAIN, DEAF_S, GIB, LOAD, RECORDER, WORK, judge
from vitals.recorded import FRESH_S, Recorded
from vitals.served import Served
from vitals.states import Limits, Seen, State

NOW = 1_700_000_000.0
HANG, STALL, WARN = 300, 600, 6
HEAD, WORKER = "10.0.0.1", "10.0.0.2"
WORDS = ("vllm", "serve", "tiny", "--tensor-parallel-size", "1", "--pipeline-parallel-size", "2")
WELL = Answer(200, "{}", 0.21)
SILENT = Answer(None, "timed out", 3.0, silent=True, error=TimeoutError("timed out"))
REFUSED = Answer(None, "refused", 0.0, error=ConnectionRefusedError(111, "Connection refused"))
DEAD = Answer(500, "EngineCore encountered an issue", 0.1)


def facts(**other):
    """What the recorder says of a node that is well."""
    return {"available": 20 * GIB, "ranks": 1, "cpu": 7.0, "gpu": 0, "down": []} | other


def saw(quiet=0.0, age=1.0, worker=None, unseen=False, **still):
    """The recorder's last look at two nodes: `quiet` seconds after anything moved, but for what `still` says.

    As long, somebody has waited. unseen: the worker did not answer in time.
    """
    still = dict.fromkeys((*WORK, *LOAD, "waiting"), quiet) | still
    return Recorded(age, {HEAD: facts(), WORKER: None if unseen else worker or facts()}, still)


def seen(answer=WELL, record=None, alive=True, nodes=(HEAD, WORKER), **other):
    """What was asked of a head with a server of two ranks."""
    return Seen(Served(alive, NOW - 900, WORDS), nodes, record or saw(), answer, **other)


STALE = saw(quiet=5000, age=FRESH_S + 1)
# What the recorder says of the worker, and whom Ray has: each tells that a rank is gone.
LOST = {
    "without a look": (None, [HEAD]),
    "without a rank": (facts(ranks=0), [HEAD, WORKER]),
    "without a rank, Ray not asked": (facts(ranks=0), None),
}
CUT = facts(down=["enp1s0f0np0", "enp1s0f1np1"])
TABLE = {
    "nothing launched": (Seen(), State.NOT_RUNNING, "No server was launched."),
    "ended, every node there": (seen(None, alive=False), State.NOT_RUNNING, "ended by itself"),
    "ended, a node gone": (seen(None, alive=False, nodes=[HEAD]), State.RANK_LOST, "Ray has 1 of 2 nodes (10.0.0.1)"),
    "ended, Ray not asked": (
        seen(None, alive=False, nodes=None),
        State.NOT_RUNNING,
        "ended by itself; and Ray could not be asked.",
    ),
    "API not asked": (seen(None), State.UNKNOWN, "not asked"),
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
        "It answers, but enp1s0f0np0 of 10.0.0.2 is down, enp1s0f1np1 of 10.0.0.2 is down.",
    ),
    "answers, recorder stale": (seen(record=STALE), State.UNKNOWN, "wrote 11 s ago"),
    "GPU broken": (seen(broken={"GPU on the host": "none"}), State.UNKNOWN, "GPU on the host: none"),
    "5xx, every node there": (seen(DEAD), State.NOT_RUNNING, "The API answers 500: EngineCore encountered"),
    "5xx, Ray not asked": (seen(DEAD, STALE, nodes=None), State.NOT_RUNNING, "The API answers 500: EngineCore"),
    "5xx, a node gone": (seen(DEAD, STALE, nodes=[HEAD]), State.RANK_LOST, "answers 500: Ray has 1 of 2 nodes"),
    "counters moving": (seen(SILENT, saw(quiet=9999), moving=True), State.BUSY, "its counters move"),
    "counters moving, stale": (seen(SILENT, STALE, moving=True), State.BUSY, "its counters move"),
    "silent, a queue": (
        seen(SILENT, saw(quiet=9999), moving=True, metrics=Metrics(2, 5, frozenset())),
        State.BUSY,
        "No token within 3 s (2 requests run, 5 wait), but",
    ),
    "silent, just moved": (seen(SILENT, saw(quiet=HANG - 1)), State.BUSY, "299 s ago"),
    "silent, quiet": (seen(SILENT, saw(quiet=HANG)), State.HUNG, "for 300 s (HANG_S: 300)"),
    "silent, idle until now": (seen(SILENT, saw(quiet=86400, waiting=0)), State.BUSY, "nobody waited, was 0 s ago"),
    "silent, asked for a while": (seen(SILENT, saw(quiet=86400, waiting=HANG - 1)), State.BUSY, "299 s ago"),
    "silent, asked for long": (seen(SILENT, saw(quiet=86400, waiting=HANG)), State.HUNG, "for 300 s (HANG_S: 300)"),
    "silent, health waits": (seen(SILENT, saw(quiet=86400, waiting=0), waited=HANG - 1), State.BUSY, "299 s ago"),
    "silent, health waited": (seen(SILENT, saw(quiet=86400, waiting=0), waited=HANG), State.HUNG, "for 300 s"),
    "silent, all wait": (seen(SILENT, saw(quiet=86400, waiting=HANG), waited=HANG + 50), State.HUNG, "for 350 s"),
    "silent, waited, moved": (seen(SILENT, saw(quiet=10, waiting=9999), waited=9999), State.BUSY, "was 10 s ago"),
    "silent, waited, moving": (seen(SILENT, saw(quiet=9999), waited=9999, moving=True), State.BUSY, "counters move"),
    "silent, waited, stale": (seen(SILENT, STALE, waited=9999), State.UNKNOWN, "whether anything moves is unknown"),
    "healthy, others waited": (seen(WELL, saw(quiet=9999), waited=9999), State.HEALTHY, "One token"),
    "silent, a link down": (
        seen(SILENT, saw(quiet=HANG - 1, worker=CUT)),
        State.LINKS_DEGRADED,
        "No token within 3 s, and enp1s0f0np0 of 10.0.0.2 is down, enp1s0f1np1",
    ),
    "silent, a link down, moving": (seen(SILENT, saw(quiet=9999, worker=CUT), moving=True), State.LINKS_DEGRADED, ""),
    "silent, a link down, quiet": (
        seen(SILENT, saw(quiet=HANG, worker=CUT)),
        State.HUNG,
        "enp1s0f1np1 of 10.0.0.2 is down; for 300 s (HANG_S: 300) no counter",
    ),
    "silent, no look, Ray has it": (seen(SILENT, saw(unseen=True)), State.BUSY, "0 s ago"),
    "silent, no look, Ray not asked": (seen(SILENT, saw(unseen=True), nodes=None), State.BUSY, "0 s ago"),
    "silent, no look, quiet": (seen(SILENT, saw(quiet=HANG, unseen=True), nodes=None), State.HUNG, "for 300 s"),
    "silent, stale": (seen(SILENT, STALE), State.UNKNOWN, "whether anything moves is unknown"),
    "refused": (seen(REFUSED, saw(quiet=STALL - 1)), State.LOADING, "does not listen yet"),
    "refused, no rank yet": (seen(REFUSED, saw(worker=facts(ranks=0)), nodes=[]), State.LOADING, ""),
    "refused, quiet": (seen(REFUSED, saw(quiet=STALL)), State.HUNG, "in 600 s (STALL_S: 600)"),
    "refused, stale": (seen(REFUSED, STALE), State.LOADING, ""),
}


def verdict(found):
    """What the judge says with the limits of these tests."""
    return judge(found, Limits(HANG, STALL, WARN))


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_each_state_by_what_was_seen(row):
    """The state, a sentence that says why, and, unless it is healthy, what to type next."""
    found, state, why = row
    said = verdict(found)
    assert said.state is state and why in said.why
    assert bool(said.next) == (state is not State.HEALTHY and found != seen(None))


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
@pytest.mark.parametrize("answer", [SILENT, DEAD, Answer(401, "", 0.1)], ids=["silent", "500", "401"])
def test_a_rank_that_is_gone_is_the_first_trouble(lost, answer):
    """Whatever the API says meanwhile: both nodes have to come up again, and the one without a rank is named."""
    worker, nodes = lost
    record = Recorded(1, {HEAD: facts(available=0), WORKER: worker}, saw(quiet=9999).still)
    said = verdict(seen(answer, record, nodes=nodes, moving=True))
    assert (said.state, said.next) == (State.RANK_LOST, AGAIN) and "none on 10.0.0.2" in said.why


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
def test_a_token_beats_a_look_that_failed(lost):
    """It came through every rank, whatever the recorder saw a second before."""
    worker, nodes = lost
    record = Recorded(1, {HEAD: facts(), WORKER: worker}, saw().still)
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
def test_a_load_ends_with_a_node_and_not_without_a_rank(worker, nodes, state):
    """It has no rank at first; without a node it will never have it."""
    record = Recorded(1, {HEAD: facts(ranks=0), WORKER: worker}, saw().still)
    assert verdict(seen(REFUSED, record, nodes=nodes)).state is state


@pytest.mark.parametrize(("seconds", "state"), [(DEAF_S - 1, State.HEALTHY), (DEAF_S, State.UNKNOWN)])
def test_a_node_that_nobody_hears_is_not_called_healthy(seconds, state):
    """Its ranks live, for a token came; its memory and its links are another matter, and a moment is none."""
    record = Recorded(1, {HEAD: facts(), WORKER: None}, saw().still, {WORKER: seconds})
    said = verdict(seen(WELL, record))
    assert said.state is state and (state is State.HEALTHY or "hears nothing of 10.0.0.2 for 30 s" in said.why)


@pytest.mark.parametrize("nodes", [[HEAD, WORKER], None], ids=["Ray has it", "Ray not asked"])
@pytest.mark.parametrize("answer", [SILENT, DEAD, Answer(401, "", 0.1)], ids=["silent", "500", "401"])
def test_one_look_that_was_missed_is_no_lost_rank(nodes, answer):
    """A node that works may be too busy to answer in time: nobody is told to take both down unless Ray lacks it."""
    assert verdict(seen(answer, saw(unseen=True), nodes=nodes)).state is not State.RANK_LOST


def test_a_look_of_long_ago_names_no_lost_rank():
    """Ranks are counted in what the recorder saw just now, or not at all."""
    old = Recorded(FRESH_S + 1, {HEAD: facts(), WORKER: None}, saw().still)
    assert verdict(seen(SILENT, old, nodes=[HEAD])).state is State.UNKNOWN
    assert verdict(seen(SILENT, replace(old, age=FRESH_S), nodes=[HEAD])).state is State.RANK_LOST


@pytest.mark.parametrize("answer", [WELL, SILENT], ids=["well", "silent"])
def test_without_the_recorder_up_is_what_to_type(answer):
    """It starts the recorder again, and leaves the server alone."""
    assert verdict(seen(answer, STALE)).next == RECORDER and RECORDER.startswith("inv up ")


@pytest.mark.parametrize("answer", [WELL, SILENT, REFUSED], ids=["well", "silent", "refused"])
def test_without_the_recorder_nothing_is_hung(answer):
    """Nobody knows whether anything moves, so nobody is told to stop a server, let alone to cut a node's power."""
    for record in (STALE, None):
        found = Seen(Served(True, NOW - 9000, WORDS), (HEAD, WORKER), record, answer)
        assert verdict(found).state in (State.UNKNOWN, State.LOADING)


@pytest.mark.parametrize("thing", WORK)
def test_one_thing_that_moves_is_no_hang(thing):
    """Counters, a rank's processor or a GPU: each alone shows that a long prompt is worked on."""
    assert verdict(seen(SILENT, saw(quiet=9999, **{thing: 1}))).state is State.BUSY


@pytest.mark.parametrize("thing", ["cpu 10.0.0.1", "cpu 10.0.0.2", "cpu"])
def test_one_node_that_works_is_no_hang(thing):
    """Others wait for it: a rank alone may work on a prompt for as long as it takes."""
    still = {"cpu 10.0.0.1": 9999, "cpu 10.0.0.2": 9999}
    record = replace(saw(), still={"counters": 9999, "gpu": 9999, "waiting": 9999} | still)
    assert verdict(seen(SILENT, record)).state is State.HUNG
    assert verdict(seen(SILENT, replace(record, still=record.still | {thing: 1}))).state is State.BUSY


def test_what_nobody_looked_at_is_no_hang():
    """A recorder that has just begun has seen nothing: neither work, nor a load, nor anybody who waits."""
    new = replace(saw(), still={})
    assert verdict(seen(SILENT, new, waited=9999)).state is State.BUSY
    assert verdict(seen(SILENT, replace(new, still=dict.fromkeys(WORK, 9999)))).state is State.BUSY
    assert verdict(seen(REFUSED, new)).state is State.LOADING


@pytest.mark.parametrize("thing", ["log", "memory", "server_cpu"])
def test_what_an_idle_server_does_is_no_work(thing):
    """A log line or the server's own loop does not make a hung engine busy."""
    assert verdict(seen(SILENT, saw(quiet=9999, **{thing: 1}))).state is State.HUNG


@pytest.mark.parametrize("thing", LOAD)
def test_one_thing_that_moves_is_a_load(thing):
    """Log, memory, the server's processor, a rank's, a GPU: each alone shows that a load goes on."""
    assert verdict(seen(REFUSED, saw(quiet=9999, **{thing: 1}))).state is State.LOADING


def test_the_first_trouble_is_the_verdict():
    """With everything wrong at once, what is mended first is said first, down to a cluster that is well."""
    low, cut = facts(available=GIB, down=["enp1s0f0np0"]), facts(down=["enp1s0f0np0"])
    key, bad = Answer(401, "", 0.1), {"broken": {"GPU on the host": "none"}}
    steps = [
        (Seen(None, [HEAD], saw(worker=facts(ranks=0)), key, **bad), State.NOT_RUNNING),
        (seen(key, saw(worker=facts(ranks=0)), False, [HEAD], **bad), State.RANK_LOST),
        (seen(key, saw(worker=facts(ranks=0)), False, **bad), State.NOT_RUNNING),
        (seen(key, saw(worker=facts(ranks=0)), **bad), State.RANK_LOST),
        (seen(key, saw(worker=low), **bad), State.KEY_WRONG),
        (seen(WELL, saw(worker=low), **bad), State.MEMORY_LOW),
        (seen(WELL, saw(worker=cut), **bad), State.LINKS_DEGRADED),
        (seen(WELL, STALE, **bad), State.UNKNOWN),
        (seen(WELL, **bad), State.UNKNOWN),
        (seen(WELL), State.HEALTHY),
    ]
    assert [verdict(found).state for found, _ in steps] == [state for _, state in steps]


def test_what_is_no_refused_connection_is_no_load():
    """A question that could not be put, or no HTTP in the answer: unknown, and never hung however long it is idle."""
    no_letters = UnicodeEncodeError("latin-1", "ключ", 0, 4, "ordinal not in range(256)")
    for error in (no_letters, RemoteDisconnected("closed"), BadStatusLine("TLS"), OSError(113, "No route")):
        answer = Answer(None, str(error), 0.0, error=error)
        assert {verdict(seen(answer, saw(quiet=quiet))).state for quiet in (0, STALL)} == {State.UNKNOWN}, error


def test_a_refusal_is_no_dead_engine():
    """An answer below 500 comes from a server that runs: it is not called 'not running', nor told to be stopped."""
    refused = [Answer(status, "refused", 0.1) for status in (302, 400, 404, 429, 499)]
    assert {verdict(seen(answer)).state for answer in refused} == {State.UNKNOWN}
    assert verdict(seen(refused[0])).why == "The API answers 302: refused"


class Api(http.server.BaseHTTPRequestHandler):
    """Plays the API: `server.plays` is path to (status, body, more headers), `server.asked` what came."""

    def do_GET(self):
        """Answer, and note path, key and body."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(body or "null")))
        status, said, *headers = self.server.plays[self.path]
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(said)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said)

    do_POST = do_GET

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def playing():
    """A real HTTP server on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.daemon_threads, server.url = True, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.002,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(playing):
    """It serves a model called `a model`, and nobody has asked yet."""
    playing.asked = []
    playing.plays = {"/v1/models": (200, b'{"data": [{"id": "a model"}]}'), "/v1/completions": (200, b"{}")}
    return playing


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        ("--host 0.0.0.0 --port 8001", "http://127.0.0.1:8001"),
        ("--host 10.0.0.1", "http://10.0.0.1:8000"),
        ("--host ::1 --port 8001", "http://[::1]:8001"),
    ],
)
def test_a_server_is_asked_where_it_listens(options, url):
    """By its own command line: what the settings say may have changed since it was launched."""
    assert Served(True, NOW, (*WORDS, *options.split())).url == url


def test_one_token_is_asked_of_the_model_that_the_server_names(server):
    """With the key, and no more than one token, whatever the model is called."""
    assert api.generate(server.url, "sk").well
    body = {"model": "a model", "prompt": "1", "max_tokens": 1}
    assert server.asked == [("/v1/models", "Bearer sk", None), ("/v1/completions", "Bearer sk", body)]


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_none_is_sent(key, server):
    """An empty key is no key, and no `Bearer ` without one."""
    api.generate(server.url, key)
    assert {sent for _, sent, _ in server.asked} == {None}


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_a_refusal_is_an_answer(status, server):
    """Its status and its text, from wherever it came first."""
    server.plays["/v1/completions"] = (status, b"because")
    found = api.generate(server.url, "sk")
    assert (found.status, found.text, found.well, found.key_wrong) == (status, "because", False, status in (401, 403))
    server.plays["/v1/models"] = (status, b"because")
    assert api.generate(server.url, "sk").status == status and len(server.asked) == 3


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b'{"data": []}', b'{"data": [{}]}', b"<html>"])
def test_a_server_that_names_no_model_is_broken(text, server):
    """A 200 without a model is no token: it is said as a bad gateway's answer, and nothing more is asked."""
    server.plays["/v1/models"] = (200, text)
    found = api.generate(server.url, "sk")
    assert (found.status, len(server.asked)) == (502, 1) and "named none" in found.text


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(path, status, server):
    """The key goes to nobody else: where it points to is not asked."""
    server.plays |= {path: (status, b"", ("Location", f"{server.url}/elsewhere")), "/elsewhere": (200, b"{}")}
    assert api.generate(server.url, "sk").status == status
    assert "/elsewhere" not in {path for path, _, _ in server.asked}


def test_a_key_that_no_header_can_carry_is_an_answer(server):
    """No traceback, and nothing is sent."""
    found = api.generate(server.url, "ключ")
    assert (found.status, found.silent, server.asked) == (None, False, [])


def test_nobody_there_is_told_from_an_answer_that_broke_off(server):
    """A closed port is refused; a server that hangs up, or speaks no HTTP, is there."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        url = f"http://127.0.0.1:{there.getsockname()[1]}"
        threading.Thread(target=lambda: there.accept()[0].close(), daemon=True).start()
        broke = api.generate(url, None)
    refused = api.generate(url, None)
    assert (broke.status, broke.refused, broke.silent) == (None, False, False) and broke.text
    assert (refused.status, refused.refused, refused.silent) == (None, True, False)


def test_the_key_is_in_no_answers_text(server):
    """A server that repeats what it was asked, as a proxy's error page does, puts it on no screen and in no hook."""
    for path in ("/v1/completions", "/v1/models"):
        for status in (200, 400, 500):
            server.plays[path] = (status, b"you sent Bearer sk-secret")
            assert "sk-secret" not in api.generate(server.url, "sk-secret").text


@pytest.mark.parametrize("sent", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "], ids=["body", "headers"])
def test_an_answer_that_dribbles_is_none(sent):
    """The time is for all of it: a byte now and then is no answer."""
    with socket.create_server(("127.0.0.1", 0)) as there:

        def dribble() -> None:
            client, _ = there.accept()
            with client, suppress(OSError):
                for byte in sent + b"x" * 1000:
                    client.send(bytes([byte]))
                    time.sleep(0.002 if byte == ord("x") else 0)

        threading.Thread(target=dribble, daemon=True).start()
        found = api.ask(f"http://127.0.0.1:{there.getsockname()[1]}/health", seconds=0.05)
    assert (found.status, found.silent, found.connected) == (None, True, True) and found.seconds < 1


def test_an_answer_that_breaks_off_is_none(server):
    """Half of what was promised is not an answer, even after a 200."""
    server.plays["/v1/completions"] = (200, b"{", ("Content-Length", "999"))
    found = api.generate(server.url, None)
    assert (found.status, found.silent) == (None, False) and "IncompleteRead" in found.text


def test_a_token_takes_its_time_in_all(monkeypatch):
    """What naming the model took is not waited again, and `No token within 3 s` is of both questions."""
    clock, waits = SimpleNamespace(now=10.0), []

    def ask(url, key, body=None, seconds=0):
        took = 2.0 if body is None else seconds
        clock.now += took
        waits.append(seconds)
        return Answer(200, '{"data": [{"id": "m"}]}', took) if body is None else replace(SILENT, seconds=took)

    monkeypatch.setattr(api, "ask", ask)
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: clock.now))
    found = api.generate("http://head", None, 3)
    assert found.silent and found.seconds == pytest.approx(3) and waits == [3, 1.0]


LABELS = '{engine="0",model_name="a } model"}'
METRICS = f"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{LABELS} 2.0
vllm:num_requests_running{{engine="1"}} 3.0
vllm:num_requests_waiting{LABELS} 1.0
vllm:num_requests_waiting_by_reason{{reason="capacity"}} 50.0
vllm:prompt_tokens_total{LABELS} 1.2e+06
vllm:generation_tokens_total{LABELS} 7.0
process_cpu_seconds_total 55.0
"""


def told(server, text):
    """What is read from a server that tells this."""
    server.plays["/metrics"] = (200, text.encode())
    return api.metrics(server.url)


@pytest.mark.parametrize("name", ["kv_cache_usage_perc", "gpu_cache_usage_perc"], ids=["new", "old"])
def test_metrics_of_a_new_vllm_and_an_old_one(name, server):
    """Requests of all engines together; what moves with work, under the KV cache's name of either age."""
    found = told(server, METRICS + f"vllm:{name}{LABELS} 0.25\n")
    assert (found.running, found.waiting) == (5, 1)
    assert found.moving == {("prompt_tokens_total", "1.2e+06"), ("generation_tokens_total", "7.0"), (name, "0.25")}
    assert server.asked == [("/metrics", None, None)]


def test_what_moves_is_seen_to_move(server):
    """Another value of a counter or of the cache is a move; of anything else it is none."""
    before = told(server, METRICS).moving
    assert told(server, METRICS.replace("7.0", "8.0")).moving != before
    assert told(server, METRICS.replace("2.0", "9.0").replace("55.0", "56.0")).moving == before


@pytest.mark.parametrize("value", ["NaN", "+Inf", "many"])
def test_metrics_that_are_no_numbers_are_none(value, server):
    """Nobody is told that so many requests run."""
    assert told(server, METRICS.replace("2.0", value)) is None


def test_metrics_that_are_not_told_are_none(server):
    """Neither is anybody where the page is missing."""
    server.plays["/metrics"] = (404, b"vllm:num_requests_running 1.0\n")
    assert api.metrics(server.url) is None


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Has health look at a live server once for each answer; what the recorder says `before` it came, and `after`."""
    now, looks = [NOW], []
    monkeypatch.setattr(health.served, "ask", lambda _: Served(True, NOW - 9000, WORDS))
    monkeypatch.setattr(health.recorded, "read", lambda _: looks[-1])
    monkeypatch.setattr(api, "metrics", lambda _: None)
    monkeypatch.setattr(unanswered.node, "logs", lambda _: tmp_path)
    monkeypatch.setattr(unanswered, "time", SimpleNamespace(time=lambda: now[-1]))
    idle = saw(quiet=86400, waiting=0)

    def ask(*answers, every=HANG / 2, before=idle, after=idle):
        states, left = [], list(answers)
        monkeypatch.setattr(api, "generate", lambda *_: (looks.append(after), left.pop(0))[1])
        while left:
            looks.append(before)
            states.append(verdict(health._seen({"HANG_S": str(HANG)}, None)).state)
            now.append(now[-1] + every)
        return states

    return ask


def test_what_moves_while_the_token_is_waited_for_counts(asked):
    """After an idle hour a first token may take longer than health waits: what the ranks do meanwhile is no hang."""
    assert asked(*[SILENT] * 9, before=saw(quiet=3600), after=saw(quiet=1))[-1] is State.BUSY


def test_an_idle_server_whose_first_token_is_slow_is_busy(asked):
    """Nothing has moved for a day, since nobody asked: it is hung when health itself has waited HANG_S, not before."""
    assert asked(SILENT, SILENT, SILENT) == [State.BUSY, State.BUSY, State.HUNG]
    assert asked(WELL, SILENT, SILENT) == [State.HEALTHY, State.BUSY, State.BUSY]


def test_looks_far_apart_make_no_hang(asked):
    """Who asks once an hour knows nothing of the hour: somebody may have had his tokens."""
    assert asked(*[SILENT] * 9, every=HANG / 2 + 1) == [State.BUSY] * 9


def test_a_refused_connection_is_no_wait(asked):
    """A server that is launched anew loads: what was waited for before counts no more."""
    assert asked(SILENT, SILENT, REFUSED, SILENT, SILENT)[-1] is State.BUSY


def there(*addresses):
    """Nodes that answer through Ray."""
    return [Node(at, "", 1, {"host": {}}) for at in addresses]


@pytest.fixture
def looked(asked, monkeypatch):
    """What health has seen when recorder and Ray say this, and how often Ray was asked."""

    def look(record, *addresses, error=None, answer=SILENT, told=()):
        calls, pages = [], list(told)

        def ask(_):
            calls.append(1)
            if error:
                raise error
            return there(*addresses)

        monkeypatch.setattr(api, "metrics", lambda _: pages.pop(0) if pages else None)
        monkeypatch.setattr(api, "generate", lambda *_: answer)
        monkeypatch.setattr(health.recorded, "read", lambda _: record)
        monkeypatch.setattr(health.nodes, "ask", ask)
        return health._seen({"HANG_S": str(HANG)}, None), len(calls)

    return look


def test_ray_is_asked_only_where_the_recorder_does_not_tell(looked):
    """It takes seconds: where every node was seen just now, those are the nodes."""
    assert [looked(saw())[1], looked(STALE)[1], looked(None)[1], looked(saw(unseen=True))[1]] == [0, 1, 1, 1]
    assert looked(saw())[0].nodes == [HEAD, WORKER] and looked(saw(), answer=DEAD)[1] == 1


def test_one_look_that_was_missed_is_asked_of_ray(looked):
    """Who has no rank is known then; where Ray does not answer it is not, and nobody is told to take nodes down."""
    assert verdict(looked(saw(unseen=True), HEAD, WORKER)[0]).state is State.BUSY
    assert verdict(looked(saw(unseen=True), HEAD)[0]).state is State.RANK_LOST
    lost, _ = looked(saw(unseen=True), error=Exit("Ray does not answer"))
    assert lost.nodes is None and verdict(lost).state is State.BUSY


def test_the_queue_before_a_token_is_told(looked):
    """By the last page of metrics that came while it was waited for."""
    pages = [Metrics(1, 4, frozenset()), Metrics(1, 3, frozenset())]
    assert "(1 requests run, 3 wait)" in verdict(looked(saw(), told=pages)[0]).why
    assert "(1 requests run, 4 wait)" in verdict(looked(saw(), told=[pages[0], None])[0]).why


STILL = {"cpu 10.0.0.1": 9, "cpu 10.0.0.2": 7, "memory 10.0.0.1": 5, "memory 10.0.0.2": 6, "server_cpu": 1}
VITALS = {"at": NOW - 2, "nodes": {HEAD: facts(ranks=2), WORKER: None}, "quiet": STILL, "silent": {}}


@pytest.fixture
def vitals(monkeypatch, tmp_path):
    """Where the recorder writes, a folder of this test."""
    monkeypatch.setattr(recorded.node, "logs", lambda _: tmp_path)
    monkeypatch.setattr(recorded, "time", SimpleNamespace(time=lambda: NOW))
    return tmp_path


def test_what_the_recorder_wrote_is_read(vitals):
    """Its age, the ranks that live, and for how long nothing of what is asked about has moved."""
    (vitals / "vitals.json").write_text(json.dumps(VITALS))
    found = recorded.read({})
    assert (found.age, found.fresh, found.ranks) == (2, True, 2)
    assert (found.quiet("cpu"), found.quiet("memory"), found.quiet("cpu", "memory")) == (7, 5, 5)


def test_what_nobody_looked_at_has_not_been_quiet(vitals):
    """Nor is the name of a thing a part of another's."""
    (vitals / "vitals.json").write_text(json.dumps(VITALS))
    found = recorded.read({})
    assert (found.quiet("gpu"), found.quiet("waiting"), found.quiet("server"), found.quiet()) == (0, 0, 0, 0)


@pytest.mark.parametrize(("age", "fresh"), [(-1.5, False), (-1, True), (FRESH_S, True), (FRESH_S + 0.1, False)])
def test_what_was_written_in_the_future_is_not_fresh(age, fresh):
    """A clock that was set back: for as long as it takes, nobody knows of when that is."""
    assert saw(age=age).fresh is fresh


@pytest.mark.parametrize("text", [None, "", "{}", "null", "[]", '{"at": 1}', '{"at": null, "nodes": {}, "quiet": {}}'])
def test_what_the_recorder_did_not_write_is_none(text, vitals):
    """No file, half a file, another file: unknown, and no traceback."""
    if text is not None:
        (vitals / "vitals.json").write_text(text)
    assert recorded.read({}) is None
