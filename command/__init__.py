"""Placeholder: the old names of cluster/command.py, for modules that are not rewritten yet."""
