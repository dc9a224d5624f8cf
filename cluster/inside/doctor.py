"""Print facts of this host as JSON: `python3 - ASKED`, on a host that has nothing of this repository yet.

cluster/doctor.py sends this module with probe.py, weights.py and repository.py as one text. ASKED is JSON: `given` and
`defaults` are settings by name, `folder` is where the checkout should be, `names` are the facts, all if it is empty. A
fact that cannot be asked is {"unknown": REASON}.
"""

import glob
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import probe
import repository
import weights

# The rest of what Docker tells may have secrets.
ENGINE = ("ServerVersion", "CgroupDriver", "Runtimes", "DiscoveredDevices", "DockerRootDir")
SYSCTL = ("/etc/sysctl.conf", "/etc/sysctl.d/*.conf", "/run/sysctl.d/*.conf", "/usr/lib/sysctl.d/*.conf")


def settings(given, defaults, folder):
    """Return what holds on this host: what the head hands on, then the shell, then the checkout's `.env`."""
    file = Path(os.environ.get("ENV_FILE", f"{folder}/.env") or os.devnull)
    lines = re.findall(r"^\s*(?:export\s+)?(\w+)\s*=(.*)", file.read_text() if file.exists() else "", re.MULTILINE)
    own = {name: " ".join(shlex.split(text, comments=True)) for name, text in lines if name in defaults}
    found = {**defaults, **own, **os.environ, **given}
    env = {name: found[name] and os.path.expanduser(found[name]) for name in defaults}
    return env | {"HF_CACHE": env["HF_CACHE"] or f"{env['CACHE_DIR']}/huggingface"}


def output(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip())
    return done.stdout.strip()


def engine():
    told = json.loads(output("docker", "info", "--format", "{{json .}}"))
    if errors := told.get("ServerErrors"):  # an older docker then ends with 0
        raise RuntimeError(errors[0])
    return {name: told.get(name) for name in ENGINE}


def docker_id(kind, name):
    """Return the id of an image or a container, None if Docker does not have it."""
    try:
        return output("docker", kind, "inspect", "--format", "{{.Id}}", name)
    except RuntimeError as error:
        if f"no such {kind}" in str(error).lower():
            return None
        raise


def private(path, key):
    """Return the mode of a file and the hash of its text, None if there is no file."""
    if not os.path.lexists(path):
        return None
    return {"mode": os.stat(path).st_mode & 0o777, "hash": probe.hidden(key, probe.read(path))}


def disk(folder):
    """Return the free bytes and the number of the disk of a folder, and whether this user may make the folder."""
    place = next(place for place in (Path(folder), *Path(folder).parents) if place.exists())
    may = os.access(place, os.W_OK) or (place == Path(folder) and place.name != "node-ray")  # root makes the others
    return {"free": shutil.disk_usage(place).free, "disk": os.stat(place).st_dev, "may": may}


def keeper(name, index):
    """Return a list of the MTU in the file that sets an interface up at boot. It is empty if there is no such file."""
    state = Path(f"/run/systemd/netif/links/{index}")
    if state.exists() and (file := re.search("^NETWORK_FILE=(.+)", state.read_text(), re.MULTILINE)):
        return ["".join(re.findall("^MTUBytes=(.+)", probe.read(file[1]), re.MULTILINE))]
    for line in output("nmcli", "-t", "-f", "DEVICE,UUID,FILENAME", "connection", "show", "--active").splitlines():
        device, uuid, file = line.split(":", 2)
        # NetworkManager forgets what it has in /run, but netplan writes its part of that at each boot.
        if device == name and (not file.startswith("/run/") or "/netplan-" in file):
            return [output("nmcli", "-g", "802-3-ethernet.mtu", "connection", "show", uuid)]
    return []


