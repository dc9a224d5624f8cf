"""One node of the cluster: the container in which Ray runs.

Head and worker start the same container. The words from `docker run` to the image are the same on every node, byte for
byte. Two things differ: the `ray start` words behind the image, and the values of the variables that go by name.
"""

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from invoke import Exit

from cluster import links
from cluster.command import Command, Lines, render, run, say, words_of
from cluster.engine import CONTAINER
from cluster.links import Link
from cluster.repository import ROOT, repository_digest
from cluster.settings import Settings
from cluster.token import INSIDE_TOKEN, token_file

RAY_PORT = 6379
# Folders in the container.
HF_CACHE = "/root/.cache/huggingface"
LOGS = f"/var/log/{CONTAINER}"
INSIDE = "/opt/inside"  # cluster/inside of this checkout
# Docker prints the image's id and the digest of its base. `check` compares the line across the nodes.
IMAGE_IDENTITY = '{{.Id}} {{index .Config.Labels "org.opencontainers.image.base.digest"}}'
# NVIDIA's images set library paths in shell start-up files, so every program starts through a shell.
IN_SHELL = 'exec "$@"'


# --- The network of one node ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A node's own address, its RoCE devices, and its interfaces for TCP."""

    address: str
    devices: Sequence[str]
    interfaces: Sequence[str]


def find_network(settings: Settings) -> Network:
    """Choose this node's network from its links, and tell the operator what is unusual."""
    found = links.find_links(settings["SYSFS"])
    net = network(settings, found)
    say(*links.link_remarks(found))
    if not net.devices:
        say(f"No RDMA: NCCL goes over TCP (NCCL_IB_DISABLE=1), on {', '.join(net.interfaces)}.")
    return net


def network(settings: Settings, found: Sequence[Link], address: str | None = None) -> Network:
    """Choose devices and interfaces: those that the settings name, otherwise those whose link is up.

    Raises Exit if no link is up and the model needs a second node, because NCCL would silently use TCP.
    """
    up = [link for link in found if link.up]
    devices = _named(settings, "RDMA_HCAS", otherwise=[link.hca for link in up])
    interfaces = _named(settings, "DATA_IFS", otherwise=[link.netdev for link in up if link.address])
    needs_one_node = settings.model is not None and settings.world_size() == 1
    if not devices and "RDMA_HCAS" not in settings and not needs_one_node:
        seen = ", ".join(f"{link.hca} ({link.netdev})" for link in found) or "no RoCE device at all"
        raise Exit(
            f"No data-plane link is up: found {seen}. Check the cable; after a warm reboot a port may stay down until "
            "a cold boot (power off, wait, power on). To use TCP on purpose, set RDMA_HCAS= (empty)."
        )
    address = address or settings.get("VLLM_HOST_IP") or links.ipv4_address(settings["PRIMARY_IF"])
    if address is None:
        raise Exit(
            f"PRIMARY_IF ({settings.origin('PRIMARY_IF')}) is {settings['PRIMARY_IF']}, which has no IPv4 address "
            "here. Type: ip -4 address; then set PRIMARY_IF or VLLM_HOST_IP in .env."
        )
    return Network(address, devices, interfaces or [settings["PRIMARY_IF"]])


def _named(settings: Settings, name: str, otherwise: list[str]) -> list[str]:
    if name not in settings:
        return otherwise
    return [item for item in settings[name].split(",") if item]


# --- What the container starts with -----------------------------------------------------------------------------------


def mounts(settings: Settings) -> dict[str, str]:
    """Folders of the host by their place in the container. Caches and logs survive the container."""
    cache = settings["CACHE_DIR"]
    return {
        HF_CACHE: settings.get("HF_CACHE", f"{cache}/huggingface"),
        "/root/.cache/flashinfer": f"{cache}/flashinfer",
        "/root/.cache/vllm": f"{cache}/vllm",
        "/root/.triton": f"{cache}/triton",
        LOGS: f"{cache}/{CONTAINER}",
    }


def log_folder(settings: Settings) -> Path:
    """The folder on this host that holds the logs of the node and of its server."""
    return Path(mounts(settings)[LOGS])


def node_log(settings: Settings) -> Path:
    """The log of a node that was started with --detach."""
    return log_folder(settings) / "node.log"


