"""The server's API as a client sees it: one generated token, which alone proves that it works, and its metrics."""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace

# Counters and gauges that move while work is done; the KV cache's has an older name (vLLM before 0.11).
_MOVING = ("prompt_tokens_total", "generation_tokens_total", "kv_cache_usage_perc", "gpu_cache_usage_perc")
_SAMPLE = re.compile(r"^vllm:(\w+)(?:{.*})? (\S+)$", re.MULTILINE)


# No proxy: the cluster is in our own network.
class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody to another host: the key would go along."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status, or None and why there is none; `seconds` is how long it took.

    `silent` tells an answer that did not come in time from a connection that was refused or lost; `error` is what was
    raised then, a URLError if no connection came about.
    """

    status: int | None
    text: str
    seconds: float
    silent: bool = False
    error: Exception | None = field(default=None, compare=False)

    @property
    def well(self) -> bool:
        """Whether it was answered as it was asked."""
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether nobody listens there."""
        return isinstance(getattr(self.error, "reason", self.error), ConnectionRefusedError)

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
    """GET url, or POST body to it as JSON, with the API's key; waits at most so many seconds for each part of it."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    start = time.monotonic()
    try:
        with _OPENER.open(request, timeout=seconds) as answer:
            return Answer(answer.status, answer.read().decode(errors="replace"), time.monotonic() - start)
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, _said(error), time.monotonic() - start)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        text, silent = str(cause) or type(cause).__name__, isinstance(cause, TimeoutError)
        return Answer(None, text, time.monotonic() - start, silent, error)


def generate(url: str, key: str | None, seconds: float = 3) -> Answer:
    """Generate one token with the model that the server names, in at most so many seconds; what came back at last."""
    start = time.monotonic()
    named = ask(f"{url}/v1/models", key, seconds=seconds)
    if not named.well:
        return named
    try:
        model = json.loads(named.text)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        return Answer(502, f"/v1/models named none: {named.text[:100]}", named.seconds)
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


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
