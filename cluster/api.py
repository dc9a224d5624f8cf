"""The API as a client sees it: one generated token, which alone proves that the server works, and the metrics."""

import html
import http.client
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, replace
from urllib.parse import quote, urlsplit

# Counters and gauges that move while the server works. The KV cache's gauge has an older name (vLLM before 0.11).
_MOVING = ("prompt_tokens_total", "generation_tokens_total", "kv_cache_usage_perc", "gpu_cache_usage_perc")
_SAMPLE = re.compile(r"^vllm:(\w+)(?:{.*})? (\d+(?:\.\d+)?(?:e[+-]?\d+)?)$", re.MULTILINE)
_MOST = 2**24  # bytes that are read of an answer


@dataclass(frozen=True)
class Answer:
    """The API's answer to one request. Where no whole answer came, `status` is None and `text` says why.

    `seconds`: how long it took. `silent`: no whole answer came in time. `error`: what ended the request.
    `connected`: whether the server accepted the connection.
    """

    status: int | None
    text: str
    seconds: float
    silent: bool = False
    error: Exception | None = None
    connected: bool = True

    @property
    def well(self) -> bool:
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether no program listens at the address."""
        return isinstance(self.error, ConnectionRefusedError)

    @property
    def key_wrong(self) -> bool:
        return self.status in (401, 403)


@dataclass(frozen=True)
class Metrics:
    """How many requests run and wait, and the samples that move while the server works, as (name, value)."""

    running: float
    waiting: float
    moving: frozenset[tuple[str, str]]


def ask_api(url: str, key: str | None = None, body: dict | None = None, seconds: float = 3) -> Answer:
    """GET url, or POST body to it as JSON; the whole answer may take so many seconds.

    No proxy is used: the cluster is in our own network. No redirect is followed: the key would go along.
    """
    start, parts = time.monotonic(), urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    # The last of these counts. The first two stand for a name server, and for a server, that stays silent.
    nameless = "no name server answers"
    answers = [Answer(None, nameless, seconds, silent=True, error=socket.gaierror(nameless), connected=False)]

    def ask() -> None:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            socket.getaddrinfo(parts.hostname, parts.port)
            answers.append(Answer(None, "timed out", seconds, silent=True, connected=False))
            connection.connect()
            answers.append(replace(answers[-1], connected=True))
            connection.request("POST" if body else "GET", parts.path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = bytearray(_MOST)  # of a chunk of size -1, read() would read everything
            size = answer.readinto(text)
            if answer.length or size == _MOST:  # the answer broke off, or is too long
                raise http.client.IncompleteRead(bytes(text[:size]), answer.length)
            answers.append(Answer(answer.status, text[:size].decode(errors="replace"), time.monotonic() - start))
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: such as a chunk of size -5
            why, silent = str(error) or type(error).__name__, isinstance(error, TimeoutError)
            answers.append(Answer(None, why, time.monotonic() - start, silent, error, answers[-1].connected))
        finally:
            connection.close()

    # The timeout of a socket begins anew with every byte. The wait for this thread does not.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[-1]


def generate_token(url: str, key: str | None, seconds: float = 3) -> Answer:
    """Generate one token with the model that the server names, in at most so many seconds.

    The answer's text is printable, and the key is not in it: a server may repeat what it was sent.
    """
    start = time.monotonic()
    answer = ask_api(f"{url}/v1/models", key, seconds=seconds)
    if answer.well:
        try:
            body = {"model": json.loads(answer.text)["data"][0]["id"], "prompt": "1", "max_tokens": 1}
            answer = ask_api(f"{url}/v1/completions", key, body, max(0.1, start + seconds - time.monotonic()))
            _ = answer.well and json.loads(answer.text)["choices"][0]["text"]  # an answer without a choice has no token
        except (ValueError, LookupError, TypeError, RecursionError):
            answer = replace(answer, status=502, text=f"No model or no token in the answer: {answer.text}")
    return replace(answer, text=_harmless(answer.text, key), seconds=time.monotonic() - start)


def read_metrics(url: str, seconds: float = 2) -> Metrics | None:
    """Read the server's metrics, which need no key; None if the server did not tell them."""
    answer = ask_api(f"{url}/metrics", seconds=seconds)
    if not answer.well:
        return None
    samples = _SAMPLE.findall(answer.text)
    running = sum(float(value) for name, value in samples if name == "num_requests_running")
    waiting = sum(float(value) for name, value in samples if name == "num_requests_waiting")
    return Metrics(running, waiting, frozenset(sample for sample in samples if sample[0] in _MOVING))


def _harmless(text: str, key: str | None) -> str:
    """Return the printable characters of text; an error page may wrap or escape the key."""
    text = "".join(filter(str.isprintable, text))
    for form in {key, json.dumps(key)[1:-1], html.escape(key), quote(key, safe=""), quote(key)} if key else ():
        text = re.sub(re.escape(form), "(the key)", text, flags=re.IGNORECASE)
    return text
