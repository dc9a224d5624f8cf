"""Runs in an image. Reads `vllm serve` lines as JSON from standard input, and prints those that the parser refuses."""

import contextlib
import io
import json
import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def complaint(line):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command = ServeSubcommand()
            parser = FlexibleArgumentParser(prog="vllm")
            command.subparser_init(parser.add_subparsers(dest="subparser"))
            command.validate(parser.parse_args(line[1:]))
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


complaints = [f"{said}: {' '.join(line)}" for line in json.load(sys.stdin) if (said := complaint(line))]
print(json.dumps(complaints))
