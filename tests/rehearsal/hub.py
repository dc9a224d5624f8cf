"""A small hub: it speaks as much of Hugging Face's download API as the image's huggingface_hub and vLLM ask for.

`hub.py FOLDER ADDRESS PORT` serves FOLDER/<owner>/<model>/… as the revision main. Large files are LFS files. Each
request is a line of FOLDER/requests. FOLDER/orders is read at each request: {"cut": {name: bytes}} closes the
connection after so many bytes of a file, once; {"rate": bytes a second} slows files down; {"token": TOKEN} asks for it.
`checkpoint` makes a model of real safetensors files.
"""

import hashlib
import json
import random
import re
import struct
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.repository import ROOT
from rehearsal import model
from rehearsal.hosts import Host
from rehearsal.shell import wait

NAME = "stand-in/tiny"
PORT = 8080
LFS = 10_000  # bytes from which a file is an LFS file


# --- The model -------------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, shards: int = 3, padding: int = 0) -> None:
    """Write the tiny model with random weights in shards and an index. padding: the bytes of one more, large file."""
    model.write(folder)
    config = json.loads((folder / "config.json").read_text())
    wide, inner, heads = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, keys = config["num_attention_heads"] * heads, config["num_key_value_heads"] * heads
    layer = {
        "self_attn.q_proj": (query, wide), "self_attn.k_proj": (keys, wide), "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, query), "self_attn.q_norm": (heads,), "self_attn.k_norm": (heads,),
        "mlp.gate_proj": (inner, wide), "mlp.up_proj": (inner, wide), "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,), "post_attention_layernorm": (wide,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config["vocab_size"], wide), "norm": (wide,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    tensors = [(f"model.{name}.weight", shape) for name, shape in shapes.items()]
    bounds = [len(tensors) * at // shards for at in range(shards + 1)]
    index = {}
    for at, (first, last) in enumerate(pairwise(bounds), 1):
        file = f"model-{at:05}-of-{shards:05}.safetensors"
        (folder / file).write_bytes(safetensors(tensors[first:last], seed=at))
        index |= dict.fromkeys([name for name, _ in tensors[first:last]], file)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    if padding:
        (folder / "padding.dat").write_bytes(random.Random(1).randbytes(padding))


def safetensors(tensors: list[tuple[str, tuple[int, ...]]], seed: int) -> bytes:
    """Return a safetensors file of small random numbers in bfloat16, the upper half of a float32."""
    header, body, numbers = {}, b"", random.Random(seed)
    for name, shape in tensors:
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = struct.pack(f"<{count}f", *(numbers.uniform(-0.05, 0.05) for _ in range(count)))
        data = b"".join(values[at + 2 : at + 4] for at in range(0, len(values), 4))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    return struct.pack("<Q", len(text)) + text + body


# --- The hub, as a test uses it --------------------------------------------------------------------------------------


class Hub:
    """A hub on a stand-in's own address. It ends with the test's thread."""

    def __init__(self, host: Host, folder: Path, padding: int = 0) -> None:
        self.folder, self.model = folder, folder / NAME
        self.url = f"http://{host.address}:{PORT}"
        checkpoint(self.model, padding=padding)
        words = (sys.executable, __file__, str(folder), host.address, str(PORT))
        self.process = host.popen(*words, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        assert wait(lambda: host.run("curl", "-sf", self.url).returncode == 0, 20)
        self.forget()

    def order(self, **orders) -> None:
        (self.folder / "orders").write_text(json.dumps(orders))

    def forget(self) -> None:
        """Forget the requests so far."""
        (self.folder / "requests").write_text("")

    def requests(self, what: str = "") -> list[str]:
        """Return the requests that contain this text, each as a method and a path."""
        return [line for line in (self.folder / "requests").read_text().splitlines() if what in line]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


# --- The server ------------------------------------------------------------------------------------------------------


def serve(folder: Path, address: str, port: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with (folder / "requests").open("a") as log:
                log.write(f"{self.command} {self.path} {self.headers.get('Range', '')}\n")
            orders = json.loads((folder / "orders").read_text()) if (folder / "orders").exists() else {}
            if (token := orders.get("token")) and self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer(
                    401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
                )
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
                name, kind, revision = match.groups()
                files = listed(folder / name)
                if not files:
                    return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                if revision not in (None, "main", commit(files)):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                whole = [tree_entry(*one) for one in files.items()] if kind == "tree" else info(name, files)
                return self.answer(200, json.dumps(whole).encode(), {"Content-Type": "application/json"})
            if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
                files = listed(folder / match[1])
                if match[3] in files and match[2] in ("main", commit(files)):
                    return self.send_file(folder / match[1], match[3], files, orders)
                code = "EntryNotFound" if files else "RepoNotFound"
                return self.answer(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit(files)})
            self.answer(200 if path == "/" else 404, b"")

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def send_file(self, at: Path, name: str, files: dict, orders: dict) -> None:
            size, sha = files[name]["size"], files[name]["sha256"] or files[name]["git"]
            start = int(re.sub(r"\D", "", self.headers.get("Range", "0").partition("-")[0]) or 0)
            headers = {"ETag": f'"{sha}"', "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(size),
                       "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}  # fmt: skip
            self.send_response(206 if start else 200)
            if start:
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            for key, value in {**headers, "Content-Length": str(size - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            stop = orders.get("cut", {}).get(name)
            done = folder / f"cut {name}".replace("/", " ")
            with (at / name).open("rb") as file:
                file.seek(start)
                while chunk := file.read(2**16):
                    if stop is not None and file.tell() > stop and not done.exists():
                        done.touch()
                        self.close_connection = True
                        return
                    self.wfile.write(chunk)
                    if rate := orders.get("rate"):
                        time.sleep(len(chunk) / rate)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer((address, port), Handler).serve_forever()


def listed(folder: Path) -> dict[str, dict]:
    """Return the size and the hashes of each file of a model by name."""
    told = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            told[str(path.relative_to(folder))] = hashes(path, path.stat().st_size, path.stat().st_mtime_ns)
    return told


_hashes: dict[tuple, dict] = {}


def hashes(path: Path, size: int, changed: int) -> dict:
    if (path, size, changed) not in _hashes:
        body = path.read_bytes()
        sha = hashlib.sha256(body).hexdigest() if size >= LFS else None
        git = hashlib.sha1(b"blob %d\0" % size + body).hexdigest()
        _hashes[path, size, changed] = {"size": size, "git": git, "sha256": sha}
    return _hashes[path, size, changed]


def commit(files: dict[str, dict]) -> str:
    return hashlib.sha1(json.dumps(files).encode()).hexdigest()


def info(name: str, files: dict[str, dict]) -> dict:
    """The answer of /api/models: also what huggingface_hub reads of it by name."""
    siblings = [
        {"rfilename": path, "size": one["size"], "blobId": one["git"], **lfs(one, "sha256")}
        for path, one in files.items()
    ]
    return {"id": name, "_id": "0", "modelId": name, "sha": commit(files), "private": False, "tags": [], "downloads": 0,
            "likes": 0, "siblings": siblings}  # fmt: skip


def tree_entry(path: str, one: dict) -> dict:
    return {"type": "file", "path": path, "size": one["size"], "oid": one["git"], **lfs(one, "oid")}


def lfs(one: dict, key: str) -> dict:
    return {"lfs": {key: one["sha256"], "size": one["size"], "pointerSize": 134}} if one["sha256"] else {}


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
