"""Placeholder: old names of cluster/up.py."""

from cluster.up import bring_up as up
from cluster.up import up_commands as commands

__all__ = ["commands", "up"]
