"""A look at the server from a third machine, again and again; after too many failures in a row, the operator's hook."""

import errno
import ipaddress
import re
import shlex
import signal
import socket
import ssl
import time

from invoke import Exit

from command.command import say
from settings.resolve import Settings
from vitals import api, hook
from vitals.api import Answer
from vitals.hook import Hook
from vitals.outage import Look, Outage, iso

PROBE_S = 10
# What fails on the watch's own machine, whatever the server does.
_OWN = {errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
        errno.ENOBUFS, errno.ENOMEM}  # fmt: skip
_URL = re.compile(r"(https?://(?:(?:[\w-]{1,63}\.)*[\w-]{1,63}|\[([0-9a-f:.]+)\])(?::(\d{1,5}))?)/?", re.ASCII | re.I)


def watch(settings: Settings, url: str) -> None:
    """Look at the server at url every WATCH_INTERVAL_S seconds until Ctrl-C or SIGTERM, and say what changes.

    Raises Exit for a url or a key that cannot be used, and if there is a hook whose runs cannot be remembered.
    """
    url, key, acts = address(url), _sendable(settings.get("VLLM_API_KEY")), hook.configured(settings)
    acts.check()
    outage = Outage(int(settings["WATCH_FAILURES"]), int(settings["HANG_S"]))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _tell(_started(settings, url, acts))
        while True:
            begun = time.monotonic()
            turn(outage, acts, url, look(url, key))
            # At least a second: no interval makes this a flood.
            time.sleep(max(1, begun + int(settings["WATCH_INTERVAL_S"]) - time.monotonic()))
    except KeyboardInterrupt:
        _tell("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def address(url: str | None) -> str:
    """The url without a slash at its end; raises Exit unless it is http(s)://HOST[:PORT]."""
    match = _URL.fullmatch(url or "")
    if not match or not 1 <= int(match[3] or 1) <= 65535 or not _numbers(match[2]):
        wrong = "--url is missing" if url is None else f"--url {url!r} is no server's address"
        raise Exit(f"{wrong}; it takes http://HOST:PORT or https://HOST:PORT, no more.")
    return match[1]


def look(url: str, key: str | None, seconds: float = PROBE_S) -> Look:
    """Ask the server for one token, in at most so many seconds, and for its metrics if it is silent."""
    answer = api.generate(url, key, seconds)
    if answer.well:
        return Look("well")
    if answer.key_wrong:
        return Look("key", f"it answers {answer.status}")
    if answer.status is None:
        return _unanswered(url, answer, seconds)
    if answer.status < 500:
        return Look("odd", f"it answers {answer.status}")
    return Look("failed", _clean(f"it answers {answer.status}: {answer.text}"))


def turn(outage: Outage, acts: Hook, url: str, seen: Look) -> None:
    """Say what a look at the server changes, and run the hook if that is due and allowed."""
    lines, due = outage.see(seen, time.time())
    _tell(*lines)
    if not due:
        return
    if forbidden := acts.claim(time.time()):
        return _tell(*outage.once(*forbidden))
    _tell(f"hook: {shlex.quote(acts.words[0])} ({due.event} since {iso(due.since)}: {due.reason})")
    _tell(acts.call(due, url))


def _unanswered(url: str, answer: Answer, seconds: float) -> Look:
    reason = _clean(answer.text)
    # A certificate is refused by us; the server is there. And TLS has numbers of its own for what went wrong.
    if isinstance(answer.error, ssl.SSLCertVerificationError):
        return Look("odd", reason)
    if isinstance(answer.error, socket.gaierror) or _is_own(answer.error):
        return Look("away", reason)
    if answer.silent and answer.connected:
        return Look("silent", moving=_moving(url, seconds))
    return Look("failed", reason if answer.connected else f"no connection: {reason}")


def _is_own(error: Exception) -> bool:
    return not isinstance(error, ssl.SSLError) and getattr(error, "errno", None) in _OWN


def _moving(url: str, seconds: float) -> frozenset[tuple[str, str]] | None:
    told = api.metrics(url, seconds)
    return told and told.moving


def _clean(text: str) -> str:
    """What a stranger's text may bring into a line and an environment: its printable start."""
    return "".join(filter(str.isprintable, text))[:160]


def _numbers(host: str | None) -> bool:
    try:
        return host is None or bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


def _sendable(key: str | None) -> str | None:
    if key and not key.isascii():
        raise Exit("VLLM_API_KEY has letters that an HTTP header cannot carry; it takes ASCII.")
    return key


def _started(settings: Settings, url: str, acts: Hook) -> str:
    then = (
        f"{shlex.quote(acts.words[0])}, {acts.cooldown} s apart, {acts.most} in 24 hours" if acts.words else "no hook"
    )
    every, failures, hang = (settings[name] for name in ("WATCH_INTERVAL_S", "WATCH_FAILURES", "HANG_S"))
    return f"started: {url} every {every} s; after {failures} failures: {then}; hung after {hang} s"


def _tell(*lines: str) -> None:
    say(*(f"{iso(time.time())} {line}" for line in lines))
