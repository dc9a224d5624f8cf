"""The old name of cluster/watch.py, until tasks.py is rewritten."""

from cluster.watch import watch_api as watch  # noqa: F401
