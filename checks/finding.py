"""Placeholder: old names for cluster/finding.py."""
from cluster.finding import Finding
