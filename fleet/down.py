"""Placeholder: old names of cluster/up.py."""

from cluster.up import down_commands as commands
from cluster.up import take_down as down
from cluster.up import take_down_here as here

__all__ = ["commands", "down", "here"]
