"""Print facts of this host as JSON: `python3 - ASKED`, on a host that has nothing of this repository yet.

cluster/doctor.py sends this module with probe.py, weights.py and repository.py as one text. ASKED is JSON: `given` and
`defaults` are settings by name, `folder` is where the checkout should be, `names` are the facts, all if it is empty. A
fact that cannot be asked is {"unknown": REASON}.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import probe

SECONDS = 20


def settings(given, defaults, folder):
    """Return what holds on this host: what the head hands on, then the shell, then the checkout's `.env`."""
    file, own = Path(os.environ.get("ENV_FILE", f"{folder}/.env") or os.devnull), {}
    if file.exists():
        lines = re.findall(r"^\s*(?:export\s+)?(\w+)\s*=(.*)", file.read_text(), re.MULTILINE)
        own = {name: " ".join(shlex.split(text, comments=True)) for name, text in lines}
    found = {**defaults, **own, **os.environ, **given}
    return {name: found[name] and os.path.expanduser(found[name]) for name in defaults}


def docker(*words):
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout)


def engine():
    told = docker("info", "--format", "{{json .}}")
    if errors := told.get("ServerErrors"):  # an older docker then ends with 0
        raise RuntimeError(errors[0])
    names = ("ServerVersion", "CgroupDriver", "Runtimes", "DiscoveredDevices", "DockerRootDir")
    return {name: told.get(name) for name in names}


def image(name):
    """Return the id of an image, None if Docker lacks the image."""
    try:
        return docker("image", "inspect", name)[0]["Id"]
    except RuntimeError as error:
        if "No such image" in str(error):
            return None
        raise


def digest(folder):
    import repository

    return repository.repository_digest(folder) if (folder / "tasks.py").exists() else None


def private(path, key):
    """Return the mode of a file and the hash of its text, None if there is no file."""
    if not os.path.lexists(path):
        return None
    return {"mode": os.stat(path).st_mode & 0o777, "hash": probe.known(lambda: probe.hidden(key, probe.read(path)))}


def weights(env):
    if not env["MODEL_CKPT"] or os.path.isabs(env["MODEL_CKPT"]):
        return None
    import weights

    return weights.look(f"{env['HF_CACHE']}/hub", env["MODEL_CKPT"], env["REVISION"] or "")


def free(folders):
    """Return the free bytes of each folder's disk. A folder that is missing counts as the one above it."""
    places = {folder: next(one for one in (Path(folder), *Path(folder).parents) if one.exists()) for folder in folders}
    disks = {folder: (os.statvfs(place), os.stat(place).st_dev) for folder, place in places.items()}
    return {folder: {"free": disk.f_bavail * disk.f_frsize, "disk": number} for folder, (disk, number) in disks.items()}


def main():
    asked = json.loads(sys.argv[1])
    folder = Path.home() / os.path.expanduser(asked["folder"])
    env, told = settings(asked["given"], asked["defaults"], folder), {}
    env["HF_CACHE"] = env["HF_CACHE"] or f"{env['CACHE_DIR']}/huggingface"
    root = lambda: told["docker"].get("DockerRootDir") or "/var/lib/docker"  # noqa: E731 - it is asked once Docker was
    facts = {
        "settings": lambda: env,
        "docker": engine,
        "image": partial(image, env["VLLM_IMAGE"]),
        "base": partial(image, env["BASE_IMAGE"]),
        "repository": partial(digest, folder),
        "token": partial(private, env["RAY_AUTH_TOKEN_PATH"], asked["key"]),
        "weights": partial(weights, env),
        "disk": lambda: free([root(), env["CACHE_DIR"], env["HF_CACHE"]]),
    }
    for name, ask in facts.items():
        if not asked["names"] or name in asked["names"] or name == "docker":
            told[name] = probe.known(ask)
    print(json.dumps(told))
