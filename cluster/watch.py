"""A watch on the server from a third machine: in an outage that lasts, it runs the operator's hook.

`probe` looks at the server once. `Outage` counts the looks, and tells what to print and when the hook is due. `Hook`
runs the operator's command and remembers its runs.
"""

from __future__ import annotations

import errno
import re
import shlex
import shutil
import signal
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from invoke import Exit

from cluster.api import generate_token, read_metrics
from cluster.command import Command, handling, run, say
from cluster.recorder import keep_json, kept_json
from cluster.settings import Settings

PROBE_S = 10
HOOK_S = 300
DAY_S = 24 * 3600
# The kinds of look that count neither as a success nor as a failure, each with its words.
UNCOUNTED = {"busy": "busy", "key": "key wrong", "odd": "odd answer", "away": "no network here"}


def watch_api(settings: Settings, url: str | None) -> None:
    """Probe the server at url every WATCH_INTERVAL_S seconds and print what changes, until Ctrl-C or SIGTERM.

    Raises Exit for a url, a key or a hook that cannot be used.
    """
    url, key = checked_url(url), settings.get("VLLM_API_KEY")
    if key and not key.isascii():
        raise Exit("VLLM_API_KEY has letters that an HTTP header cannot carry; it takes ASCII.")
    every, failures, hang = (int(settings[name]) for name in ("WATCH_INTERVAL_S", "WATCH_FAILURES", "HANG_S"))
    outage, hook = Outage(failures, hang), configured_hook(settings)
    hook.check()
    often = f"the hook, at most every {hook.cooldown} s and {hook.most} times in 24 hours"
    then = often if hook.words else "no hook"
    with suppress(KeyboardInterrupt), handling((signal.SIGTERM,), signal.default_int_handler):
        _tell(f"started: {url} every {every} s; after {failures} failures: {then}; hung after {hang} s")
        while True:
            begun = time.monotonic()
            act(outage, hook, url, probe(url, key))
            # At least a second, so that no setting floods the server.
            time.sleep(max(1, begun + every - time.monotonic()))
    _tell("stopped")


def act(outage: Outage, hook: Hook, url: str, look: Look) -> None:
    """Print the news of a look, and run the hook if that is due and allowed."""
    news, due = outage.see(look, time.time())
    _tell(*news)
    if not due:
        return
    if forbidden := hook.claim(time.time()):
        return _tell(*outage.once(forbidden))
    _tell(f"hook runs: {due['WATCH_EVENT']} since {due['WATCH_SINCE']}, {due['WATCH_REASON']}")
    _tell(hook.call(due | {"WATCH_URL": url}))


def checked_url(url: str | None) -> str:
    """Return the url without a slash at its end. Raises Exit unless it is http(s)://HOST[:PORT]."""
    url = (url or "").removesuffix("/")
    with suppress(ValueError):  # from urlsplit, for a port or an IPv6 address that cannot be one
        if re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?", url) and urlsplit(url).port != 0:
            return url
    # The url is not repeated: it may hold a password.
    raise Exit("--url is missing, or no server's address: it takes http://HOST:PORT or https://HOST:PORT, no more.")


def _tell(*lines: str) -> None:
    say(*(f"{_iso(time.time())} {line}" for line in lines))


def _iso(epoch: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))


