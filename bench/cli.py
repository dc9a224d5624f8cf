#!/usr/bin/env python3
"""The start-up of `./inv --dry launch --model nemotron` against Invoke with an empty task file, in paired runs.

Usage: bench/cli.py [PAIRS]. Exits 1 when the median of the paired ratios is LIMIT or more.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv/bin"
OURS = (ROOT / "inv", "--dry", "launch", "--model", "nemotron")
EMPTY = "from invoke import task\n\n@task\ndef nothing(c):\n    pass\n"
LIMIT = 1.6
PAIRS = 20


def seconds(words: Sequence[str | Path]) -> float:
    """How long a command takes whose output nobody reads; one that fails is no measurement."""
    start = time.perf_counter()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(empty: Sequence[str | Path], pairs: int) -> list[tuple[float, float]]:
    """So many pairs of (ours, empty), taking turns at being first, after one of each that warms the caches."""
    seconds(OURS), seconds(empty)
    taken = []
    for number in range(pairs):
        if number % 2:
            taken.append((seconds(OURS), seconds(empty)))
        else:
            taken.append((seconds(empty), seconds(OURS))[::-1])
    return taken


def main(pairs: int = PAIRS) -> int:
    """Print both medians and the ratio; the exit status says whether it stays under LIMIT."""
    with TemporaryDirectory() as folder:
        Path(folder, "tasks.py").write_text(EMPTY)
        taken = measure((VENV / "python", VENV / "inv", "--search-root", folder, "nothing"), pairs)
    ours, empty = (median(times) for times in zip(*taken, strict=True))
    ratio = median(ours / empty for ours, empty in taken)
    print(f"inv --dry launch --model nemotron  {ours * 1000:4.0f} ms, the median of {pairs}")
    print(f"an empty task file                 {empty * 1000:4.0f} ms")
    print(f"ratio                              {ratio:4.2f}, the median of {pairs} pairs; less than {LIMIT} is wanted")
    return int(ratio >= LIMIT)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
