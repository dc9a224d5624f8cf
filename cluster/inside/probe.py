"""Print the facts of every node as JSON: probe.py KEY NAME..., in the head's container.

The environment has vLLM's and NCCL's variables, and the variables called NAME. A secret is printed as its hash with
KEY. A fact that cannot be asked is {"unknown": REASON}, so that no rule takes it for fine.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
from importlib.metadata import version

import psutil  # vLLM requires it

SECONDS = 15
PREFIXES = ("VLLM_", "NCCL_", "UCX_", "GLOO_", "TP_", "OMPI_")
SECRET = re.compile("TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
IPC_LOCK = 14  # linux/capability.h


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
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-200:])
    return done.stdout.splitlines()


def memory():
    found = psutil.virtual_memory()
    return {"MemTotal": found.total, "MemAvailable": found.available}


def network():
    """Return the network of the control link as ADDRESS/PREFIX."""
    for one in psutil.net_if_addrs()[os.environ["TP_SOCKET_IFNAME"]]:
        if one.family == socket.AF_INET:
            return str(ipaddress.ip_interface(f"{one.address}/{one.netmask}").network)
    raise LookupError("the control link has no IPv4 address")


def links():
    found = psutil.net_if_stats()
    states = {name: read(f"/sys/class/net/{name}/operstate") for name in found if name != "lo"}
    return {name: {"state": state, "mtu": found[name].mtu} for name, state in states.items()}


def may_lock_memory():
    capabilities = re.search(r"CapEff:\s*(\w+)", read("/proc/self/status"))[1]
    return bool(int(capabilities, 16) >> IPC_LOCK & 1)


def facts(key, names):
    env = os.environ
    asked = {
        # The stand-in hosts of a rehearsal share a boot id, but each has its own network namespace.
        "host": lambda: f"{read('/proc/sys/kernel/random/boot_id')}/{os.stat('/proc/self/ns/net').st_ino}",
        "gpus": gpus,
        "memory": memory,
        "since": lambda: psutil.Process(1).create_time(),
        "wrapper": lambda: {"sha256": env["NODE_RAY_WRAPPER_SHA256"], "words": env["NODE_RAY_WRAPPER"]},
        "repository": lambda: env.get("NODE_RAY_REPOSITORY"),
        "image": lambda: env["NODE_RAY_IMAGE"],
        "environment": lambda: environment(key, names),
        "token": lambda: hidden(key, read(env["RAY_AUTH_TOKEN_PATH"])) if "RAY_AUTH_TOKEN_PATH" in env else None,
        "python": platform.python_version,
        **{package: lambda package=package: version(package) for package in ("ray", "vllm", "torch")},
        "infiniband": lambda: sorted(os.listdir("/dev/infiniband")),
        "memlock": lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "ipc_lock": may_lock_memory,
        "network": network,
        "links": links,
        # The variables that vLLM's older Ray executor leaves to each node.
        "own_variables": lambda: json.loads(read("~/.config/vllm/ray_non_carry_over_env_vars.json")),
    }  # fmt: skip
    return {name: known(ask) for name, ask in asked.items()}


class Asker:
    # Ray starts one process on each node for an actor and two for a task. A probe takes little longer than their start.

    def facts(self, key, names):
        return facts(key, names)


def every_node(key, names):
    import every
    import ray

    actor, nodes = ray.remote(num_cpus=0)(Asker), every.nodes()
    askers = [actor.options(**every.pinned(node)).remote() for node in nodes]
    answers = every.gather({number: asker.facts.remote(key, names) for number, asker in enumerate(askers)}, SECONDS)
    for node, told in zip(nodes, answers.values(), strict=True):
        yield {
            "address": node["NodeManagerAddress"],
            "hostname": node["NodeManagerHostname"],
            "ray_gpus": node["Resources"].get("GPU", 0),
            "facts": told if isinstance(told, dict) else {"unknown": f"{type(told).__name__}: {told}"},
        }


if __name__ == "__main__":
    print(json.dumps(list(every_node(sys.argv[1], sys.argv[2:]))))
