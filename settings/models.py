"""Placeholder: old names for cluster/models.py."""
from cluster.models import ROOT, Model
from cluster.models import find_model as find
from cluster.models import known_models as known
