"""The old names, until nobody uses them."""

# ruff: noqa: F401
from cluster.check import Inspection, foresee, gated, inspect, proved
