"""The old names of cluster/api.py, for the modules that are not yet rewritten."""

from cluster.api import Answer, Metrics
from cluster.api import ask_api as ask
from cluster.api import generate_token as generate
from cluster.api import read_metrics as metrics
