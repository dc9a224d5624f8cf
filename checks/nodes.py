"""The old names, until nobody uses them."""

# ruff: noqa: F401
from cluster.agreement import Node, Unknown
from cluster.agreement import ask_nodes as ask
