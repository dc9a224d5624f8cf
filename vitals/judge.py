"""The old names of what moves, for the modules that are not yet rewritten."""

from cluster.recorder import LOAD, WORK
