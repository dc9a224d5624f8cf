"""One model's checkpoint in the Hugging Face cache of one node: weights.py fetch|verify|receive MODEL REVISION.

`look` only reads names, sizes and headers, so the probe and the host call it as well. The other functions run in the
image as root, because root owns the cache. They delete nothing, and a file gets its final name when it is whole.
"""

import hashlib
import json
import os
import re
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatch
from pathlib import Path

HUB = "/root/.cache/huggingface/hub"
INDEX = "model.safetensors.index.json"
# Copies of the same weights in other formats. vLLM loads consolidated*.safetensors if the hub has any, else the other
# safetensors, and only without them one of these (default_loader.py of 0.32).
COPIES = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*")
# Files that a ship has begun. The hub's client leaves them alone.
PART = ".ship.incomplete"
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
CHUNK = 2**22
# The hub's client waits for ever for the list of files if a proxy takes the connection and says nothing.
ANSWER_S = 30
# What to do about the errors of huggingface_hub.
LATER = "Check the network, HF_ENDPOINT and the disk (df -h); then type the same line again: whole files stay."
NEXT = {
    "GatedRepoError": "Ask for access on the model's page of the hub, and set HF_TOKEN in .env.",
    "RepositoryNotFoundError": "Is MODEL_CKPT right? A model that is private needs HF_TOKEN in .env.",
    "RevisionNotFoundError": "Is REVISION right? It takes a branch, a tag or a commit of the model.",
}


def folder_of(hub, model):
    return Path(hub) / f"models--{model.replace('/', '--')}"


def record_of(folder, commit):
    """Return the file in which `fetch` keeps what the hub says of each file."""
    return folder / ".node-weights" / f"{commit}.json"


def look(hub, model, revision=""):
    """Return what the cache has of one revision: a commit, or a branch or tag by its ref (main if it is empty).

    revision: the commit, None if the cache has no snapshot of it. files: bytes by name. missing: names that the index,
    the hub's list or a dangling link promises. wrong: sentences. bad: the files behind them, below the hub's folder.
    blobs: bytes by blob, of every revision. parts: the same of a ship that was cut. have, total, unfinished, free are
    bytes; total is None if nothing says it.
    """
    folder, name = folder_of(hub, model), revision or "main"
    ref = folder / "refs" / name
    commit = ref.read_text().strip() if ref.is_file() else name
    snapshot = folder / "snapshots" / commit
    disk = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))
    blobs = {path.name: path.stat().st_size for path in folder.glob("blobs/*") if path.exists()}
    unfinished = {name: blobs.pop(name) for name in [*blobs] if name.endswith(".incomplete")}
    parts = {name.removesuffix(PART): size for name, size in unfinished.items() if name.endswith(PART)}
    told = {"revision": commit, "files": {}, "missing": [], "wrong": [], "bad": [], "have": 0, "total": None,
            "unfinished": sum(unfinished.values()), "free": disk.f_bavail * disk.f_frsize,
            "blobs": blobs, "parts": parts}  # fmt: skip
    if not snapshot.is_dir():
        return told | {"revision": None}

    files, missing = told["files"], set()
    for path in sorted(path for path in snapshot.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = str(path.relative_to(snapshot))
        if not path.exists() or not path.resolve().is_relative_to(Path(hub).resolve()):
            missing.add(name)  # a container sees nothing outside of the cache
        else:
            files[name] = path.stat().st_size
    promised = record_of(folder, commit)
    sizes = {name: one["size"] for name, one in (_read(promised) if promised.exists() else {}).items()}
    weights, total = set(), 0
    if INDEX in files:
        index = _read(snapshot / INDEX)
        weights, total = {*index["weight_map"].values()}, index.get("metadata", {}).get("total_size", 0)
    for name in {*files} if not weights else ():  # vLLM fetches the index after the shards
        if shard := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name):
            weights |= {f"{shard[1]}-{number:05}-of-{shard[2]}.safetensors" for number in range(1, int(shard[2]) + 1)}
    if not (weights or missing or sizes or any(name.endswith(WEIGHTS) for name in files)):
        return told | {"revision": None, "files": {}}  # vLLM fetches config.json first: nothing is damaged yet
    told["missing"] = sorted((missing | weights | (sizes.keys() or {"config.json"})) - files.keys())
    for name, size in files.items():
        tensors = safetensors_size(snapshot / name) if name.endswith(".safetensors") else None
        if size != (expected := sizes.get(name, size if tensors is None else tensors)) or tensors == 0:
            why = "and no header of a safetensors file" if tensors == 0 else f"and should have {expected:,}"
            told["wrong"].append(f"{name} has {size:,} bytes {why}")
            told["bad"].append(str((snapshot / name).resolve().relative_to(Path(hub).resolve())))
    told["have"] = sum(files.values())
    told["total"] = sum(sizes.values()) or (max(total, told["have"]) if total or not told["missing"] else None)
    return told


