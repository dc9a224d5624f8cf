"""For how long health has waited in vain: the server's own counters do not tell of a request that hangs its engine."""

import json
import time
from pathlib import Path

from cluster import node
from settings.resolve import Settings


def note(settings: Settings, silent: bool) -> float:
    """Keep whether a token came; for how many seconds now none has, as far as health was asked often enough to know.

    Two looks more than half of HANG_S apart say nothing of the time between them: then it begins anew.
    """
    file, now = node.logs(settings) / "unanswered.json", time.time()
    since, last = _kept(file)
    if not silent or not 0 <= now - last <= int(settings["HANG_S"]) / 2:
        since = now
    try:
        new = file.with_suffix(".new")
        new.write_text(json.dumps([since, now if silent else 0]))
        new.replace(file)
    except OSError:
        return 0  # what cannot be remembered is not held against the server
    return now - since


def _kept(file: Path) -> tuple[float, float]:
    """When the silence began, and when it was last seen, in seconds since 1970."""
    try:
        since, last = map(float, json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, OverflowError):
        return 0, 0
    return min(since, last), last
