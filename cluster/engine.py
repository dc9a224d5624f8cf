"""Placeholder: names as the merged module will have them."""
from host.engine import age as container_age
from host.engine import ask as ask_container
from host.engine import client, has_image
from host.engine import environment as container_environment
from host.engine import image as container_image
from host.engine import labels as image_labels
from host.engine import node as node_container
from host.engine import ours as our_containers
from host.engine import succeeds as succeeds_in_container