def safetensors_size(path):
    """Return the bytes that a safetensors file should have, by its header. 0: the header is not one."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header = json.loads(file.read(min(length, 10**8)))
            ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, AttributeError, TypeError):
            return 0
    return 8 + length + max(ends, default=0)


def _read(path):
    return json.loads(path.read_text())


def _print(**told):
    print(json.dumps(told), flush=True)


# --- Fetching --------------------------------------------------------------------------------------------------------


def fetch(hub, model, revision):
    """Download the files that vLLM loads, one after the other, so that a cut costs one file at most.

    Prints the bytes so far and of all files each second, and the commit at the end.
    """
    os.environ |= dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"), "1")
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(model, revision=revision or "main", files_metadata=True, timeout=ANSWER_S)
    tensors = any(one.rfilename.endswith(".safetensors") for one in info.siblings)
    wanted = [one for one in info.siblings if not (tensors and any(fnmatch(one.rfilename, copy) for copy in COPIES))]
    sums = {one.rfilename: {"size": one.size, "hash": one.lfs.sha256 if one.lfs else one.blob_id} for one in wanted}
    folder, total = folder_of(hub, model), sum(one.size for one in wanted)
    _write(record_of(folder, info.sha), json.dumps(sums))
    etags = {one["hash"] for one in sums.values()}

    def progress():
        while True:
            names = {path.name: path.stat().st_size for path in folder.glob("blobs/*") if path.exists()}
            done = sum(size for name, size in names.items() if name.partition(".")[0] in etags and PART not in name)
            _print(done=min(done, total), total=total, revision=info.sha)
            time.sleep(1)

    threading.Thread(target=progress, daemon=True).start()
    for name in sums:
        hf_hub_download(model, name, revision=info.sha, cache_dir=hub)
    if revision != info.sha:  # a commit needs no ref
        _write(folder / "refs" / (revision or "main"), info.sha)
    _print(done=total, total=total, revision=info.sha)


def _write(path, text):
    """Write a file under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


# --- Checking every byte ---------------------------------------------------------------------------------------------


def listing(hub, model, commit):
    """Return size and hash of each file of a snapshot by name: from the hub's list, or from the names of its blobs."""
    folder, record = folder_of(hub, model), record_of(folder_of(hub, model), commit)
    if record.exists():
        return _read(record)
    paths = {name: folder / "snapshots" / commit / name for name in look(hub, model, commit)["files"]}
    links = {name: os.path.basename(os.readlink(path)) if path.is_symlink() else "" for name, path in paths.items()}
    return {name: {"size": path.stat().st_size, "hash": links[name]} for name, path in paths.items()}


def verify(hub, model, revision):
    """Read every byte of a snapshot. Compare it with the hub's sha256, or with git's sha1 of a small file.

    Prints the bytes so far, and at the end what is wrong.
    """
    folder, told = folder_of(hub, model), look(hub, model, revision)
    sums, done, bad = listing(hub, model, told["revision"]), {}, []

    def judge(name):
        path = folder / "snapshots" / told["revision"] / name
        if not (expected := sums.get(name, {}).get("hash")):
            return f"{name} cannot be compared: nothing here says its hash"
        hashed = hasher(expected, told["files"][name])
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                hashed.update(chunk)
                done[name] = file.tell()
        if hashed.hexdigest() == expected:
            return ""
        bad.append(str(path.resolve().relative_to(Path(hub).resolve())))
        return f"{name} is damaged"

    with ThreadPoolExecutor(4) as pool:
        judged = [pool.submit(judge, name) for name in told["files"]]
        while wait(judged, 1).not_done:
            _print(done=sum(done.values()), total=told["have"])
    wrong = [text for one in judged if (text := one.result())]
    _print(done=told["have"], total=told["have"], wrong=wrong, bad=bad)


def hasher(expected, size):
    """Return the hash of LFS files (64 digits), or that of git's blobs (40 digits)."""
    return hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % size)


# --- Receiving -------------------------------------------------------------------------------------------------------


def receive(hub, model, _revision, source=sys.stdin.buffer):
    """Read frames from the head: a line of JSON each, and behind a file's line its bytes.

    A file's line has its path below the model's folder, its size, `start`, where an earlier ship was cut, and its hash.
    The other lines are links and small texts, and come last.
    """
    folder = folder_of(hub, model)
    for line in source:
        frame = json.loads(line)
        path = Path(os.path.normpath(folder / frame["path"]))
        if not path.is_relative_to(folder):
            raise ValueError(f"{frame['path']} leaves the folder of the model")
        path.parent.mkdir(parents=True, exist_ok=True)
        if "to" in frame:
            if not path.is_symlink():
                path.symlink_to(frame["to"])
        elif "text" in frame:
            _write(path, frame["text"])
        else:
            _receive_file(source, frame, path)


def _receive_file(source, frame, path):
    part, size, start = path.with_name(path.name + PART), frame["size"], frame["start"]
    if start == size and path.exists():  # another revision has brought it
        return
    hashed = hasher(frame["hash"], size)
    with open(part, "r+b" if part.exists() else "w+b") as file:
        for left in range(start, 0, -CHUNK):
            hashed.update(file.read(min(CHUNK, left)))
        file.truncate()
        while file.tell() < size:
            if not (chunk := source.read(min(CHUNK, size - file.tell()))):
                raise EOFError(f"the head has stopped in the middle of {path.name}")
            file.write(chunk)
            hashed.update(chunk)
        if frame["hash"] and hashed.hexdigest() != frame["hash"]:
            file.truncate(0)
            raise ValueError(f"{path.name} has arrived with another hash than its name says")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _leave_with_caller():
    """End when standard input ends: `docker run` hands no SIGKILL of its own on."""
    while os.read(0, 4096):  # a buffered read would hold a lock that Python wants at its end
        pass
    os._exit(1)


if __name__ == "__main__":
    act = {"fetch": fetch, "verify": verify, "receive": receive}[sys.argv[1]]
    if act is not receive:
        threading.Thread(target=_leave_with_caller, daemon=True).start()
    try:
        act(HUB, *sys.argv[2:])
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).partition("\n")[0]
        sys.exit(f"{text.rstrip('.')}. {NEXT.get(type(error).__name__, LATER)}")
