"""Placeholder: old names of cluster/command.py."""

from cluster.command import Command, say, show, tell  # noqa: F401 - re-exported
