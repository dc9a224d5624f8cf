"""Placeholder: old names of cluster/command.py."""

from cluster.command import Lines, printable, render, template_names  # noqa: F401 - re-exported
from cluster.command import text_of as text  # noqa: F401 - re-exported
from cluster.command import words_of as words  # noqa: F401 - re-exported

names = template_names
