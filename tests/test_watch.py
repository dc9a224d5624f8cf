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


def test_a_success_that_changes_nothing_is_not_printed(seen):
    """A server that stays well brings two lines: the server is well, and the hook is armed."""
    said, due = seen([WELL] * 5)
    assert (said[0], len(said), due) == ("well", 2, [])


def test_a_clock_that_is_set_makes_no_hang(clock):
    """A jump of the clock, or a sleep of the machine, does not count as time without an answer."""
    outage = Outage(failures=1, hang=300, moved=clock.now)
    assert outage.see(WELL, START)[1] is None
    said, due = outage.see(silent(), START + 3600)
    assert due is None and "busy" in said[0]


def test_the_hook_is_due_after_failures_in_a_row(seen):
    """The hook gets the number of failures and the time of the first. Each failure before is a line."""
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
    """A watch that starts during a load prints one line, runs no hook, and is armed by the first success."""
    said, due = seen([DOWN] * 40)
    assert due == [] and sum(line.startswith("held back") for line in said) == 1 and len(said) == 4
    _, due = seen([DOWN] * 40 + [WELL] + [DOWN] * 3)
    assert [number for number, _ in due] == [43]


@pytest.mark.parametrize("look", [KEY, AWAY, Look("odd", "404")], ids=lambda look: look.kind)
def test_a_wrong_key_or_a_lost_network_is_not_counted(look, seen):
    """Each change brings one line. A look that is not counted ends a row of failures."""
    said, due = seen([WELL, *[look] * 50, WELL])
    assert due == [] and len(said) == 4 and "not counted" in said[2]
    assert seen([WELL, DOWN, DOWN, look, DOWN, DOWN])[1] == []


