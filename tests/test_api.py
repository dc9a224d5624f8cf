"""The API's client: one token proves that a server works, the key goes nowhere else, and no server makes it wait."""

import http.server
import json
import socket
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from cluster import api
from cluster.api import Answer, ask_api, generate_token, read_metrics

MODELS = b'{"data": [{"id": "a model"}]}'
TOKEN = b'{"choices": [{"text": "1"}]}'


class Api(http.server.BaseHTTPRequestHandler):
    """Plays the API: `server.plays` maps a path to (status, body, more headers), `server.asked` keeps the requests."""

    def do_GET(self):
        """Keep path, key and body, and answer."""
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
        """Print nothing."""


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
    """The server has a model called `a model`, generates tokens, and has had no request yet."""
    playing.asked = []
    playing.plays = {"/v1/models": (200, MODELS), "/v1/completions": (200, TOKEN)}
    return playing


def test_the_model_that_the_server_names_generates_a_token(server):
    """The request has the key, the model's name and a limit of one token."""
    assert generate_token(server.url, "sk").well
    body = {"model": "a model", "prompt": "1", "max_tokens": 1}
    assert server.asked == [("/v1/models", "Bearer sk", None), ("/v1/completions", "Bearer sk", body)]


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_none_is_sent(key, server):
    """An empty key is no key: no request has an `Authorization` header."""
    generate_token(server.url, key)
    assert {sent for _, sent, _ in server.asked} == {None}


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_refusal_is_an_answer(status, server):
    """A refusal keeps its status and text, whichever of the two requests it answers."""
    server.plays["/v1/completions"] = (status, b"because")
    found = generate_token(server.url, "sk")
    assert (found.status, found.text, found.well, found.key_wrong) == (status, "because", False, status in (401, 403))
    server.plays["/v1/models"] = (status, b"because")
    assert generate_token(server.url, "sk").status == status and len(server.asked) == 3


def test_a_server_that_names_no_model_is_broken(server):
    """A 200 without a model counts as a bad gateway's answer, and no token is asked for."""
    for number, text in enumerate((b"", b"null", b"[]", b"{}", b'{"data": []}', b'{"data": [{}]}', b"<html>"), 1):
        server.plays["/v1/models"] = (200, text)
        found = generate_token(server.url, "sk")
        assert (found.status, len(server.asked)) == (502, number) and found.text.endswith(text.decode())


def test_an_answer_without_a_choice_is_no_token(server):
    """A 200 from a page or a proxy does not prove that the engine generates."""
    for text in (
        b"",
        b"null",
        b"{}",
        b'{"error": "no"}',
        b'{"choices": []}',
        b'{"choices": "1"}',
        b"<html>",
        b"[" * 9999,
    ):
        server.plays["/v1/completions"] = (200, text)
        assert generate_token(server.url, "sk").status == 502


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 302), ("/v1/completions", 308)])
def test_a_redirect_is_not_followed(path, status, server):
    """The key goes to no other server: the redirect's target gets no request."""
    server.plays |= {path: (status, b"", ("Location", f"{server.url}/elsewhere")), "/elsewhere": (200, b"{}")}
    assert generate_token(server.url, "sk").status == status
    assert "/elsewhere" not in {path for path, _, _ in server.asked}


def test_a_key_that_no_header_can_carry_is_an_answer(server):
    """The key is not sent, and nobody sees a traceback."""
    found = generate_token(server.url, "ключ")
    assert (found.status, found.silent, server.asked) == (None, False, [])


