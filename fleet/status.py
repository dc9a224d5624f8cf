"""The old name of cluster/status.py, until tasks.py is rewritten."""

from cluster.status import report_status as report  # noqa: F401
