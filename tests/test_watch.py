"""`inv watch`: what counts as a failure, what never does, and how rarely the operator's hook may run."""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from invoke import Exit

from command import run
from command.command import Command
from settings import resolve
from cluster import api
from vitals import watch
from vitals import hook as vitals_hook
from vitals.api import Answer
from vitals.hook import DAY, Hook, configured
from vitals.outage import Due, Look, Outage

WELL, DOWN, KEY, AWAY = Look("well"), Look("failed", "refused"), Look("key", "401"), Look("away", "unreachable")
START = 1_700_000_000


def silent(*samples):
    """A look that nobody answered in time, while the metrics told these samples."""
    return Look("silent", moving=frozenset(samples))


def seen(looks, every=30, outage=None):
    """What is said of looks so many seconds apart, and at which of them something was due."""
    outage = outage or Outage(failures=3, hang=300, clock=lambda: START)
    said, due = [], []
    for number, look in enumerate(looks):
        now = START + number * every
        outage.clock = lambda now=now: now
        lines, call = outage.see(look, now)
        said += lines
        due += [(number, call)] if call else []
    return said, due


def test_a_success_that_changes_nothing_is_not_said():
    """A server that is well is one line, and one that says that the watch is armed."""
    said, due = seen([WELL] * 5)
    assert (said[0], len(said), due) == ("well", 2, [])


def test_a_clock_that_is_set_makes_no_hang():
    """An hour that nobody waited, on a machine that has just learnt the time of day or has slept."""
    outage = Outage(failures=1, hang=300, clock=lambda: 0.0)
    assert outage.see(WELL, START)[1] is None
    said, due = outage.see(silent(), START + 3600)
    assert due is None and "busy" in said[0]


def test_failures_in_a_row_are_due():
    """After so many of them, with their count and the time of the first; each one until then is said."""
    said, due = seen([WELL, DOWN, DOWN, WELL, DOWN, DOWN, DOWN, DOWN])
    assert due == [(6, Due("down", "refused", 3, START + 120)), (7, Due("down", "refused", 4, START + 120))]
    assert said[2:] == [
        "failed 1 of 3: refused",
        "failed 2 of 3: refused",
        "well again after 60 s",
        "failed 1 of 3: refused",
        "failed 2 of 3: refused",
        "failed 3 of 3: refused",
    ]


def test_nothing_is_due_before_the_server_was_well_once():
    """A watch that starts while the model loads does not act, says so once, and acts from the first success on."""
    said, due = seen([DOWN] * 40)
    assert due == [] and sum(line.startswith("held back") for line in said) == 1 and len(said) == 4
    _, due = seen([DOWN] * 40 + [WELL] + [DOWN] * 3)
    assert [number for number, _ in due] == [43]


@pytest.mark.parametrize("look", [KEY, AWAY, Look("odd", "404")], ids=lambda look: look.kind)
def test_what_is_no_failure_is_never_counted(look):
    """A wrong key and a lost network of the watch's own are said once per change, and end a row of failures."""
    said, due = seen([WELL, *[look] * 50, WELL])
    assert due == [] and len(said) == 4 and "not counted" in said[2]
    assert seen([WELL, DOWN, DOWN, look, DOWN, DOWN])[1] == []


