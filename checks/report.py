"""The old names, until nobody uses them."""

# ruff: noqa: F401
from cluster.check import RULES, as_json, foretell, rule_names
from cluster.check import tell_inspection as tell
