"""Placeholder: old names of cluster/command.py."""

from cluster.command import become, run

__all__ = ["become", "run"]