def test_busy_is_never_counted():
    """While something moves, hours without an answer are one line."""
    said, due = seen([WELL, *(silent(("tokens", str(n // 9))) for n in range(500))])
    assert due == [] and len(said) == 3 and said[2].startswith("busy")


@pytest.mark.parametrize("look", [silent(("tokens", "7")), Look("silent")], ids=["still", "no metrics"])
def test_a_hang_counts_once_nothing_moved_for_so_long(look):
    """HANG_S after the last success or move, silence is a failure, whether the metrics answer or not."""
    said, due = seen([WELL] + [look] * 20, every=60)
    assert said[2].startswith("busy") and "failed 1 of 3: no answer, and nothing has moved for 300 s" in said
    # The first samples that are told count as a move.
    assert due[0][0] == (8 if look.moving else 7) and due[0][1].event == "hung"


def test_metrics_that_come_and_go_are_no_move():
    """Samples that are the same after a gap have not moved."""
    looks = [WELL, *[silent(("tokens", "7")), Look("silent")] * 10]
    assert seen(looks, every=60)[1]


@pytest.fixture
def hook(tmp_path):
    """A hook that may run once an hour and three times a day."""
    return Hook(("true",), tmp_path / "node-ray/watch.json", 3600, 3)


def claims(hook, seconds):
    """At which of these seconds the hook may run."""
    return [at for at in seconds if hook.claim(START + at) is None]


def test_never_twice_within_the_cooldown_nor_too_often_in_a_day(hook):
    """Once, again after each cool-down, at most WATCH_MAX times in 24 hours, and then when the first is a day ago."""
    hook.check()
    assert claims(hook, range(0, DAY + 7200, 600)) == [0, 3600, 7200, DAY, DAY + 3600]
    assert hook.claim(START + DAY + 3601)[0] == "cool-down"
    assert replace(hook, cooldown=0).claim(START + DAY + 3601)[0] == "ceiling"


def test_runs_are_remembered_by_the_next_watch(hook):
    """They are in the file before the hook runs; a new watch reads them, and a clock set back frees nothing."""
    hook.check()
    assert hook.claim(START) is None
    assert json.loads(hook.file.read_text()) == [START]
    assert claims(replace(hook), [-DAY, -10, 10, 3599]) == []


@pytest.fixture
def slow(monkeypatch):
    """Another watch, in a thread, takes its time between reading when the hook ran and writing it down.

    `read` is set once it has read; it goes on when `go` is set, or `patience` is over.
    """
    made, runs = SimpleNamespace(read=threading.Event(), go=threading.Event(), patience=0.02), Hook._runs

    def slowly(hook):
        found = runs(hook)
        if threading.current_thread() is not threading.main_thread():
            made.read.set()
            made.go.wait(made.patience)
        return found

    monkeypatch.setattr(Hook, "_runs", slowly)
    return made


def test_two_watches_at_once_run_the_hook_once(hook, slow):
    """Whoever comes second finds what the first wrote down."""
    hook.check()
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda at: hook.claim(START + at), range(3)))
    assert sorted(each[0] if each else "runs" for each in told) == ["cool-down", "cool-down", "runs"]
    assert len(json.loads(hook.file.read_text())) == 1


def test_a_watch_that_starts_forgets_no_run(hook, slow):
    """It writes the file to see that it can, while another writes down that the hook runs."""
    hook.check()
    slow.patience = 0.05
    with ThreadPoolExecutor() as pool:
        starts = pool.submit(hook.check)
        assert slow.read.wait(5) and hook.claim(START) is None
        slow.go.set()
        assert starts.result(5) is None
    assert json.loads(hook.file.read_text()) == [START]


@pytest.mark.parametrize("text", ["", "{}", "[true]", "[NaN]", "[1e99]", '["1"]', "[-1]", "\0", "[null]"])
def test_a_file_that_cannot_be_believed_stops_the_hook(text, hook):
    """Whatever is not a list of times ends the watch at its start, and holds the hook back later."""
    hook.check()
    hook.file.write_text(text)
    assert hook.claim(START)[0] == "file" and hook.file.read_text() == text
    with pytest.raises(Exit, match="cannot remember"):
        hook.check()


def test_a_file_that_cannot_be_written_stops_the_hook(hook):
    """The same for a folder that cannot be made; without a hook nobody needs the file."""
    hook.file.parent.write_text("a file where the folder should be")
    assert hook.claim(START)[0] == "file"
    with pytest.raises(Exit, match="cannot remember"):
        hook.check()
    replace(hook, words=()).check()


def test_what_holds_the_hook_back_is_said_once_an_outage(hook, capfd):
    """Not at each look; and again in the next outage."""
    hook.check()
    outage = Outage(failures=1, hang=300)
    for look in [WELL, *[DOWN] * 5, WELL, *[DOWN] * 5]:
        watch.turn(outage, hook, "http://head:8000", look)
    said = capfd.readouterr().err
    assert (said.count("hook done"), said.count("held back: the hook ran at")) == (1, 2)
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \w", line) for line in said.splitlines())


def test_without_a_hook_the_outage_is_only_said(hook, capfd):
    """An empty WATCH_HOOK runs nothing and writes no file."""
    outage = Outage(failures=1, hang=300)
    for look in [WELL, *[DOWN] * 5]:
        watch.turn(outage, replace(hook, words=()), "http://head:8000", look)
    assert capfd.readouterr().err.count("WATCH_HOOK is empty") == 1 and not hook.file.exists()


def test_the_hook_gets_the_event_and_no_secret(operator, tmp_path, capfd):
    """Its environment has the event and the rest of the watch's own; its output goes to standard error."""
    script = tmp_path / "a hook"
    script.write_text(f'#!/bin/sh\nenv >"{tmp_path}/env"\necho "out $1"\nexit 3\n')
    script.chmod(0o700)
    for name, value in {"VLLM_API_KEY": "sk_marker7", "HF_TOKEN": "hf_marker7", "PDU": "10.0.0.9"}.items():
        operator.setenv(name, value)
    operator.setenv("WATCH_HOOK", f"'{script}' '$HOME *'")
    acts = configured(resolve.load(shell=os.environ))
    said = acts.call(Due("hung", "nothing moved", 10, START), "http://head:8000")
    env = (tmp_path / "env").read_text()
    assert "marker7" not in env and "API_KEY" not in env and "HF_TOKEN" not in env
    assert set(env.splitlines()) >= {
        "PDU=10.0.0.9",
        "WATCH_EVENT=hung",
        "WATCH_REASON=nothing moved",
        "WATCH_URL=http://head:8000",
        "WATCH_FAILURES=10",
        "WATCH_SINCE=2023-11-14T22:13:20Z",
    }
    assert said.startswith("hook failed: it ended with status 3")
    assert capfd.readouterr() == ("", "out $HOME *\n")


def test_a_hook_that_does_not_end_is_killed_with_its_children(tmp_path):
    """The whole of its process group goes."""
    words = ("sh", "-c", 'sleep 60 & echo $! >"$0"; wait', str(tmp_path / "child"))
    assert run.hook(Command((words,)), 0.05) == -signal.SIGKILL
    child = int((tmp_path / "child").read_text())
    until = time.monotonic() + 5
    while _runs(child) and time.monotonic() < until:
        time.sleep(0.002)
    assert not _runs(child)


def test_a_hook_that_cannot_be_killed_is_an_event(hook, monkeypatch):
    """One that sudo made another's: the watch goes on."""
    ended = []

    def refused(group, _):
        ended.append(group)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(run.os, "killpg", refused)
    monkeypatch.setattr(vitals_hook, "SECONDS", 0.01)
    said = replace(hook, words=("sleep", "9")).call(Due("down", "refused", 10, START), "http://head:8000")
    monkeypatch.undo()
    os.killpg(ended[0], signal.SIGKILL)
    assert said.startswith("hook failed: process") and "could not be killed" in said


def _runs(process):
    """Whether a process runs; what its parent has yet to collect does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, *run.ENDINGS], ids=lambda number: number.name)
def test_a_stop_waits_for_the_hook(number, tmp_path):
    """No signal leaves a node switched off half way: it counts when the hook has ended."""
    words = ("sh", "-c", f'kill -{number:d} {os.getpid()}; sleep 0.01; touch "$0"', str(tmp_path / "whole"))
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.hook(Command((words,)), 5)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert (tmp_path / "whole").exists()


def test_a_hook_that_cannot_start_is_an_event(hook):
    """The watch goes on."""
    said = replace(hook, words=("/nowhere/hook",)).call(Due("down", "refused", 10, START), "http://head:8000")
    assert said == "hook failed: /nowhere/hook cannot be started: No such file or directory."


class Server(http.server.BaseHTTPRequestHandler):
    """Plays a server: names a model, tells its metrics, and answers a completion as `plays` says; None is never."""

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
    """The address of a server on this machine that answers with this status."""
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
    """One generated token is well; 4xx is an answer and no failure; 5xx fails; silence is looked at more closely."""
    with playing(status) as url:
        found = watch.look(url, "key", 0.05 if status is None else 5)
    assert found.kind == kind
    assert bool(found.moving) == (status is None)


def test_a_closed_port_fails():
    """Nobody listens: refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert watch.look(url, None).kind == "failed"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EHOSTUNREACH, "No route to host"), "failed"),
        (TimeoutError("timed out"), "failed"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "away"),
        (socket.gaierror(-2, "Name or service not known"), "away"),
        (OSError(errno.EMFILE, "Too many open files"), "away"),
        (ssl.SSLCertVerificationError("certificate has expired"), "odd"),
        (ssl.SSLError(errno.EPERM, "tlsv1 alert internal error"), "failed"),
    ],
    ids=repr,
)
def test_why_no_connection_came_about(error, kind, monkeypatch):
    """A server that cannot be reached fails; a network, a name or a certificate that we lack is not the server's."""

    def lost(*_, **__):
        raise error

    monkeypatch.setattr(api.http.client.HTTPConnection, "connect", lost)
    assert watch.look("http://head:8000", None).kind == kind


