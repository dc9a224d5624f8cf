"""Placeholder for what still imports the old names."""

from cluster.node import START_S as START_S
from cluster.node import runs_already as runs_already
from cluster.node import start_detached as start

__all__ = ["START_S", "runs_already", "start"]
