"""Placeholder: old names for cluster/settings.py."""
from cluster.settings import CORE, DEFAULT_BASE_IMAGE, FLAGS, SECRETS, form
from cluster.settings import OF_ONE_NODE as NODE_OWN