def test_a_strangers_text_stays_on_its_line(monkeypatch):
    """An answer's text becomes printable and short before it is said or handed to the hook."""
    answer = Answer(500, "a\n\0\x1b[31mb\udcff" * 100, 0.1)
    monkeypatch.setattr(watch.api, "generate", lambda *_: answer)
    reason = watch.look("http://head:8000", None).reason
    assert reason.isprintable() and len(reason) <= 160


@pytest.mark.parametrize(
    "url",
    ["http://head:8000", "https://head", "http://10.0.0.1:8000/", "http://[fe80::1]:8000", "http://a.b-c.example"],
)
def test_addresses_that_are_taken(url):
    """A scheme, a host, perhaps a port; a slash at the end is dropped."""
    assert watch.address(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("", "head:8000", "ftp://head", "http://", "http://head:0", "http://head:65536", "http://head:x"),
        *("http://head/v1", "http://head?x", "http://head#x", "http://me:pw@head", "http://[head]", "http://he ad"),
        *("http://head\n", "http://a..b", f"http://{'a' * 64}", "http://::1:8000"),
    ],
)
def test_addresses_that_are_refused(url):
    """Anything else is refused with a sentence that says what it takes."""
    with pytest.raises(Exit, match=r"it takes http://HOST:PORT or https://HOST:PORT, no more\."):
        watch.address(url)


def test_a_key_that_cannot_be_sent_is_refused(operator):
    """At the start, and it is not said back."""
    operator.setenv("VLLM_API_KEY", "ключ")
    with pytest.raises(Exit, match="VLLM_API_KEY has letters") as refused:
        watch.watch(resolve.load(shell=os.environ), "http://head:8000")
    assert "ключ" not in refused.value.message


def test_a_sigterm_ends_the_watch_in_order(operator, capfd):
    """It says what it does first and last, and returns; the signal is what it was before."""
    before = signal.getsignal(signal.SIGTERM)
    operator.setattr(watch.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with playing(200) as url:
        watch.watch(resolve.load(shell=os.environ), f"{url}/")
    events = [line.split(" ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    hung = "after 10 failures: no hook; hung after 300 s"
    assert events[0] == f"started: {url} every 30 s; {hung}" and events[1] == "well" and events[-1] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before
