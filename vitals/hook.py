"""The operator's hook: what runs when the server is down or hung, how often it may, and the file that remembers it."""

import fcntl
import json
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from invoke import Exit

from command import run
from command.command import Command
from settings.names import SECRETS
from settings.resolve import Settings
from vitals.outage import Due, iso

SECONDS = 300
DAY = 24 * 3600


@dataclass(frozen=True)
class Hook:
    """Its words (none: no hook), the file that remembers when it ran, seconds between two runs, and runs in a day."""

    words: tuple[str, ...]
    file: Path
    cooldown: float
    most: int

    def check(self) -> None:
        """Raise Exit unless what it does can be remembered."""
        if not self.words:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._keep(self._runs())
        except (OSError, ValueError) as error:
            look = "rm" if isinstance(error, ValueError) else "ls -ld"
            raise Exit(f"{_unusable(self.file, error)}. Type: {look} {shlex.quote(str(self.file))}") from None

    def claim(self, now: float) -> tuple[str, str] | None:
        """Write down that it runs at `now` (epoch seconds); what forbids it, if anything: a rule's name, a sentence."""
        if not self.words:
            return "none", "no hook: WATCH_HOOK is empty, so nothing is run"
        try:
            with self._alone():
                runs = self._runs()
                if forbidden := self._forbidden(runs, now):
                    return forbidden
                self._keep([*(at for at in runs if now - at < max(DAY, self.cooldown)), now])
        except (OSError, ValueError) as error:
            return "file", f"held back: {_unusable(self.file, error)}"
        return None

    def call(self, due: Due, url: str) -> str:
        """Run it, and say how that ended; whatever it does is no error here."""
        start = time.monotonic()
        try:
            status = run.hook(self._command(due, url), SECONDS, SECRETS)
        except Exit as error:
            return f"hook failed: {error.message}"
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"hook {'failed' if status else 'done'}: it ended {how} after {time.monotonic() - start:.0f} s"

    def _command(self, due: Due, url: str) -> Command:
        told = {
            "WATCH_EVENT": due.event,
            "WATCH_REASON": due.reason,
            "WATCH_URL": url,
            "WATCH_FAILURES": str(due.failures),
            "WATCH_SINCE": iso(due.since),
        }
        return Command((self.words,), env=told)

    def _forbidden(self, runs: list[float], now: float) -> tuple[str, str] | None:
        if runs and now - max(runs) < self.cooldown:
            return "cool-down", f"held back: the hook ran at {iso(max(runs))}, and WATCH_COOLDOWN_S is {self.cooldown}"
        if sum(now - at < DAY for at in runs) >= self.most:
            return "ceiling", f"held back: WATCH_MAX is {self.most}, and the hook ran as often within 24 hours"
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two watches may be at the file at once."""
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _runs(self) -> list[float]:
        """When it ran, in epoch seconds; ValueError if the file holds something else."""
        if not self.file.exists():
            return []
        runs = json.loads(self.file.read_text())
        if not isinstance(runs, list) or not all(type(at) in (int, float) and 0 <= at < 2**40 for at in runs):
            raise ValueError("it should be a list of epoch seconds")
        return runs

    def _keep(self, runs: list[float]) -> None:
        # Down to the disk, name and all: the hook may cut this machine's own power.
        new = self.file.with_suffix(".new")
        with new.open("w") as file:
            json.dump(runs, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.file)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def configured(settings: Settings) -> Hook:
    """The hook of these settings."""
    file = Path(settings["CACHE_DIR"]) / "node-ray/watch.json"
    words = tuple(shlex.split(settings["WATCH_HOOK"]))
    return Hook(words, file, int(settings["WATCH_COOLDOWN_S"]), int(settings["WATCH_MAX"]))


def _unusable(file: Path, error: Exception) -> str:
    return f"{file} cannot remember when the hook ran, so it is not run: {getattr(error, 'strerror', None) or error}"
