"""Print the options of `vllm serve` as one line of JSON: {"vllm": VERSION, "options": {"--flag": [CHOICE, ...]}}.

Null in place of the choices stands for an option that takes any value. The parser is vLLM's own, built as `vllm serve`
builds it, and needs no GPU. The two import paths hold from vLLM 0.11.0 to 0.33.0.
"""

import contextlib
import json
import os
import sys
from importlib.metadata import version

QUIET = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def serve_parser():
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # vLLM 0.11
        from vllm.utils import FlexibleArgumentParser
    from vllm.entrypoints.cli.serve import ServeSubcommand

    return ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())


if __name__ == "__main__":
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    with contextlib.redirect_stdout(sys.stderr):  # vLLM prints while it is imported
        parser = serve_parser()
    options = {
        name: sorted(map(str, action.choices)) if action.choices is not None else None
        for action in parser._actions
        for name in action.option_strings
    }
    print(json.dumps({"vllm": version("vllm"), "options": dict(sorted(options.items()))}))
