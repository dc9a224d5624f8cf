"""What looks at a server come to: whether it is down or hung, what of that is news, and when somebody should act."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# What is said of each kind of look that is neither well nor a failure: it is never counted.
_UNCOUNTED = {"busy": "busy", "key": "key wrong", "odd": "odd answer", "away": "no network here"}


@dataclass(frozen=True)
class Look:
    """One look at the server: well, failed, silent (no answer in time), key (wrong), odd or away, and why.

    `moving` are its samples that move while work is done, as `api.Metrics` has them; None: not told, or not asked.
    """

    kind: str
    reason: str = ""
    moving: frozenset[tuple[str, str]] | None = None


@dataclass(frozen=True)
class Due:
    """The failures in a row that somebody should act on: down or hung, why, how many, since when (epoch seconds)."""

    event: str
    reason: str
    failures: int
    since: float


@dataclass
class Outage:
    """What the looks so far come to; `failures` in a row are too many, `hang` seconds without a move are a hang.

    `clock` tells seconds that pass, which the time of day does not where it is set or the machine sleeps.
    """

    failures: int
    hang: float
    clock: Callable[[], float] = time.monotonic
    armed: bool = False
    row: int = 0
    since: float = 0
    began: float | None = None
    last: Look = Look("")
    moving: frozenset[tuple[str, str]] | None = None
    said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.moved = self.clock()

    def see(self, look: Look, now: float) -> tuple[list[str], Due | None]:
        """Take in a look at `now` (epoch seconds); what is worth saying, and what is due once failures are too many."""
        before, self.last = self.last, self._settled(look)
        if self.last.kind in ("failed", "hung"):
            return self._failed(self.last, now)
        self.row = 0
        if self.last.kind == "well":
            return self._well(now), None
        self.began = now if self.began is None else self.began
        news = [f"{_UNCOUNTED[self.last.kind]}: {self.last.reason}; not counted"]
        return (news if self.last != before else []), None

    def once(self, rule: str, line: str) -> list[str]:
        """The line, unless this outage had one by this rule."""
        new = rule not in self.said
        self.said.add(rule)
        return [line] if new else []

    def _settled(self, look: Look) -> Look:
        """The look without its samples, where a silent one has become busy or hung."""
        now = self.clock()
        answered = look.kind in ("well", "key", "odd")
        if answered or look.moving not in (None, self.moving):
            self.moved, self.moving = now, look.moving
        if look.kind != "silent":
            return replace(look, moving=None)
        if now - self.moved < self.hang:
            return Look("busy", f"no answer in time, but it was well or something moved within {self.hang:.0f} s")
        return Look("hung", f"no answer, and nothing has moved for {now - self.moved:.0f} s")

    def _well(self, now: float) -> list[str]:
        lines = [] if self.began is None else [f"well again after {now - self.began:.0f} s"]
        if not self.armed:
            lines = [lines[0] if lines else "well", "armed: from now on an outage is acted on"]
        self.armed, self.began, self.said = True, None, set()
        return lines

    def _failed(self, look: Look, now: float) -> tuple[list[str], Due | None]:
        self.row += 1
        self.since = now if self.row == 1 else self.since
        self.began = now if self.began is None else self.began
        lines = [f"failed {self.row} of {self.failures}: {look.reason}"] if self.row <= self.failures else []
        if self.row < self.failures:
            return lines, None
        if not self.armed:
            return lines + self.once("unarmed", "held back: it was not seen well since this watch started"), None
        return lines, Due("hung" if look.kind == "hung" else "down", look.reason, self.row, self.since)


def iso(epoch: float) -> str:
    """A moment as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