def test_busy_is_never_counted(seen):
    """While the metrics move, hours without an answer bring one line."""
    said, due = seen([WELL, *(silent(("tokens", str(n // 9))) for n in range(500))])
    assert due == [] and len(said) == 3 and said[2].startswith("busy")


@pytest.mark.parametrize("look", [silent(("tokens", "7")), Look("silent")], ids=["still", "no metrics"])
def test_a_hang_counts_after_hang_s_without_a_move(look, seen):
    """HANG_S after the last success or move, silence is a failure, with or without metrics."""
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
    """A run is in the file before the hook starts, and a new watch reads the file. A clock set back allows no run."""
    hook.check()
    assert hook.claim(START) is None
    assert json.loads(hook.file.read_text()) == [START]
    assert claims(replace(hook), [-DAY_S, -10, 10, 3599]) == []


@pytest.mark.parametrize("text", ["", "[1, ", "null", "7", "[null]", '["x"]'])
def test_a_file_that_is_no_list_of_times_stops_the_hook(text, hook):
    """A watch that starts ends with a message. A watch that runs holds the hook back."""
    hook.check()
    hook.file.write_text(text)
    assert "cannot remember" in hook.claim(START) and hook.file.read_text() == text
    with pytest.raises(Exit, match="cannot remember"):
        hook.check()


def test_a_file_that_cannot_be_written_stops_the_hook(hook):
    """A folder that cannot be made stops the hook too. A watch without a hook needs no file."""
    hook.file.parent.write_text("a file where the folder should be")
    assert "cannot remember" in hook.claim(START)
    with pytest.raises(Exit, match="cannot remember"):
        hook.check()
    replace(hook, words=()).check()


def test_the_reason_against_the_hook_is_printed_once_an_outage(hook, capfd):
    """The reason is one line in an outage, and one line in the next outage."""
    hook.check()
    outage = Outage(failures=1, hang=300)
    for look in [WELL, *[DOWN] * 5, WELL, *[DOWN] * 5]:
        act(outage, hook, "http://head:8000", look)
    said = capfd.readouterr().err
    assert (said.count("hook done"), said.count("held back: the hook ran at")) == (1, 2)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \w", line) for line in said.splitlines())


def test_without_a_hook_the_outage_is_only_printed(hook, capfd):
    """An empty WATCH_HOOK runs nothing and writes no file."""
    outage = Outage(failures=1, hang=300)
    for look in [WELL, *[DOWN] * 5]:
        act(outage, replace(hook, words=()), "http://head:8000", look)
    assert capfd.readouterr().err.count("WATCH_HOOK is empty") == 1 and not hook.file.exists()


def test_the_hook_gets_the_event_and_no_secret(operator, tmp_path, capfd):
    """The hook gets the watch's environment with the event, and without secrets. Its output goes to standard error."""
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
    """The watch kills the hook's whole process group, and goes on."""
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
    """A signal takes effect after the hook has ended, so the hook never stops half way."""
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
    """The operator learns of the error before an outage. The message shows no word of the hook."""
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
def test_each_answer_of_a_real_server_is_classified(status, kind):
    """A token is well. 4xx does not count, 5xx fails. If the server is silent, the watch reads the metrics."""
    with playing(status) as url:
        found = probe(url, "key", 0.05 if status is None else 5)
    assert found.kind == kind
    assert bool(found.moving) == (status is None)


def test_a_closed_port_fails():
    """A server that has ended refuses the connection."""
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
def test_each_failed_connection_is_classified(error, kind, monkeypatch):
    """A server out of reach fails. A lost network, an unknown name or a bad certificate does not count."""

    def lost(*_, **__):
        raise error

    monkeypatch.setattr(api.socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(api.http.client.HTTPConnection, "connect", lost)
    assert probe("http://head:8000", None).kind == kind


def test_a_name_server_that_is_silent_is_no_silent_server(monkeypatch):
    """A silent name server is trouble of the watch's network, and counts no failure."""
    monkeypatch.setattr(api.socket, "getaddrinfo", lambda *_: time.sleep(0.5))
    assert probe("http://head:8000", None, 0.02).kind == "away"


def test_a_servers_text_stays_on_its_line(monkeypatch):
    """In the watch's lines and in the hook's environment the text of an answer is short and printable."""
    monkeypatch.setattr(api, "ask_api", lambda *_, **__: Answer(500, "a\n\0\x1b[31mb\udcff" * 100, 0.1))
    reason = probe("http://head:8000", None).reason
    assert reason.isprintable() and len(reason) <= 190


@pytest.mark.parametrize(
    "url",
    ["http://head:8000", "https://head", "http://10.0.0.1:8000/", "http://[fe80::1]:8000", "http://a.b-c.example"],
)
def test_urls_that_are_accepted(url):
    """A url has a scheme, a host and perhaps a port. A slash at its end is dropped."""
    assert checked_url(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *(None, "", "head:8000", "ftp://head", "http://", "http://head:0", "http://head:65536", "http://head:x"),
        *("http://head/v1", "http://head?x", "http://head#x", "http://me:marker7@head", "http://he ad"),
        *("http://::1:8000", "http://[:::1]:8000"),
    ],
)
def test_urls_that_are_refused(url):
    """The message shows the form of a url. It does not repeat the refused url, which may hold a password."""
    with pytest.raises(Exit, match=r"it takes http://HOST:PORT or https://HOST:PORT, no more\.") as refused:
        checked_url(url)
    assert "marker7" not in refused.value.message


def test_a_sigterm_ends_the_watch_in_order(operator, capfd):
    """The watch prints its first and last line, and returns. The old signal handler is restored."""
    before = signal.getsignal(signal.SIGTERM)
    operator.setattr(watch.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with playing(200) as url:
        watch_api(load_settings(), f"{url}/")
    events = [line.split(" ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    hung = "after 10 failures: no hook; hung after 300 s"
    assert events[0] == f"started: {url} every 30 s; {hung}" and events[1] == "well" and events[-1] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_key_that_cannot_be_sent_is_refused(operator):
    """The watch does not start, and the message does not repeat the key."""
    operator.setenv("VLLM_API_KEY", "ключ")
    with pytest.raises(Exit, match="VLLM_API_KEY has letters") as refused:
        watch_api(load_settings(), "http://head:8000")
    assert "ключ" not in refused.value.message