# --- One look at the server ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One look at the server. `kind` is well, failed, silent (no answer in time), hung, or one of UNCOUNTED.

    `moving`: the metrics that move while the server works; None if they are unknown.
    """

    kind: str
    reason: str = ""
    moving: frozenset[tuple[str, str]] | None = None


def probe(url: str, key: str | None, seconds: float = PROBE_S) -> Look:
    """Ask the server for one token. If the server is silent, ask for its metrics."""
    answer = generate_token(url, key, seconds)
    text, error = answer.text[:160], answer.error
    if answer.well:
        return Look("well")
    if answer.key_wrong:
        return Look("key", f"the server answers {answer.status}")
    if answer.status is not None:
        return Look("failed" if answer.status >= 500 else "odd", f"the server answers {answer.status}: {text}")
    # Trouble on this machine's side is no outage of the server.
    if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.ENETUNREACH:
        return Look("away", text)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Look("odd", text)
    if answer.silent and answer.connected:
        metrics = read_metrics(url, seconds)
        return Look("silent", moving=metrics.moving if metrics else None)
    return Look("failed", text if answer.connected else f"no connection: {text}")


# --- Outages ---------------------------------------------------------------------------------------------------------


@dataclass
class Outage:
    """A count of looks. `failures` in a row make an outage. Silence is a hang if nothing moves for `hang` seconds."""

    failures: int
    hang: float
    armed: bool = False  # whether the server was well once, so that a watch started during a load does not act
    row: int = 0  # failures in a row
    since: float = 0  # epoch seconds of the first of them
    trouble_since: float | None = None  # epoch seconds of the first look that was not well
    last: Look = Look("")
    moving: frozenset[tuple[str, str]] | None = None
    # Monotonic seconds of the last move: the time of day would jump where the clock is set or the machine sleeps.
    moved: float = field(default_factory=time.monotonic)
    said: set[str] = field(default_factory=set)  # why the hook was held back in this outage

    def see(self, look: Look, now: float) -> tuple[list[str], dict[str, str] | None]:
        """Take in a look at `now` (epoch seconds). Return the news, and the hook's variables if the hook is due."""
        before, self.last = self.last, self._busy_or_hung(look)
        kind, reason = self.last.kind, self.last.reason
        if kind == "well":
            return self._well(now), None
        self.trouble_since = now if self.trouble_since is None else self.trouble_since
        if kind in UNCOUNTED:
            self.row = 0
            return ([] if self.last == before else [f"{UNCOUNTED[kind]}: {reason}; not counted"]), None
        self.row += 1
        self.since = now if self.row == 1 else self.since
        news = [f"failed {self.row} of {self.failures}: {reason}"] if self.row <= self.failures else []
        if self.row < self.failures:
            return news, None
        if not self.armed:
            return news + self.once("held back: the server was not well since this watch started"), None
        event, since = "hung" if kind == "hung" else "down", _iso(self.since)
        due = {"WATCH_EVENT": event, "WATCH_REASON": reason, "WATCH_FAILURES": str(self.row), "WATCH_SINCE": since}
        return news, due

    def once(self, line: str) -> list[str]:
        """Return the line, unless it was returned in this outage already."""
        new = {line} - self.said
        self.said.add(line)
        return [*new]

    def _busy_or_hung(self, look: Look) -> Look:
        """Return the look without its metrics. A silent look becomes busy or hung."""
        now = time.monotonic()
        if look.kind in ("well", "key", "odd") or look.moving not in (None, self.moving):
            self.moved, self.moving = now, look.moving
        if look.kind != "silent":
            return replace(look, moving=None)
        if now - self.moved < self.hang:
            return Look("busy", f"no answer in time, but an answer or a move within the last {self.hang:.0f} s")
        return Look("hung", f"no answer, and nothing has moved for {now - self.moved:.0f} s")

    def _well(self, now: float) -> list[str]:
        news = [] if self.trouble_since is None else [f"well again after {now - self.trouble_since:.0f} s"]
        if not self.armed:
            news = [news[0] if news else "well", "armed: from now on the hook may run in an outage"]
        self.armed, self.row, self.trouble_since, self.said = True, 0, None, set()
        return news


# --- The hook --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hook:
    """The operator's command, and the file that remembers its runs. Without words there is no hook.

    `cooldown`: the least seconds between two runs. `most`: the most runs in 24 hours.
    """

    words: tuple[str, ...]
    file: Path
    cooldown: int
    most: int

    def check(self) -> None:
        """Raise Exit unless the hook can be started and its runs can be remembered."""
        if not self.words:
            return
        if not shutil.which(self.words[0]):  # its words are never printed: they may hold a password
            raise Exit("The first word of WATCH_HOOK is no program. Give its whole path, and type chmod +x on it.")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            keep_json(self.file, self._runs())
        except (OSError, ValueError, TypeError) as error:
            raise Exit(f"{self._unusable(error)} Type: ls -ld {shlex.quote(str(self.file))}") from None

    def claim(self, now: float) -> str | None:
        """Remember a run at `now` (epoch seconds), or return why the hook must not run."""
        if not self.words:
            return "no hook: WATCH_HOOK is empty, so nothing is run"
        try:
            runs = self._runs()
            if runs and now - max(runs) < self.cooldown:
                return f"held back: the hook ran at {_iso(max(runs))}, and WATCH_COOLDOWN_S is {self.cooldown}"
            if sum(now - at < DAY_S for at in runs) >= self.most:
                return f"held back: WATCH_MAX is {self.most}, and the hook ran as often within 24 hours"
            # The run is written down first: the hook may cut this machine's own power.
            keep_json(self.file, [*(at for at in runs if now - at < max(DAY_S, self.cooldown)), now])
        except (OSError, ValueError, TypeError) as error:
            return f"held back: {self._unusable(error)}"
        return None

    def call(self, variables: dict[str, str]) -> str:
        """Run the hook without the secrets, and return how it ended. A hook that fails does not end the watch."""
        start = time.monotonic()
        try:
            run(Command((self.words,), env=variables, alias="hook"), seconds=HOOK_S, whole=True)
        except Exit as error:
            return str(error.message)
        return f"hook done after {time.monotonic() - start:.0f} s"

    def _runs(self) -> list[float]:
        """The runs so far, in epoch seconds. Raises ValueError or TypeError if the file holds anything else."""
        return [float(at) for at in kept_json(self.file, kind=list)] if self.file.exists() else []

    def _unusable(self, error: Exception) -> str:
        why = getattr(error, "strerror", "the file must be a list of epoch seconds")
        return f"{self.file} cannot remember when the hook ran, so the hook does not run: {why}."


def configured_hook(settings: Settings) -> Hook:
    file = Path(settings["CACHE_DIR"]) / "node-ray/watch.json"
    words = tuple(shlex.split(settings["WATCH_HOOK"]))
    return Hook(words, file, int(settings["WATCH_COOLDOWN_S"]), int(settings["WATCH_MAX"]))
