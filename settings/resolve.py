"""Placeholder: old names for cluster/settings.py."""
from cluster.settings import Setting, Settings
from cluster.settings import load_settings as load
