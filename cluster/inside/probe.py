"""Print the facts of every node as JSON: probe.py KEY MODEL REVISION NAME..., in the head's container.

The environment has vLLM's and NCCL's variables, and the variables called NAME. A secret is printed as its hash with
KEY. MODEL is the checkpoint to look for in the cache, if it is one of the hub. A fact that cannot be asked is
{"unknown": REASON}, so that no rule takes it for fine.
"""

import fcntl
import glob
import hashlib
import hmac
import ipaddress
import json
import os
import platform
import re
import resource
import socket
import struct
import subprocess
import sys
from functools import partial
from importlib.metadata import version

SECONDS = 15
PREFIXES = ("VLLM_", "NCCL_", "UCX_", "GLOO_", "TP_", "OMPI_")
SECRET = re.compile("TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
MEMORY = ("MemTotal", "MemAvailable", "MemFree", "Cached", "SwapTotal", "SwapFree")  # of /proc/meminfo
SYS = "/sys"
IPC_LOCK = 14  # linux/capability.h
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B  # linux/sockios.h


def read(path):
    with open(os.path.expanduser(path)) as file:
        return file.read().strip()


def known(ask):
    try:
        return ask()
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}"}


def hidden(key, value):
    return "hmac:" + hmac.new(key.encode(), value.encode(), hashlib.sha256).hexdigest()[:16]


def environment(key, names):
    # Ray adds to the environment of its own workers, so that of process 1 is read.
    items = dict(item.partition("=")[::2] for item in read("/proc/1/environ").split("\0") if item)
    chosen = {name: value for name, value in items.items() if name.startswith(PREFIXES) or name in names}
    return {name: hidden(key, value) if SECRET.search(name) else value for name, value in chosen.items()}


def gpus():
    """Return the GPUs that nvidia-smi names. A field in brackets is not supported and becomes None.

    A GB10 answers [N/A] for its memory, which is the host's.
    """
    asked = "name,memory.total,driver_version,clocks.sm,power.draw,temperature.gpu"
    words = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-200:])
    told = []
    for line in done.stdout.splitlines():
        fields = [None if text.startswith("[") else text for text in line.split(", ")]
        mib, clock, power, temperature = (text and float(text) for text in (fields[1], *fields[3:]))
        numbers = {"clock_mhz": clock, "power_w": power, "temperature_c": temperature}
        told.append({"name": fields[0], "memory": mib and int(mib * 2**20), "driver": fields[2], **numbers})
    return told


def field(path, name):
    """Return the first word behind a name in a file of /proc."""
    return next(line.split()[1] for line in read(path).splitlines() if re.match(f"{name}\\b", line))


def since():
    """Return when process 1 started, in seconds since 1970, by proc(5)."""
    ticks = int(read("/proc/1/stat").rpartition(")")[2].split()[19])
    return int(field("/proc/stat", "btime")) + ticks / os.sysconf("SC_CLK_TCK")