def node_environment(settings: Settings, net: Network) -> dict[str, str]:
    """Variables that the container gets by name: addresses, interfaces, and everything in VLLM_FORWARD_VARS.

    Ray does not pass a driver's environment to the ranks on other nodes, so each container must start with all of it.
    """
    sockets = ",".join(net.interfaces)
    env = {
        "VLLM_HOST_IP": net.address,
        "MASTER_ADDR": settings["HEAD_NODE_IP"],
        "TP_SOCKET_IFNAME": settings["PRIMARY_IF"],
        "NCCL_SOCKET_IFNAME": sockets,
        "GLOO_SOCKET_IFNAME": sockets,
        "OMPI_MCA_btl_tcp_if_include": sockets,
    }
    if net.devices:
        env["NCCL_IB_HCA"] = ",".join(net.devices)
        env["UCX_NET_DEVICES"] = ",".join(f"{device}:1" for device in net.devices)
    else:
        env["NCCL_IB_DISABLE"] = "1"
        env["UCX_NET_DEVICES"] = sockets
    # A rank reads HF_ENDPOINT when it starts, before vLLM hands the head's variables on.
    for name in ("NCCL_IB_GID_INDEX", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "HF_ENDPOINT"):
        if value := settings.get(name):
            env[name] = value
    return env | {name: settings[name] for name in settings.forward if name not in env}


def fingerprint(wrapper: Lines, mounted: Mapping[str, str]) -> tuple[str, str]:
    """Return the wrapper, which is `docker run` up to the image, as one line, and the sha256 of that line.

    The host's side of each mount is left out, because the operators' home folders may differ from node to node.
    """
    comparable = {f"{folder}:{place}": f":{place}" for place, folder in mounted.items()}
    line = shlex.join(comparable.get(word, word) for word in words_of(wrapper))
    return line, hashlib.sha256(line.encode()).hexdigest()


# --- The commands of a node -------------------------------------------------------------------------------------------


def _commands(role: str, settings: Settings, net: Network, detached: bool = False) -> list[Command]:
    """Make the cache folders, then start the container. A detached node writes its output to a log."""
    where = f"{role}, {net.address}"
    folders = mounts(settings)
    mounted = folders | {f"{INSIDE}:ro": str(ROOT / "cluster/inside")}
    if token := token_file(settings):
        mounted[f"{INSIDE_TOKEN}:ro"] = str(token)
    env = node_environment(settings, net)
    asks = {
        "NODE_RAY_IMAGE": render("image_inspect.j2", image=settings["VLLM_IMAGE"], format=IMAGE_IDENTITY),
        "NODE_RAY_CGROUP_DRIVER": render("docker_info.j2", format="{{.CgroupDriver}}"),  # no container sees it
    }
    wrapper = render(
        "ray_container.j2",
        container=CONTAINER,
        mounts=mounted,
        token=INSIDE_TOKEN if token else None,
        by_name=[*env, "NODE_RAY_WRAPPER", "NODE_RAY_WRAPPER_SHA256", "NODE_RAY_REPOSITORY", *asks],
        **settings.public(),
    )
    env["NODE_RAY_WRAPPER"], env["NODE_RAY_WRAPPER_SHA256"] = fingerprint(wrapper, mounted)
    env["NODE_RAY_REPOSITORY"] = repository_digest()
    ray = render(f"ray_{role}.j2", inside=INSIDE, address=net.address, ray_port=RAY_PORT, **settings.public())
    make_folders = render("cache_folders.j2", folders=list(dict.fromkeys(folders.values())))
    log = node_log(settings) if detached else None
    start = Command(wrapper + ray, where, env, asks=asks, log=log)
    return [Command(make_folders, where), start]


head_commands = partial(_commands, "head")
worker_commands = partial(_commands, "worker")


def removal_command(names: Sequence[str] = (CONTAINER,)) -> Command:
    return Command(render("docker_remove.j2", names=names), "this node")


# --- Bringing a node up -----------------------------------------------------------------------------------------------


def prepare_node(commands: Sequence[Command], guard: Callable[[], None]) -> Command:
    """Call the guard, and run all commands but the last one. Return the last one, which starts the container."""
    *before, container = commands
    guard()
    for command in before:
        run(command)
    say(f"wrapper sha256: {container.env['NODE_RAY_WRAPPER_SHA256']}")
    return container
