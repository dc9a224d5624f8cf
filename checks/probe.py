"""Run inside the head's container, as `python3 -c SOURCE KEY NAME...`: what is true in the container of every node,
asked through Ray, as JSON. KEY hides the values of secrets; NAMEs are variables to report beside vLLM's and NCCL's.
What cannot be asked is {"unknown": reason}: it must not pass for fine."""

import fcntl
import glob
import hashlib
import hmac
import json
import os
import platform
import re
import resource
import socket
import struct
import subprocess
import sys
from importlib.metadata import version

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SECONDS = 15
CARRIED_BY_NONE = "~/.config/vllm/ray_non_carry_over_env_vars.json"
PREFIXES = ("VLLM_", "NCCL_", "UCX_", "GLOO_", "TP_", "OMPI_")


def read(path):
    with open(path) as file:
        return file.read().strip()


def known(ask):
    try:
        return ask()
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}"}


def hidden(key, value):
    return "hmac:" + hmac.new(key.encode(), value.encode(), hashlib.sha256).hexdigest()[:16]


def environment(key, names):
    # Process 1 has what the container started with; Ray adds to its own workers' environment.
    items = dict(item.partition("=")[::2] for item in read("/proc/1/environ").split("\0") if item)
    secret = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
    chosen = {name: value for name, value in items.items() if name.startswith(PREFIXES) or name in names}
    return {name: hidden(key, value) if secret.search(name) else value for name, value in chosen.items()}


def token(key):
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return hidden(key, read(path)) if path else None


def host():
    # Two containers are on one host if they share both: stand-in hosts share a boot id, not a network namespace.
    return f"{read('/proc/sys/kernel/random/boot_id')}/{os.stat('/proc/self/ns/net').st_ino}"


def gpus():
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-200:])
    return done.stdout.split("\n")[:-1]


def memory():
    lines = dict(line.split(":") for line in read("/proc/meminfo").splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable")}


def network():
    # The control link's address as network/prefix, by the kernel's own answer (SIOCGIFADDR, SIOCGIFNETMASK).
    request = struct.pack("256s", os.environ["TP_SOCKET_IFNAME"].encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        address, mask = (fcntl.ioctl(asked.fileno(), number, request)[20:24] for number in (0x8915, 0x891B))
    masked = bytes(a & m for a, m in zip(address, mask))
    return f"{socket.inet_ntoa(masked)}/{sum(bin(byte).count('1') for byte in mask)}"


def since():
    # When the container's first process started, in seconds since 1970 (proc(5)).
    booted = next(line for line in read("/proc/stat").splitlines() if line.startswith("btime"))
    ticks = int(read("/proc/1/stat").rpartition(")")[2].split()[19])
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def links():
    found = {}
    for folder in glob.glob("/sys/class/net/*"):
        if os.path.basename(folder) != "lo" and os.path.exists(f"{folder}/operstate"):
            found[os.path.basename(folder)] = {"state": read(f"{folder}/operstate"), "mtu": int(read(f"{folder}/mtu"))}
    return found


def gids():
    tables = {}
    for path in sorted(glob.glob("/sys/class/infiniband/*/ports/*/gids/*")):
        device, _, port, _, index = path.split("/")[4:]
        value = known(lambda path=path: read(path))
        if value != "0000:0000:0000:0000:0000:0000:0000:0000":
            tables.setdefault(f"{device}:{port}", {})[index] = value
    return tables


def capability(bit):
    mask = next(line for line in read("/proc/self/status").splitlines() if line.startswith("CapEff"))
    return bool(int(mask.split()[1], 16) >> bit & 1)


def facts(key, names):
    asked = {
        "host": host,
        "gpus": gpus,
        "memory": memory,
        "since": since,
        "wrapper": lambda: {"sha256": os.environ["NODE_RAY_WRAPPER_SHA256"], "words": os.environ["NODE_RAY_WRAPPER"]},
        "image": lambda: os.environ["NODE_RAY_IMAGE"],
        "environment": lambda: environment(key, names),
        "token": lambda: token(key),
        "python": platform.python_version,
        **{package: (lambda package=package: version(package)) for package in ("ray", "vllm", "torch")},
        "infiniband": lambda: sorted(os.listdir("/dev/infiniband")),
        "memlock": lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "ipc_lock": lambda: capability(14),
        "network": network,
        "links": links,
        # What vLLM's Ray executor leaves to each node: $VLLM_CONFIG_ROOT, or its default.
        "own_variables": lambda: json.loads(read(os.path.expanduser(CARRIED_BY_NONE))),
        "gids": gids,
    }
    return {name: known(ask) for name, ask in asked.items()}


class Asker:
    # An actor, because Ray starts two worker processes on each node for a task, and one for an actor: their start is
    # nearly all that the probe costs. It ends with this driver.
    def facts(self, key, names):
        return facts(key, names)


def main(key, names):
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asker = ray.remote(num_cpus=0, max_restarts=0)(Asker)
    pinned = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    askers = [asker.options(scheduling_strategy=place).remote() for place in pinned]
    asked = [one.facts.remote(key, names) for one in askers]
    ray.wait(asked, num_returns=len(asked), timeout=SECONDS)
    answers = []
    for node, answer in zip(nodes, asked):
        told = known(lambda answer=answer: ray.get(answer, timeout=0.1))
        answers.append({
            "address": node["NodeManagerAddress"],
            "hostname": node["NodeManagerHostname"],
            "ray_gpus": node["Resources"].get("GPU", 0),
            "facts": told,
        })  # fmt: skip
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
