"""What the recorder beside the server saw last, on every node, and for how long each thing has not moved."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster import node
from settings.resolve import Settings

# It writes each second; a node that does not answer makes it three more.
FRESH_S = 10


@dataclass(frozen=True)
class Recorded:
    """One look at all nodes: `age` in seconds; each node's facts by address, None where a node did not answer.

    A node's facts are `available` (bytes), `ranks` (how many), `cpu` (their seconds), `gpu` (percent, or None) and
    `down` (links that are not up). `still`: for how many seconds each thing was seen not to move; `silent`: for how
    many each node that did not answer has not.
    """

    age: float
    nodes: Mapping[str, Mapping | None]
    still: Mapping[str, float]
    silent: Mapping[str, float] = field(default_factory=dict)

    @property
    def fresh(self) -> bool:
        """Whether it tells of now."""
        return -1 <= self.age <= FRESH_S

    @property
    def ranks(self) -> int:
        """How many ranks live, on all nodes together."""
        return sum(facts["ranks"] for facts in self.nodes.values() if facts)

    def quiet(self, *things: str) -> float:
        """For how many seconds none of these things has moved, on any node; 0 if none was looked at."""
        return min((seconds for name, seconds in self.still.items() if name.partition(" ")[0] in things), default=0)


def read(settings: Settings) -> Recorded | None:
    """What the recorder of the last server wrote; None if there is nothing, or nothing that can be read."""
    try:
        told = json.loads((node.logs(settings) / "vitals.json").read_text())
        return Recorded(time.time() - told["at"], told["nodes"], told["quiet"], told["silent"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def lows(settings: Settings) -> dict[str, int]:
    """What each node had left at its lowest while the last server ran, in bytes by address."""
    try:
        return json.loads((node.logs(settings) / "memory-low.json").read_text())
    except (OSError, ValueError):
        return {}
