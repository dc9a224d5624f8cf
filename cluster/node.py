"""A node of the cluster: the container that Ray runs in, the same on every node, and what is put behind it."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from invoke import Exit

from cluster import links, token
from cluster.links import Link
from command import template
from command.command import Command
from settings.resolve import Settings

CONTAINER = "node-ray"
RAY_PORT = 6379
HF_CACHE = "/root/.cache/huggingface"
LOGS = "/var/log/node-ray"
IN_SHELL = 'exec "$@"'
# What travels into the container about the container, to be compared across nodes.
ABOUT = ("NODE_RAY_WRAPPER", "NODE_RAY_WRAPPER_SHA256", "NODE_RAY_IMAGE")
_IMAGE = '{{.Id}} {{index .Config.Labels "org.opencontainers.image.base.digest"}}'


@dataclass(frozen=True)
class Network:
    """What one node brings to the network: its own address, its RoCE devices, its data-plane netdevs."""

    address: str
    hcas: Sequence[str]
    netdevs: Sequence[str]


def logs(settings: Settings) -> Path:
    """The folder on this host's disk that holds the logs of the node and its server, and what the recorder saw."""
    return Path(mounts(settings)[LOGS])


def log(settings: Settings) -> Path:
    """The log of a node that was started detached."""
    return logs(settings) / "node.log"


def mounts(settings: Settings) -> dict[str, str]:
    """Places in the container, and the host's folder in each: what is slow to make again outlives the container."""
    cache = settings["CACHE_DIR"]
    return {
        HF_CACHE: settings.get("HF_CACHE", f"{cache}/huggingface"),
        "/root/.cache/flashinfer": f"{cache}/flashinfer",
        "/root/.cache/vllm": f"{cache}/vllm",
        "/root/.triton": f"{cache}/triton",
        LOGS: f"{cache}/{CONTAINER}",
    }


def network(settings: Settings, found: Sequence[Link], address: str | None = None) -> Network:
    """What settings say, and for the rest what found is up; raises Exit where several nodes would have no RDMA."""
    up = [link for link in found if link.up]
    hcas = _listed(settings, "RDMA_HCAS", [link.hca for link in up])
    netdevs = _listed(settings, "DATA_IFS", [link.netdev for link in up if link.address])
    alone = settings.model and settings.world_size() == 1
    if not hcas and "RDMA_HCAS" not in settings and not alone:
        raise Exit(_nothing_up(found))
    address = address or settings.get("VLLM_HOST_IP") or links.ipv4_address(settings["PRIMARY_IF"])
    if not address:
        raise Exit(
            f"PRIMARY_IF ({settings.origin('PRIMARY_IF')}) is {settings['PRIMARY_IF']}, which has no IPv4 address "
            "here. Type: ip -4 address; then set PRIMARY_IF or VLLM_HOST_IP in .env."
        )
    return Network(address, hcas, netdevs or [settings["PRIMARY_IF"]])


def remarks(net: Network) -> list[str]:
    """What a person should know about the network."""
    return [] if net.hcas else [f"No RDMA: NCCL goes over TCP (NCCL_IB_DISABLE=1), on {', '.join(net.netdevs)}."]


def environment(settings: Settings, net: Network) -> dict[str, str]:
    """What the node's container gets by name: addresses, interfaces, and everything forwarded."""
    sockets = ",".join(net.netdevs)
    env = {
        "VLLM_HOST_IP": net.address,
        "MASTER_ADDR": settings["HEAD_NODE_IP"],
        "TP_SOCKET_IFNAME": settings["PRIMARY_IF"],
        "NCCL_SOCKET_IFNAME": sockets,
        "GLOO_SOCKET_IFNAME": sockets,
        "OMPI_MCA_btl_tcp_if_include": sockets,
    }
    if net.hcas:
        env["NCCL_IB_HCA"] = ",".join(net.hcas)
        env["UCX_NET_DEVICES"] = ",".join(f"{hca}:1" for hca in net.hcas)
    else:
        env["NCCL_IB_DISABLE"] = "1"
        env["UCX_NET_DEVICES"] = sockets
    for name in ("NCCL_IB_GID_INDEX", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS"):
        env |= {name: settings[name]} if settings.get(name) else {}
    return env | {name: settings[name] for name in settings.forward if name not in env}


def head(settings: Settings, net: Network, detached: bool = False) -> list[Command]:
    """The commands that bring the head up: its folders, then its container with Ray's head in it."""
    return _bring_up("head", template.render("ray_head.j2", **_ray(settings, net)), settings, net, detached)


def worker(settings: Settings, net: Network, detached: bool = False) -> list[Command]:
    """The commands that bring a worker up: its folders, then its container with a Ray that joins the head."""
    return _bring_up("worker", template.render("ray_worker.j2", **_ray(settings, net)), settings, net, detached)


def fingerprint(wrapper: template.Lines, mounted: Mapping[str, str]) -> tuple[str, str]:
    """The wrapper's words as one line without the host's side of the mounts, and their sha256."""
    inside = {f"{folder}:{place}": f":{place}" for place, folder in mounted.items()}
    line = shlex.join(inside.get(word, word) for word in template.words(wrapper))
    return line, hashlib.sha256(line.encode()).hexdigest()


def _ray(settings: Settings, net: Network) -> Mapping[str, str]:
    return settings.public() | {"in_shell": IN_SHELL, "address": net.address}


def _bring_up(role: str, ray: template.Lines, settings: Settings, net: Network, detached: bool) -> list[Command]:
    mounted = mounts(settings)
    env = environment(settings, net)
    secret = {f"{token.INSIDE}:ro": str(file)} if (file := token.file(settings)) else {}
    wrapper = template.render(
        "ray_container.j2",
        container=CONTAINER,
        mounts=mounted | secret,
        token=secret and token.INSIDE,
        by_name=[*env, *ABOUT],
        **settings.public(),
    )
    line, sha256 = fingerprint(wrapper, mounted | secret)
    env |= {"NODE_RAY_WRAPPER": line, "NODE_RAY_WRAPPER_SHA256": sha256}
    where = f"{role}, {net.address}"
    make = Command(template.render("cache_folders.j2", folders=list(dict.fromkeys(mounted.values()))), where)
    image = template.render("image_inspect.j2", image=settings["VLLM_IMAGE"], format=_IMAGE)
    behind = log(settings) if detached else None
    return [make, Command(wrapper + ray, where, env, asks={"NODE_RAY_IMAGE": image}, log=behind)]


def _listed(settings: Settings, name: str, otherwise: list[str]) -> list[str]:
    return [item for item in settings[name].split(",") if item] if name in settings else otherwise


def _nothing_up(found: Sequence[Link]) -> str:
    seen = ", ".join(f"{link.hca} ({link.netdev})" for link in found) or "no RoCE device at all"
    return (
        f"No data-plane link is up: found {seen}. Check the cable; after a warm reboot a port may stay down until a "
        "cold boot (power off, wait, power on). RDMA_HCAS= (set, but empty) goes on over TCP on purpose."
    )


# The names of the rewritten module, until it is there.
log_folder, node_log, node_environment = logs, log, environment
network_remarks, head_commands, worker_commands = remarks, head, worker
INSIDE = "/opt/inside"
