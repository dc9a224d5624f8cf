"""`inv watch`: what counts as a failure, what never does, and how seldom the operator's hook may run."""

import errno
import http.server
import json
import os
import re
import signal
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import api, watch
from cluster.api import Answer
from cluster.settings import load_settings
from cluster.watch import DAY_S, Hook, Look, Outage, act, checked_url, configured_hook, probe, watch_api

WELL, DOWN, KEY, AWAY = Look("well"), Look("failed", "refused"), Look("key", "401"), Look("away", "unreachable")
START = 1_700_000_000
DUE = {
    "WATCH_EVENT": "hung",
    "WATCH_REASON": "nothing moved",
    "WATCH_FAILURES": "10",
    "WATCH_SINCE": "2023-11-14T22:13:20Z",
    "WATCH_URL": "http://head:8000",
}


def silent(*samples):
    """A look without an answer in time, while the metrics had these samples."""
    return Look("silent", moving=frozenset(samples))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only a test moves, by `clock.now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: clock.now}))
    return clock


@pytest.fixture
def seen(clock):
    """Returns the news of looks so many seconds apart, and the looks at which the hook was due, with its variables."""

    def see(looks, every=30):
        outage = Outage(failures=3, hang=300, moved=clock.now)
        said, due = [], []
        for number, look in enumerate(looks):
            lines, call = outage.see(look, START + number * every)
            clock.now += every
            said += lines
            due += [(number, call)] if call else []
        return said, due

    return see


def test_a_success_that_changes_nothing_is_not_said(seen):
    """A server that stays well gives one line, and one that says that the watch is armed."""
    said, due = seen([WELL] * 5)
    assert (said[0], len(said), due) == ("well", 2, [])


def test_a_clock_that_is_set_makes_no_hang(clock):
    """A machine that has just learnt the time of day, or has slept, has not waited that hour."""
    outage = Outage(failures=1, hang=300, moved=clock.now)
    assert outage.see(WELL, START)[1] is None
    said, due = outage.see(silent(), START + 3600)
    assert due is None and "busy" in said[0]


def test_failures_in_a_row_are_due(seen):
    """The hook gets their number and the time of the first; each failure until then is a line."""
    said, due = seen([WELL, DOWN, DOWN, WELL, DOWN, DOWN, DOWN, DOWN])
    first = {"WATCH_EVENT": "down", "WATCH_REASON": "refused", "WATCH_SINCE": "2023-11-14T22:15:20Z"}
    assert due == [(6, first | {"WATCH_FAILURES": "3"}), (7, first | {"WATCH_FAILURES": "4"})]
    assert said[2:] == [
        "failed 1 of 3: refused",
        "failed 2 of 3: refused",
        "well again after 60 s",
        "failed 1 of 3: refused",
        "failed 2 of 3: refused",
        "failed 3 of 3: refused",
    ]


def test_nothing_is_due_before_the_server_was_well_once(seen):
    """A watch that starts while the model loads does not act, says so once, and acts after the first success."""
    said, due = seen([DOWN] * 40)
    assert due == [] and sum(line.startswith("held back") for line in said) == 1 and len(said) == 4
    _, due = seen([DOWN] * 40 + [WELL] + [DOWN] * 3)
    assert [number for number, _ in due] == [43]


@pytest.mark.parametrize("look", [KEY, AWAY, Look("odd", "404")], ids=lambda look: look.kind)
def test_what_is_no_failure_is_never_counted(look, seen):
    """A wrong key and trouble of the watch's own network are said once per change, and end a row of failures."""
    said, due = seen([WELL, *[look] * 50, WELL])
    assert due == [] and len(said) == 4 and "not counted" in said[2]
    assert seen([WELL, DOWN, DOWN, look, DOWN, DOWN])[1] == []


def test_busy_is_never_counted(seen):
    """While something moves, hours without an answer are one line."""
    said, due = seen([WELL, *(silent(("tokens", str(n // 9))) for n in range(500))])
    assert due == [] and len(said) == 3 and said[2].startswith("busy")


@pytest.mark.parametrize("look", [silent(("tokens", "7")), Look("silent")], ids=["still", "no metrics"])
def test_a_hang_counts_once_nothing_moved_for_so_long(look, seen):
    """HANG_S after the last success or move, silence is a failure, whether the metrics answer or not."""
    said, due = seen([WELL] + [look] * 20, every=60)
    assert said[2].startswith("busy") and "failed 1 of 3: no answer, and nothing has moved for 300 s" in said
    # The first samples that are told count as a move.
    assert due[0][0] == (8 if look.moving else 7) and due[0][1]["WATCH_EVENT"] == "hung"


def test_metrics_that_come_and_go_are_no_move(seen):
    """Samples that are the same after a gap have not moved."""
    looks = [WELL, *[silent(("tokens", "7")), Look("silent")] * 10]
    assert seen(looks, every=60)[1]


@pytest.fixture
def hook(tmp_path):
    """A hook that may run once an hour and three times a day."""
    return Hook(("true",), tmp_path / "node-ray/watch.json", 3600, 3)


def claims(hook, seconds):
    """The seconds, of these, at which the hook may run."""
    return [at for at in seconds if hook.claim(START + at) is None]


def test_never_twice_within_the_cooldown_nor_too_often_in_a_day(hook):
    """The hook runs again after each cool-down, and at most WATCH_MAX times in any 24 hours."""
    hook.check()
    assert claims(hook, range(0, DAY_S + 7200, 600)) == [0, 3600, 7200, DAY_S, DAY_S + 3600]
    assert "WATCH_COOLDOWN_S is 3600" in hook.claim(START + DAY_S + 3601)
    assert "WATCH_MAX is 3" in replace(hook, cooldown=0).claim(START + DAY_S + 3601)


def test_runs_are_remembered_by_the_next_watch(hook):
    """A run is in the file before the hook starts; a new watch reads the file; a clock set back frees no run."""
    hook.check()
    assert hook.claim(START) is None
    assert json.loads(hook.file.read_text()) == [START]
    assert claims(replace(hook), [-DAY_S, -10, 10, 3599]) == []


@pytest.mark.parametrize("text", ["", "[1, ", "null", "7", "[null]", '["x"]'])
def test_a_file_that_cannot_be_believed_stops_the_hook(text, hook):
    """A file that is no list of times ends a watch that starts, and holds back the hook of one that runs."""
    hook.check()
    hook.file.write_text(text)
    assert "cannot remember" in hook.claim(START) and hook.file.read_text() == text
    with pytest.raises(Exit, match="cannot remember"):
        hook.check()


def test_a_file_that_cannot_be_written_stops_the_hook(hook):
    """A folder that cannot be made does the same; a watch without a hook needs no file."""
    hook.file.parent.write_text("a file where the folder should be")
    assert "cannot remember" in hook.claim(START)
    with pytest.raises(Exit, match="cannot remember"):
        hook.check()
    replace(hook, words=()).check()


def test_what_holds_the_hook_back_is_said_once_an_outage(hook, capfd):
    """The reason is a line once in an outage, and again in the next."""
    hook.check()
    outage = Outage(failures=1, hang=300)
    for look in [WELL, *[DOWN] * 5, WELL, *[DOWN] * 5]:
        act(outage, hook, "http://head:8000", look)
    said = capfd.readouterr().err
    assert (said.count("hook done"), said.count("held back: the hook ran at")) == (1, 2)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \w", line) for line in said.splitlines())


def test_without_a_hook_the_outage_is_only_said(hook, capfd):
    """An empty WATCH_HOOK runs nothing and writes no file."""
    outage = Outage(failures=1, hang=300)
    for look in [WELL, *[DOWN] * 5]:
        act(outage, replace(hook, words=()), "http://head:8000", look)
    assert capfd.readouterr().err.count("WATCH_HOOK is empty") == 1 and not hook.file.exists()


def test_the_hook_gets_the_event_and_no_secret(operator, tmp_path, capfd):
    """The hook's environment is the watch's, with the event and without secrets. Its output goes to standard error."""
    script = tmp_path / "a hook"
    script.write_text(f'#!/bin/sh\nenv >"{tmp_path}/env"\necho "out $1"\nexit 3\n')
    script.chmod(0o700)
    for name, value in {"VLLM_API_KEY": "sk_marker7", "HF_TOKEN": "hf_marker7", "PDU": "10.0.0.9"}.items():
        operator.setenv(name, value)
    operator.setenv("WATCH_HOOK", f"'{script}' '$HOME *'")
    said = configured_hook(load_settings()).call(DUE)
    env = (tmp_path / "env").read_text()
    assert "marker7" not in env and "API_KEY" not in env and "HF_TOKEN" not in env
    assert set(env.splitlines()) >= {"PDU=10.0.0.9", *(f"{name}={value}" for name, value in DUE.items())}
    assert said == "hook failed with status 3."
    assert capfd.readouterr() == ("", "out $HOME *\n")


def test_a_hook_that_does_not_end_is_killed_with_its_children(hook, tmp_path, monkeypatch):
    """The hook's whole process group ends, and the watch goes on."""
    monkeypatch.setattr(watch, "HOOK_S", 0.05)
    words = ("sh", "-c", 'sleep 60 & echo $! >"$0"; wait', str(tmp_path / "child"))
    assert "was killed" in replace(hook, words=words).call(DUE)
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 5
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.002)
    assert not _runs(child)


def _runs(process):
    """Whether a process runs; one that has ended and whose parent has not collected it does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stop_waits_for_the_hook(number, hook, tmp_path):
    """A signal counts once the hook has ended, so no node is left switched off half way."""
    words = ("sh", "-c", f'kill -{number:d} {os.getpid()}; sleep 0.01; touch "$0"', str(tmp_path / "whole"))
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            replace(hook, words=words).call(DUE)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert (tmp_path / "whole").exists()


def test_a_hook_that_cannot_start_is_refused_at_the_start(hook):
    """The operator hears of it before the outage; the words, which may hold a password, are not repeated."""
    wrong = replace(hook, words=("PDU_PASSWORD=marker7", "/nowhere/hook"))
    with pytest.raises(Exit, match="first word of WATCH_HOOK is no program") as refused:
        wrong.check()
    said = wrong.call(DUE)
    assert said == "hook cannot be started: No such file or directory." and "marker7" not in refused.value.message


class Server(http.server.BaseHTTPRequestHandler):
    """Plays a server with a model and metrics, which answers a completion with the status `plays`; None is never."""

    plays: int | None = 200

    def do_GET(self):
        """The model's name, and the metrics."""
        metrics = b"vllm:prompt_tokens_total 7\nvllm:num_requests_running 1\n"
        self.answer(200, metrics if self.path == "/metrics" else b'{"data": [{"id": "tiny"}]}')

    def do_POST(self):
        """A completion."""
        if self.plays is None:
            return self.server.ended.wait(5)
        self.answer(self.plays, b'{"choices": [{"text": "1"}]}')

    def answer(self, status, body):
        """One whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def playing(status):
    """Yield the address of a server on this machine that answers with this status."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Plays", (Server,), {"plays": status}))
    server.ended, server.daemon_threads = threading.Event(), True
    threading.Thread(target=server.serve_forever, args=(0.002,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "kind"), [(200, "well"), (401, "key"), (403, "key"), (404, "odd"), (500, "failed"), (None, "silent")]
)
def test_a_real_answer_is_what_it_is(status, kind):
    """A token is well; 4xx is an answer and no failure; 5xx fails; in silence the metrics are read."""
    with playing(status) as url:
        found = probe(url, "key", 0.05 if status is None else 5)
    assert found.kind == kind
    assert bool(found.moving) == (status is None)


def test_a_closed_port_fails():
    """A server that is gone refuses the connection."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert probe(url, None).kind == "failed"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EHOSTUNREACH, "No route to host"), "failed"),
        (TimeoutError("timed out"), "failed"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "away"),
        (socket.gaierror(-2, "Name or service not known"), "away"),
        (ssl.SSLCertVerificationError("certificate has expired"), "odd"),
        (ssl.SSLError(errno.EPERM, "tlsv1 alert internal error"), "failed"),
    ],
    ids=repr,
)
def test_why_no_connection_came_about(error, kind, monkeypatch):
    """A server that cannot be reached fails; a lost network, an unknown name and a bad certificate are no failure."""

    def lost(*_, **__):
        raise error

    monkeypatch.setattr(api.socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(api.http.client.HTTPConnection, "connect", lost)
    assert probe("http://head:8000", None).kind == kind


def test_a_name_server_that_is_silent_is_no_silent_server(monkeypatch):
    """The watch lacks a network then, and no failure is counted."""
    monkeypatch.setattr(api.socket, "getaddrinfo", lambda *_: time.sleep(0.5))
    assert probe("http://head:8000", None, 0.02).kind == "away"


def test_a_strangers_text_stays_on_its_line(monkeypatch):
    """An answer's text is printable and short in the watch's lines and in the hook's environment."""
    monkeypatch.setattr(api, "ask_api", lambda *_, **__: Answer(500, "a\n\0\x1b[31mb\udcff" * 100, 0.1))
    reason = probe("http://head:8000", None).reason
    assert reason.isprintable() and len(reason) <= 190


@pytest.mark.parametrize(
    "url",
    ["http://head:8000", "https://head", "http://10.0.0.1:8000/", "http://[fe80::1]:8000", "http://a.b-c.example"],
)
def test_addresses_that_are_taken(url):
    """A url is a scheme, a host and perhaps a port; a slash at its end is dropped."""
    assert checked_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "head:8000", "ftp://head", "http://", "http://head:0", "http://head:65536", "http://head:x"),
        *("http://head/v1", "http://head?x", "http://head#x", "http://me:marker7@head", "http://he ad"),
        *("http://::1:8000", "http://[:::1]:8000"),
    ],
)
def test_addresses_that_are_refused(url):
    """Any other url is refused with a sentence that says what is taken, and does not repeat a password."""
    with pytest.raises(Exit, match=r"it takes http://HOST:PORT or https://HOST:PORT, no more\.") as refused:
        checked_url(url)
    assert "marker7" not in refused.value.message


def test_a_key_that_cannot_be_sent_is_refused(operator):
    """The watch does not start, and does not repeat the key."""
    operator.setenv("VLLM_API_KEY", "ключ")
    with pytest.raises(Exit, match="VLLM_API_KEY has letters") as refused:
        watch_api(load_settings(), "http://head:8000")
    assert "ключ" not in refused.value.message


def test_a_sigterm_ends_the_watch_in_order(operator, capfd):
    """The watch says what it does first and last, and returns; the signal's handler is the one before."""
    before = signal.getsignal(signal.SIGTERM)
    operator.setattr(watch.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with playing(200) as url:
        watch_api(load_settings(), f"{url}/")
    events = [line.split(" ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    hung = "after 10 failures: no hook; hung after 300 s"
    assert events[0] == f"started: {url} every 30 s; {hung}" and events[1] == "well" and events[-1] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before
