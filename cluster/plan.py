"""What head, worker and launch would run, for every node, on any machine."""

import re

from cluster import links, node, server
from cluster.links import Link
from command.command import Command, say
from settings.models import ROOT
from settings.resolve import Settings


def commands(settings: Settings) -> list[Command]:
    """The command lines of a whole bring-up, one worker for each address in WORKER_IP."""
    workers = dict.fromkeys(settings["WORKER_IP"].split(","))
    have, want = len(workers.keys() - {settings["HEAD_NODE_IP"]}), settings.world_size() - 1
    if have < want:
        say(
            f"Warning: {settings.model.name} needs {want} workers beside the head, and WORKER_IP "
            f"({settings.origin('WORKER_IP')}) names {have}: as it stands, launch would refuse."
        )
    found = links.find_links(settings["SYSFS"])
    if not any(link.up for link in found):
        found = _documented()
    planned = node.head(settings, node.network(settings, found, settings["HEAD_NODE_IP"]))
    for address in workers:
        planned += node.worker(settings, node.network(settings, found, address))
    return [*planned, *server.commands(settings)]


def _documented() -> tuple[Link, ...]:
    """The links that .env.example names, as if both cables were in."""
    text = (ROOT / ".env.example").read_text()
    named = {name: re.search(rf"^#? ?{name}=(.+)$", text, re.MULTILINE)[1].split(",") for name in _EXAMPLE}
    say("This machine has no RoCE device that is up: the links are those that .env.example names.")
    return tuple(Link(hca, netdev, True, "example") for hca, netdev in zip(*named.values(), strict=True))


_EXAMPLE = ("RDMA_HCAS", "DATA_IFS")