def links(primary):
    """Return the interfaces of the RoCE devices and of the control link, by name."""
    told, devices = {}, {at["netdev"]: (device, at) for device, at in probe.devices().items()}
    for one in json.loads(output("ip", "-j", "address")):
        if (name := one["ifname"]) in devices or name == primary:
            device, at = devices.get(name, (None, {"network": None, "speed": 0, "gids": {}}))
            addresses = [f"{its['local']}/{its['prefixlen']}" for its in one["addr_info"] if its["family"] == "inet"]
            gid = any(":ffff:" in gid and kind == "RoCE v2" for gid, kind in at["gids"].values())
            told[name] = {"device": device, "up": one["operstate"] in ("UP", "UNKNOWN"), "mtu": one["mtu"],
                          "addresses": addresses, "network": at["network"], "gbits": at["speed"] // 1000, "gid": gid,
                          "kept": probe.known(partial(keeper, name, one["ifindex"]))}  # fmt: skip
    return told


def process(pattern):
    """Return the number and the line of the first process whose line matches, None for both if there is none."""
    found = re.search(rf"^ *(\d+) ({pattern})$", output("ps", "-eo", "pid,args"), re.MULTILINE)
    return found.groups() if found else (None, None)


def swap():
    now, files = probe.read("/proc/sys/vm/swappiness"), [file for pattern in SYSCTL for file in glob.glob(pattern)]
    set_in = [re.findall(r"^\s*vm[./]swappiness\s*=\s*(\d+)", probe.read(file), re.MULTILINE) for file in files]
    kept = now == "60" or any(now in values for values in set_in)
    return {"total": int(probe.field("/proc/meminfo", "SwapTotal")) * 1024, "swappiness": int(now), "kept": kept}


def main():
    asked = json.loads(sys.argv[1])
    folder = Path.home() / os.path.expanduser(asked["folder"])
    env = settings(asked["given"], asked["defaults"], folder)
    told, probe.SYS = {"settings": env, "folder": str(folder), "hostname": platform.node()}, env["SYSFS"]
    hub = f"{env['HF_CACHE']}/hub"
    caches = [f"{env['CACHE_DIR']}/{name}" for name in ("node-ray", "flashinfer", "vllm", "triton")]
    model = (env["MODEL_CKPT"] or "/").partition("/")[0]  # nothing, or a folder: no checkpoint of the hub
    facts = {
        "docker": engine,
        "image": lambda: docker_id("image", env["VLLM_IMAGE"]),
        "base": lambda: docker_id("image", env["BASE_IMAGE"]),
        "node": lambda: docker_id("container", "node-ray"),
        "nvidia": lambda: bool(shutil.which("nvidia-container-runtime-hook")) or "nvidia" in str(told["docker"]),
        "gpus": probe.gpus,
        "driver": lambda: told["gpus"][0]["driver"] if "unknown" not in told["gpus"] else told["gpus"],
        "kernel": platform.release,
        "links": lambda: links(env["PRIMARY_IF"]),
        "repository": lambda: repository.repository_digest(folder) if (folder / "tasks.py").exists() else None,
        "sshd": lambda: (at := process(r"sshd: .*\[listener\].*")[0]) and int(probe.read(f"/proc/{at}/oom_score_adj")),
        "earlyoom": lambda: process(r"\S*earlyoom( .*)?")[1],
        "swap": swap,
        "synchronized": lambda: output("timedatectl", "show", "-p", "NTPSynchronized", "--value") == "yes",
        "time": time.time,
        "root": lambda: disk(told["docker"].get("DockerRootDir") or "/var/lib/docker"),
        "disk": lambda: {place: disk(place) for place in (env["HF_CACHE"], *caches)},
        "ports": lambda: re.findall(r":(\d+) ", output("ss", "-Hltn")),
        "env": lambda: private(folder / ".env", asked["key"]),
        "token": lambda: private(env["RAY_AUTH_TOKEN_PATH"], asked["key"]),
        "weights": lambda: weights.look(hub, env["MODEL_CKPT"], env["REVISION"] or "") if model else None,
    }  # fmt: skip
    for name, ask in facts.items():
        if not asked["names"] or name in (*asked["names"], "docker"):
            told[name] = probe.known(ask)
    print(json.dumps(told))
