"""Placeholder for what still imports the old names."""

from cluster.guards import is_own_address as is_mine

__all__ = ["is_mine"]
