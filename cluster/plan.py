"""The plan: what head, worker and launch would run on every node. Any machine can make it."""

import re

from cluster import node, server
from cluster.command import Command, say
from cluster.links import Link, find_links
from cluster.repository import ROOT
from cluster.settings import ModelSettings
from cluster.token import token_file


def plan_commands(settings: ModelSettings) -> list[Command]:
    """Return the commands of a head, of a worker for each address in WORKER_IP, and of a launch."""
    head = settings["HEAD_NODE_IP"]
    workers = list(dict.fromkeys(settings["WORKER_IP"].split(",")))
    have, need = len({*workers} - {head}), settings.world_size() - 1
    if have < need:
        say(
            f"Warning: {settings.model.name} needs {need} workers beside the head, and WORKER_IP "
            f"({settings.origin('WORKER_IP')}) names {have}: as it stands, launch would refuse."
        )
    found = find_links(settings["SYSFS"])
    if not any(link.up for link in found):
        say("This machine has no RoCE device that is up: the links are those that .env.example names.")
        named = dict(re.findall("^#? ?(RDMA_HCAS|DATA_IFS)=(.+)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
        pairs = zip(named["RDMA_HCAS"].split(","), named["DATA_IFS"].split(","), strict=True)
        found = [Link(hca, netdev, up=True, address="any") for hca, netdev in pairs]
    own = f"the caches in {settings['CACHE_DIR']}, Ray's token: {token_file(settings) or 'none'}"
    say(f"These values are this machine's, and may differ on a Spark: {own}.")
    net = node.network(settings, found, head)
    names = dict.fromkeys((settings["PRIMARY_IF"], *net.interfaces))  # Gloo and NCCL open sockets on each, on any port
    say("On every node that has a firewall, once:", *(f"  sudo ufw allow in on {name}" for name in names))
    planned = node.head_commands(settings, net)
    for worker in workers:
        planned += node.worker_commands(settings, node.network(settings, found, worker))
    return [*planned, *server.launch_commands(settings)]
