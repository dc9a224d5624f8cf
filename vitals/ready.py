"""How long each model took until it was ready, on these nodes: what a later load is expected to take."""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cluster import node
from command.command import say
from settings.resolve import Settings


def expected(settings: Settings, addresses: Iterable[str]) -> float | None:
    """Seconds that the last load of this model took on these nodes; None before the first."""
    try:
        return float(_kept(settings)[_key(settings, addresses)]["seconds"])
    except (KeyError, TypeError, ValueError):
        return None


def record(settings: Settings, addresses: Iterable[str], seconds: float) -> None:
    """Keep how long it took; a folder that cannot be written is no reason to fail."""
    file = _file(settings)
    at = datetime.now(UTC).isoformat(timespec="seconds")
    kept = _kept(settings) | {_key(settings, addresses): {"seconds": round(seconds, 1), "at": at}}
    try:
        new = file.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=1))
        os.replace(new, file)
    except OSError as error:
        say(f"Note: {file} cannot be written ({error.strerror}): the next load has no expected time.")


def _kept(settings: Settings) -> dict:
    try:
        kept = json.loads(_file(settings).read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _file(settings: Settings) -> Path:
    return node.logs(settings) / "ready.json"


def _key(settings: Settings, addresses: Iterable[str]) -> str:
    return f"{settings.model.name} on {', '.join(sorted(addresses))}"
