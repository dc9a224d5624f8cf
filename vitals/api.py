"""The server's API as a client sees it: one generated token, which alone proves that it works, and its metrics."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

# Counters and gauges that move while work is done; the KV cache's has an older name (vLLM before 0.11).
_MOVING = ("prompt_tokens_total", "generation_tokens_total", "kv_cache_usage_perc", "gpu_cache_usage_perc")
_SAMPLE = re.compile(r"^vllm:(\w+)(?:{.*})? (\S+)$", re.MULTILINE)
# What is read of an answer, in bytes, and of one that says why not.
_MOST, _WHY = 2**24, 2000


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status, or None and why there is none; `seconds` is how long it took.

    `silent` tells an answer that did not come in time from a connection that was refused or lost; `error` is what was
    raised then, and `connected` whether a connection had come about.
    """

    status: int | None
    text: str
    seconds: float
    silent: bool = False
    error: Exception | None = field(default=None, compare=False)
    connected: bool = True

    @property
    def well(self) -> bool:
        """Whether it was answered as it was asked."""
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether nobody listens there."""
        return isinstance(self.error, ConnectionRefusedError)

    @property
    def key_wrong(self) -> bool:
        """Whether the key was not the server's."""
        return self.status in (401, 403)


@dataclass(frozen=True)
class Metrics:
    """How many requests run and wait, and the samples that move while work is done, as (name, value)."""

    running: int
    waiting: int
    moving: frozenset[tuple[str, str]]


def ask(url: str, key: str | None = None, body: dict | None = None, seconds: float = 3) -> Answer:
    """GET url, or POST body to it as JSON, with the API's key; what came back in at most so many seconds.

    By no proxy, for the cluster is in our own network, and after no redirect, for the key would go along.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    start = time.monotonic()
    connected = False
    with closing(kind(parts.hostname, parts.port, timeout=seconds)) as connection:
        try:
            connection.connect()
            connected = True
            with _cut_after(start + seconds - time.monotonic(), connection):
                connection.request("POST" if body else "GET", parts.path, json.dumps(body) if body else None, headers)
                answer = connection.getresponse()
                return Answer(answer.status, _read(answer), time.monotonic() - start)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            text, silent = str(error) or type(error).__name__, isinstance(error, TimeoutError)
            return Answer(None, text, time.monotonic() - start, silent, error, connected)


def generate(url: str, key: str | None, seconds: float = 3) -> Answer:
    """Generate one token with the model that the server names, in at most so many seconds; what came back at last.

    A server may repeat what it was asked: the key is not in the answer's text.
    """
    answer = _generated(url, key, seconds)
    return replace(answer, text=answer.text.replace(key, "(the key)")) if key else answer


def _generated(url: str, key: str | None, seconds: float) -> Answer:
    start = time.monotonic()
    named = ask(f"{url}/v1/models", key, seconds=seconds)
    if not named.well:
        return named
    try:
        model = json.loads(named.text)["data"][0]["id"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Answer(502, f"/v1/models named none: {named.text[:_WHY]}", named.seconds)
    body = {"model": model, "prompt": "1", "max_tokens": 1}
    answer = ask(f"{url}/v1/completions", key, body, max(0.1, start + seconds - time.monotonic()))
    return replace(answer, seconds=time.monotonic() - start)


def metrics(url: str, seconds: float = 2) -> Metrics | None:
    """The server's metrics, which need no key; None if it did not tell them, or not as numbers."""
    answer = ask(f"{url}/metrics", seconds=seconds)
    if not answer.well:
        return None
    samples = _SAMPLE.findall(answer.text)
    try:
        running, waiting = (
            int(sum(float(value) for name, value in samples if name == asked))
            for asked in ("num_requests_running", "num_requests_waiting")
        )
    except (ValueError, OverflowError):
        return None
    return Metrics(running, waiting, frozenset(sample for sample in samples if sample[0] in _MOVING))


def _read(answer: http.client.HTTPResponse) -> str:
    """Its text, of a failure the beginning; raises IncompleteRead where it broke off, or goes on for too long."""
    text = answer.read(_MOST if answer.status == 200 else _WHY)
    if answer.status == 200 and answer.length:
        raise http.client.IncompleteRead(text, answer.length)
    return text.decode(errors="replace")


@contextmanager
def _cut_after(seconds: float, connection: http.client.HTTPConnection) -> Iterator[None]:
    """End the connection after so many seconds with a TimeoutError; its own timeout is for each part of an answer."""
    late, there = threading.Event(), connection.sock  # it lets go of its socket before all has been read

    def cut() -> None:
        late.set()
        with suppress(OSError):  # it has just been closed
            socket.socket.shutdown(there, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError("timed out")
