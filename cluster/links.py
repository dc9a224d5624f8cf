"""Placeholder: names as the merged module will have them."""
from host.links import Link
from host.links import ipv4 as ipv4_address
from host.links import read as find_links
from host.links import remarks as link_remarks
