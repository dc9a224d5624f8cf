"""Placeholder: names as the merged module will have them."""
from command import run as _run
from command.command import Command, say, show, tell
from command.run import LOG_BYTES, Child, TooLate, answers, become, detach, held
from command.run import following as stream
from command.run import lines as stream_lines
from command.template import Lines, names, printable, render
from command.template import text as text_of
from command.template import words as words_of


def run(command, *, capture=False, seconds=None, whole=False, heard=None):
    if heard:
        return _run.told(command, heard, seconds)
    if capture:
        return _run.output(command, seconds)
    return (_run.run_whole if whole else _run.run)(command) or ""
