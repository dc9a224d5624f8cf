"""The old name of `cluster.finding.vllm_version`, until that module is written."""

import re


def version(text: str) -> tuple[int, ...]:
    """The release's three numbers: 0.21.0+2325b6f0.nvinternal is (0, 21, 0); raises ValueError for anything else."""
    found = re.match(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text, re.ASCII)
    if not found:
        raise ValueError(f"{text[:60]!r} is no version of vLLM.")
    return tuple(int(number or 0) for number in found.groups())
