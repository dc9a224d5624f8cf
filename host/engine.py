"""Placeholder for what still imports the old names."""

from cluster.engine import age_in_words as age_in_words
from cluster.engine import ask_container as ask
from cluster.engine import client as client
from cluster.engine import container_age as age
from cluster.engine import container_environment as environment
from cluster.engine import container_image as image
from cluster.engine import has_image as has_image
from cluster.engine import image_labels as labels
from cluster.engine import node_container as node
from cluster.engine import our_containers as ours
from cluster.engine import succeeds_in_container as succeeds

__all__ = ["age", "ask", "environment", "image", "labels", "node", "ours", "succeeds"]