def test_a_closed_port_is_told_from_an_answer_that_broke_off(server):
    """A closed port refuses; a server that hangs up is there."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        url = f"http://127.0.0.1:{there.getsockname()[1]}"
        threading.Thread(target=lambda: there.accept()[0].close(), daemon=True).start()
        broke = generate_token(url, None)
    refused = generate_token(url, None)
    assert (broke.status, broke.refused, broke.silent) == (None, False, False) and broke.text
    assert (refused.status, refused.refused, refused.silent) == (None, True, False)


KEY = 'sk+/"7&<9'
PAGES = {
    "as it is": KEY,
    "wrapped": f"{KEY[:4]}\r\n{KEY[4:]}",
    "in JSON": json.dumps(KEY),
    "in HTML": "sk+/&quot;7&amp;&lt;9",
    "in a URL": "sk%2B%2F%227%26%3C9",
    "in a path, in small letters": "sk%2b/%227%26%3c9",
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_the_key_is_in_no_answers_text(page, server):
    """An error page that repeats the key, in whatever form, does not bring the key to a screen or into the hook."""
    for path, status in (("/v1/completions", 200), ("/v1/completions", 500), ("/v1/models", 400)):
        server.plays[path] = (status, f"you sent Bearer {page}.".encode())
        text = generate_token(server.url, KEY).text
        assert "(the key)" in text and "7" not in text


def test_an_answers_text_is_printable(server):
    """An error text with line ends or escape sequences stays on its line and changes no terminal."""
    server.plays["/v1/completions"] = (500, b"a\n\0\x1b[31mb\xff")
    assert generate_token(server.url, None).text == "a[31mb\ufffd"


def test_a_slow_server_is_given_up_in_time():
    """The time limit is for the whole answer. Single bytes do not prolong it."""
    with socket.create_server(("127.0.0.1", 0)) as there:

        def drip() -> None:
            client, _ = there.accept()
            with client, suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1000:
                    client.send(bytes([byte]))
                    time.sleep(0.002 if byte == ord("x") else 0)

        threading.Thread(target=drip, daemon=True).start()
        found = ask_api(f"http://127.0.0.1:{there.getsockname()[1]}/health", seconds=0.05)
    assert (found.status, found.silent, found.connected) == (None, True, True) and found.seconds < 1


def test_an_answer_that_breaks_off_is_none(server):
    """Half of an answer is no answer, even with status 200."""
    server.plays["/v1/completions"] = (200, b"{", ("Content-Length", "999"))
    found = generate_token(server.url, None)
    assert (found.status, found.silent) == (None, False) and "IncompleteRead" in found.text


@pytest.mark.parametrize("size", [b"-5", b"-1", b"FFFFFFFFF", b"4000001", b"no number"])
def test_a_chunk_of_a_wrong_size_is_a_failure_like_any_other(size):
    """An answer with a wrong or endless chunk brings no traceback, and is read no further than the cap."""
    sent = 0
    with socket.create_server(("127.0.0.1", 0)) as there:

        def answer() -> None:
            nonlocal sent
            client, _ = there.accept()
            with client, suppress(OSError):
                client.recv(1000)
                client.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\n")
                while sent < 2**27:
                    sent += client.send(b"x" * 2**18)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        found = ask_api(f"http://127.0.0.1:{there.getsockname()[1]}/health", seconds=5)
        thread.join(5)
    assert sent < 2**26
    assert (found.status, found.silent, found.connected) == (None, False, True) and found.error


def test_both_requests_share_the_time_of_a_token(monkeypatch):
    """The seconds that the first request took are not granted to the second, and the answer counts both."""
    clock, waits = SimpleNamespace(now=10.0), []

    def ask(url, key, body=None, seconds=0):
        took = 2.0 if body is None else seconds
        clock.now += took
        waits.append(seconds)
        return Answer(200, '{"data": [{"id": "m"}]}', took) if body is None else Answer(None, "", took, silent=True)

    monkeypatch.setattr(api, "ask_api", ask)
    monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: clock.now))
    found = generate_token("http://head", None, 3)
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
    """The metrics that are read from a page with this text."""
    server.plays["/metrics"] = (200, text.encode())
    return read_metrics(server.url)


@pytest.mark.parametrize("name", ["kv_cache_usage_perc", "gpu_cache_usage_perc"], ids=["new", "old"])
def test_metrics_of_a_new_vllm_and_an_old_one(name, server):
    """The requests of all engines are added up, and the KV cache's gauge is known by its new and its old name."""
    found = told(server, METRICS + f"vllm:{name}{LABELS} 0.25\n")
    assert (found.running, found.waiting) == (5, 1)
    assert found.moving == {("prompt_tokens_total", "1.2e+06"), ("generation_tokens_total", "7.0"), (name, "0.25")}
    assert server.asked == [("/metrics", None, None)]


def test_only_counters_and_the_cache_move(server):
    """A new value of a token counter or of the KV cache is a move. A new value of another sample is no move."""
    before = told(server, METRICS).moving
    assert told(server, METRICS.replace("7.0", "8.0")).moving != before
    assert told(server, METRICS.replace("2.0", "9.0").replace("55.0", "56.0")).moving == before


def test_metrics_that_are_no_numbers_are_left_out(server):
    """A sample without a number is ignored."""
    for value in ("NaN", "+Inf", "many"):
        assert told(server, METRICS.replace("2.0", value)).running == 3


def test_missing_metrics_are_none(server):
    """A missing page does not count as metrics."""
    server.plays["/metrics"] = (404, b"vllm:num_requests_running 1.0\n")
    assert read_metrics(server.url) is None
