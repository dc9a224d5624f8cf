"""Placeholder: names as the merged module will have them."""

import json
from pathlib import Path
from typing import Any

from vitals.recorded import FRESH_S, Recorded
from vitals.recorded import lows as read_lows
from vitals.recorded import read as read_recorded

# Recorded.quiet takes these names: what moves while requests are answered, and what moves while a model is loaded.
WORK = ("counters", "cpu", "gpu")
LOAD = ("log", "memory", "server_cpu", "cpu", "gpu")


def keep_json(file: Path, value: object) -> None:
    """Write value to file as JSON, whole or not at all, so that a reader never finds half of it. Raises OSError."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1))
    new.replace(file)


def kept_json(file: Path) -> Any:  # noqa: ANN401 - a file may hold any JSON
    """Return what keep_json wrote; None if the file is missing, cannot be read or is not JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None
