#!/usr/bin/env python3
"""Measure how long `./inv` takes to start, as a multiple of Invoke with an empty task file.

Usage: tests/measure/startup.py [PAIRS]. The exit status is 1 if a median is above its limit. A busy machine spoils a
timed test, so pytest does not collect this file.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
EMPTY = "from invoke import task\n\n@task\ndef nothing(c):\n    pass\n"
LIMITS = {"--dry launch --model nemotron": 1.45, "plan --model nemotron": 1.6}


def seconds(words: list[str]) -> float:
    """Run a command without its output. A command that fails raises: its time would mean nothing."""
    start = time.perf_counter()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def ratio(ours: list[str], empty: list[str], pairs: int) -> float:
    """Return the median of the paired ratios. Each command is first in every other pair."""
    seconds(ours), seconds(empty)  # fills the disk cache
    ratios = []
    for number in range(pairs):
        if number % 2:
            mine, floor = seconds(ours), seconds(empty)
        else:
            floor, mine = seconds(empty), seconds(ours)
        ratios.append(mine / floor)
    return median(ratios)


def main(pairs: int) -> int:
    """Print both ratios beside their limits."""
    within = True
    with TemporaryDirectory() as folder:
        Path(folder, "tasks.py").write_text(EMPTY)
        empty = [f"{ROOT}/.venv/bin/python", f"{ROOT}/.venv/bin/inv", "--search-root", folder, "nothing"]
        for line, limit in LIMITS.items():
            measured = ratio([f"{ROOT}/inv", *line.split()], empty, pairs)
            print(f"inv {line:30} {measured:4.2f} times an empty task file, at most {limit}")
            within = within and measured <= limit
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
