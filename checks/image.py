"""The old names, until nobody uses them."""

# ruff: noqa: F401
from cluster.options import known_options as known
