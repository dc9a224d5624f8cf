"""Placeholder: names as the merged module will have them."""
from checks.nodes import Node, Unknown
from checks.nodes import ask as ask_nodes
from checks.rules import findings as find_disagreements
