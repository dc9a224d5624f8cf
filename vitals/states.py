"""The states that a cluster may be in, each with an exit status of its own, and all that they are told apart by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vitals.api import Answer, Metrics
from vitals.recorded import Recorded
from vitals.served import Served


class State(Enum):
    """A state's name and its exit status: both are stable, programs may rely on them."""

    HEALTHY = ("healthy", 0)
    UNKNOWN = ("unknown", 1)
    BUSY = ("busy", 10)
    LOADING = ("loading", 11)
    NOT_RUNNING = ("not running", 12)
    HUNG = ("hung", 13)
    RANK_LOST = ("rank lost", 14)
    KEY_WRONG = ("API key wrong", 15)
    MEMORY_LOW = ("memory low", 16)
    LINKS_DEGRADED = ("links degraded", 17)

    @property
    def code(self) -> int:
        """The exit status."""
        return self.value[1]

    def __str__(self) -> str:
        return self.value[0]


@dataclass(frozen=True)
class Verdict:
    """A state, why it is that, and the next command to type."""

    state: State
    why: str
    next: str = ""


@dataclass(frozen=True)
class Limits:
    """HANG_S and STALL_S in seconds, MEM_WARN_GIB in GiB."""

    hang: float
    stall: float
    warn: float


@dataclass(frozen=True)
class Seen:
    """All that was asked of a head: `server` is None where none was launched, `nodes` are the addresses that Ray has.

    They are None where Ray could not be asked. `answer` is the API's to one token, `metrics` what it said of its
    requests, `moving` tells whether its counters moved meanwhile, `waited` for how many seconds health has had no
    token; `broken` is what else could not be asked.
    """

    server: Served | None = None
    nodes: Sequence[str] | None = None
    recorded: Recorded | None = None
    answer: Answer | None = None
    moving: bool = False
    waited: float = 0
    metrics: Metrics | None = None
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def fresh(self) -> Recorded | None:
        """What the recorder saw just now, or None."""
        return self.recorded if self.recorded and self.recorded.fresh else None