def network(interface):
    """Return an interface's IPv4 network as ADDRESS/PREFIX. Raises OSError if the interface has no IPv4 address."""
    request = struct.pack("256s", interface.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        told = [fcntl.ioctl(asked, number, request)[20:24] for number in (SIOCGIFADDR, SIOCGIFNETMASK)]
    return str(ipaddress.ip_interface("/".join(map(socket.inet_ntoa, told))).network)


def links():
    names = sorted(path.split("/")[4] for path in glob.glob("/sys/class/net/*/operstate"))
    told = {name: [read(f"/sys/class/net/{name}/{file}") for file in ("operstate", "mtu")] for name in names}
    return {name: {"state": state, "mtu": int(mtu)} for name, (state, mtu) in told.items() if name != "lo"}


def devices():
    """Return each RoCE device with its interface, that interface's network and speed in Mbit/s, and its GIDs by index.

    A GID comes with its type, RoCE v2 or IB/RoCE v1. None: the interface has no IPv4 address. 0: its speed is unknown.
    """
    told = {}
    for path in sorted(glob.glob(f"{SYS}/class/infiniband/*/device/net/*")):
        folder, netdev = path.split("/device/net/")
        table = {at: read(f"{folder}/ports/1/gids/{at}") for at in os.listdir(f"{folder}/ports/1/gids")}
        filled = {at: gid for at, gid in table.items() if set(gid) - {*"0:"}}
        ipv4, speed = known(partial(network, netdev)), known(partial(read, f"{SYS}/class/net/{netdev}/speed"))
        told[os.path.basename(folder)] = {
            "netdev": netdev,
            "network": ipv4 if isinstance(ipv4, str) else None,
            "speed": int(speed) if isinstance(speed, str) and speed.isdecimal() else 0,
            "gids": {at: [gid, read(f"{folder}/ports/1/gid_attrs/types/{at}")] for at, gid in filled.items()},
        }
    return told


def checkpoint(model, revision):
    """Return what weights.look says of the cache; None for a model that is a folder."""
    import weights

    return None if model.startswith("/") or not model else weights.look(weights.HUB, model, revision)


def facts(key, model, revision, names):
    env, told = os.environ, {}
    asked = {
        # Stand-in hosts share a boot id. Their network namespaces differ, as those of two machines do.
        "host": lambda: f"{read('/proc/sys/kernel/random/boot_id')}/{os.stat('/proc/self/ns/net').st_ino}",
        "gpus": gpus,
        "memory": lambda: {name: int(field("/proc/meminfo", name)) * 1024 for name in MEMORY},
        "since": since,
        "wrapper": lambda: {"sha256": env["NODE_RAY_WRAPPER_SHA256"], "words": env["NODE_RAY_WRAPPER"]},
        "repository": lambda: env.get("NODE_RAY_REPOSITORY"),
        "image": lambda: env["NODE_RAY_IMAGE"],
        "environment": lambda: environment(key, names),
        "token": lambda: hidden(key, read(env["RAY_AUTH_TOKEN_PATH"])) if "RAY_AUTH_TOKEN_PATH" in env else None,
        "python": platform.python_version,
        **{package: lambda package=package: version(package) for package in ("ray", "vllm", "torch")},
        "infiniband": lambda: sorted(os.listdir("/dev/infiniband")),
        "memlock": lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "ipc_lock": lambda: bool(int(field("/proc/self/status", "CapEff"), 16) >> IPC_LOCK & 1),
        "network": lambda: network(env["TP_SOCKET_IFNAME"]),
        "links": links,
        "devices": devices,
        "weights": lambda: checkpoint(model, revision),
        "kernel": platform.release,
        "driver": lambda: told["gpus"][0]["driver"],
        "cgroup driver": lambda: env["NODE_RAY_CGROUP_DRIVER"],
        # The variables that vLLM's older Ray executor leaves to each node.
        "own_variables": lambda: json.loads(read("~/.config/vllm/ray_non_carry_over_env_vars.json")),
    }  # fmt: skip
    for name, ask in asked.items():
        told[name] = known(ask)
    return told


class Asker:
    # Ray starts one process on each node for an actor and two for a task. A probe takes little longer than their start.

    def facts(self, *asked):
        return facts(*asked)


def every_node(*asked):
    import every
    import ray

    actor, nodes = ray.remote(num_cpus=0)(Asker), every.nodes()
    askers = [actor.options(**every.pinned(node)).remote() for node in nodes]
    answers = every.gather({number: asker.facts.remote(*asked) for number, asker in enumerate(askers)}, SECONDS)
    for node, told in zip(nodes, answers.values(), strict=True):
        yield {
            "address": node["NodeManagerAddress"],
            "hostname": node["NodeManagerHostname"],
            "ray_gpus": node["Resources"].get("GPU", 0),
            "facts": told if isinstance(told, dict) else {"unknown": f"{type(told).__name__}: {told}"},
        }


if __name__ == "__main__":
    print(json.dumps(list(every_node(*sys.argv[1:4], sys.argv[4:]))))
