"""Ask the vLLM of this image which options `vllm serve` has: runs by itself inside the image, and needs no GPU.

It prints one line of JSON: {"vllm": version, "options": {"--flag": [choices] or null}}. The parser is vLLM's own, built
as `vllm serve` builds it; these two import paths hold from vLLM 0.11.0 to 0.33.0.
"""

import argparse
import contextlib
import json
import os
import sys
from importlib import metadata

QUIET = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def serve_parser() -> argparse.ArgumentParser:
    """The parser of `vllm serve`; raises whatever this image's vLLM raises."""
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # vLLM 0.11
        from vllm.utils import FlexibleArgumentParser
    from vllm.entrypoints.cli.serve import ServeSubcommand

    return ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())


def options(parser: argparse.ArgumentParser) -> dict[str, list[str] | None]:
    """Every spelling of every option with its choices as text, or None where any value passes the parser."""
    return {
        name: sorted(map(str, action.choices)) if action.choices is not None else None
        for action in parser._actions
        for name in action.option_strings
    }


if __name__ == "__main__":
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    # What vLLM says while it is imported must not get into the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = options(serve_parser())
    print(json.dumps({"vllm": metadata.version("vllm"), "options": dict(sorted(found.items()))}))
