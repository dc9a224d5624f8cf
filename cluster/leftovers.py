"""Placeholder for what still imports the old name."""

from cluster.node import removal_command as removal

__all__ = ["removal"]
