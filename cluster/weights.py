"""The checkpoint of a model on every node: fetched on the head, shipped to the workers, and verified everywhere.

The Hugging Face cache belongs to root, so inside/weights.py writes it in a container. Nothing is deleted, and whoever
types the same line again goes on where the last one stopped. Functions here raise Exit.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from invoke import Exit

from cluster.command import Command, pipe, render, run, say, tell
from cluster.inside.weights import folder_of, listing, look
from cluster.node import HF_CACHE, INSIDE, mounts
from cluster.remote import at_once, over_ssh, run_there, workers_needed
from cluster.repository import ROOT
from cluster.settings import ModelSettings
from cluster.transfer import GB, Bars, transferring

Files: TypeAlias = Mapping[str, Mapping[str, Any]]
HERE = "this node"
CHUNK = 2**22
# A disk without room would stop Docker and the logs as well.
SPARE = 5 * GB
# A look reads names, sizes and headers.
LOOK_S = 60
# The hub's address, its token and the proxies. Docker leaves out a name that is not set.
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


# --- Its commands ----------------------------------------------------------------------------------------------------


def container_command(settings: ModelSettings, act: str, revision: str) -> Command:
    """Return the command that fetches, verifies or receives in a container, for the cache of this node."""
    endpoint, token = settings.get("HF_ENDPOINT"), settings.get("HF_TOKEN")
    by_name = [*(["HF_TOKEN"] if act == "fetch" else []), *(["HF_ENDPOINT"] if endpoint else []), *PROXIES]
    lines = render(
        "weights.j2", act=act, checkpoint=settings["MODEL_CKPT"], revision=revision, image=settings["VLLM_IMAGE"],
        folder=mounts(settings)[HF_CACHE], hf_cache=HF_CACHE, inside=INSIDE, scripts=ROOT / "cluster/inside",
        by_name=by_name if act == "fetch" else [],
    )  # fmt: skip
    env = {"HF_ENDPOINT": endpoint} if endpoint and act == "fetch" else {}
    secrets = {"HF_TOKEN": token} if token and act == "fetch" else {}
    return Command(lines, HERE, env=env, secrets=secrets, alias=f"the container that is to {act} the weights")


def folder_command(settings: ModelSettings) -> Command:
    """Make the cache's folder. Docker would make it too, and root would own it."""
    return Command(render("cache_folders.j2", folders=[mounts(settings)[HF_CACHE]]), HERE)


def worker_command(settings: ModelSettings, host: str, revision: str, *flags: str, fast: bool = False) -> Command:
    """Return the command that runs `inv weights` on a worker for one revision."""
    handed_on = settings.handed_on() | {"MODEL_CKPT": settings["MODEL_CKPT"]}  # the .env there may name another
    values = {"handed_on": handed_on, "model": settings.model.name, "revision": revision, "flags": flags}
    return over_ssh(settings, host, "remote_weights.j2", values, fast=fast, reads=True)


def weights_commands(settings: ModelSettings) -> list[Command]:
    """Return the commands of `inv weights` where no worker has the checkpoint."""
    revision = settings["REVISION"] or "main"
    ships = [worker_command(settings, host, revision, "--receive", fast=True) for host in workers_needed(settings)]
    return [folder_command(settings), container_command(settings, "fetch", settings["REVISION"]), *ships]


def receive_commands(settings: ModelSettings) -> list[Command]:
    """Return the commands of a worker to which the head ships."""
    return [folder_command(settings), container_command(settings, "receive", settings["REVISION"])]


# --- This node -------------------------------------------------------------------------------------------------------


def hub_folder(settings: ModelSettings) -> Path:
    return Path(mounts(settings)[HF_CACHE]) / "hub"


def look_here(settings: ModelSettings, revision: str | None = None) -> dict[str, Any]:
    """Return what the cache of this node has, as `look` in inside/weights.py says, and the folder of that cache."""
    hub, revision = hub_folder(settings), settings["REVISION"] if revision is None else revision
    return look(hub, settings["MODEL_CKPT"], revision) | {"hub": str(hub)}


def is_whole(told: Mapping[str, Any]) -> bool:
    return bool(told["revision"]) and not told["missing"] and not told["wrong"]


def tell_here(settings: ModelSettings, deep: bool) -> None:
    """Print what this node has as JSON. deep: then the progress of reading every byte, and what is wrong."""
    told = look_here(settings)
    tell(json.dumps(told))
    if deep and told["revision"]:
        with pipe(container_command(settings, "verify", told["revision"])) as lines:
            for line in lines:
                tell(line.decode().rstrip())


# --- All nodes -------------------------------------------------------------------------------------------------------


def provide_weights(settings: ModelSettings, deep: bool) -> None:
    """Fetch the checkpoint here, ship it to the workers that the model needs, and verify it on every node.

    A node that fails does not keep the others from getting all files. deep: read every byte.
    """
    if settings["MODEL_CKPT"].startswith("/"):
        raise Exit(f"MODEL_CKPT is {settings['MODEL_CKPT']}, a folder: only models of the hub are fetched.")
    begun, workers = time.monotonic(), workers_needed(settings)
    told: dict[str, dict[str, Any]] = {HERE: look_here(settings)}
    failed: dict[str, str] = at_once(workers, lambda host: told.update({host: ask_worker(settings, host, "")}))
    # Names of damaged files look finished, so nobody would fetch these files again.
    if lines := [damage(node, one) for node, one in told.items() if one["bad"]]:
        raise Exit("\n".join([*lines, f"Then: {settings.line()}"]))
    run(folder_command(settings))
    with transferring() as bars:
        revision = fetch(settings, told, bars)
        files = listing(hub_folder(settings), settings["MODEL_CKPT"], revision)
        refuse_full_disks(told, revision, files, 0)  # a hub that was not asked has not led here
        reached = [host for host in workers if host not in failed]
        failed |= at_once(reached, lambda host: ship(settings, host, told[host], revision, files, bars))
        nodes = [HERE, *(host for host in reached if host not in failed)]
        seen: dict[str, dict[str, Any]] = {}
        failed |= at_once(nodes, lambda node: seen.update({node: verify_node(settings, node, revision, deep, bars)}))
    failed |= {node: damage(node, one) for node, one in seen.items() if one["wrong"]}
    size = sum(one["size"] for one in files.values()) / GB
    well = [node for node in nodes if node not in failed]
    how = "every byte compared" if deep else "names and sizes compared; --deep reads every byte"
    whole = f"whole on {', '.join(well) or 'no node'} ({how})"
    seconds = f"after {time.monotonic() - begun:.0f} s"
    say(f"{settings['MODEL_CKPT']} {revision}: {size:.2f} GB, {len(files)} files, {whole}, {seconds}.")
    if failed:
        raise Exit("\n".join(failed.values()) + f"\nThen type the same line again: {settings.line()}")
    if settings["REVISION"] and settings.origin("REVISION").startswith("flag"):
        say(f"To serve this revision, set REVISION={settings['REVISION']} in .env.")
    say(f"Next: {settings.line('up')}")


def ask_worker(settings: ModelSettings, host: str, revision: str) -> dict[str, Any]:
    """Return what the cache of a worker has. Raises Exit with the worker's own words."""
    command = worker_command(settings, host, revision or settings["REVISION"] or "main", "--here")
    return json.loads(run_there(host, command, LOOK_S).splitlines()[-1])


def damage(node: str, told: Mapping[str, Any]) -> str:
    """Return what is wrong on a node, with the line that removes the damaged files there."""
    files = shlex.join(f"{told['hub']}/{file}" for file in told["bad"])
    return f"{node}: {'; '.join(told['wrong'])}.{f' Type there: sudo rm {files}' if files else ''}"


def fetch(settings: ModelSettings, told: dict[str, dict[str, Any]], bars: Bars) -> str:
    """Fetch what the hub has and this node lacks. Return the commit. A whole checkpoint needs no hub."""
    here = told[HERE]
    if is_whole(here) and here["revision"] == settings["REVISION"]:
        return here["revision"]
    revision, asked = "", False
    try:
        with pipe(container_command(settings, "fetch", settings["REVISION"])) as lines:
            for line in map(json.loads, lines):
                if not asked:
                    files = listing(hub_folder(settings), settings["MODEL_CKPT"], line["revision"])
                    refuse_full_disks(told, line["revision"], files, line["total"] - line["done"])
                asked, revision = True, line["revision"]
                bars.show(f"{HERE}, fetched", line["done"], line["total"])
    except Exit as error:
        if asked or not is_whole(here):
            raise
        say(f"{error.message}\nThe cache has revision {here['revision']}, which is whole: it is used.")
        return here["revision"]
    return revision


def refuse_full_disks(told: Mapping[str, Mapping[str, Any]], revision: str, files: Files, here: int) -> None:
    """Refuse disks that have no room for what is to come. here: the bytes that this node has to fetch."""
    to_come = {node: sum(left_to_send(one, revision, files).values()) for node, one in told.items()} | {HERE: here}
    short = [
        f"{node}: {lacks / GB:.1f} GB are to come and 5 GB have to stay, but only {free / GB:.1f} GB are free"
        for node, lacks in to_come.items()
        if lacks and lacks + SPARE > (free := told[node]["free"])
    ]
    if short:
        raise Exit("\n".join([*short, "Nothing was copied. Type there: df -h; HF_CACHE may name a larger disk."]))


def left_to_send(there: Mapping[str, Any], revision: str, files: Files) -> dict[str, int]:
    """Return the files of a revision that a node lacks, each with the bytes to send.

    A blob that another revision has brought needs a link only, and a part of a ship that was cut only the rest.
    """
    named = there["files"] if there["revision"] == revision else {}
    had = {name: there["parts"].get(one["hash"], 0) for name, one in files.items()}
    had |= {name: one["size"] for name, one in files.items() if there["blobs"].get(one["hash"]) == one["size"]}
    return {name: one["size"] - had[name] for name, one in files.items() if named.get(name) != one["size"]}


# --- Shipping --------------------------------------------------------------------------------------------------------


def ship(settings: ModelSettings, host: str, told: Mapping[str, Any], revision: str, files: Files, bars: Bars) -> None:
    """Send a worker the files that it lacks, and the name of the revision. told: what that name stands for there."""
    lacking = left_to_send(ask_worker(settings, host, revision), revision, files)
    if not lacking and told["revision"] == revision:
        return
    total, done = sum(lacking.values()), 0
    record = {"path": f".node-weights/{revision}.json", "text": json.dumps(files)}
    name = settings["REVISION"] or "main"
    with pipe(worker_command(settings, host, revision, "--receive", fast=True), into=True) as sink:
        write_frame(sink, record)  # without it a ship that is cut could look whole
        for file, left in lacking.items():
            for sent in send_file(sink, settings, revision, file, files[file], left):
                bars.show(f"{host}, shipped", done + sent, total)
            done += left
        write_frame(sink, {"path": f"refs/{name}", "text": revision} if name != revision else record)


def send_file(
    sink: BinaryIO, settings: ModelSettings, revision: str, name: str, one: Mapping[str, Any], left: int
) -> Iterator[int]:
    """Send the last bytes of a file as a blob, and its link. Yield the bytes so far."""
    path = folder_of(hub_folder(settings), settings["MODEL_CKPT"]) / "snapshots" / revision / name
    link = f"snapshots/{revision}/{name}"
    place = f"blobs/{one['hash']}" if one["hash"] else link  # a cache without links names no hash
    start = one["size"] - left
    write_frame(sink, {"path": place, "size": one["size"], "start": start, "hash": one["hash"]})
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            sink.write(chunk)
            yield file.tell() - start
    if place != link:
        write_frame(sink, {"path": link, "to": "../" * link.count("/") + place})


def write_frame(sink: BinaryIO, frame: Mapping[str, Any]) -> None:
    sink.write(json.dumps(frame).encode() + b"\n")


def verify_node(settings: ModelSettings, node: str, revision: str, deep: bool, bars: Bars) -> dict[str, Any]:
    """Return what a node has of a revision. What is missing is wrong, too."""
    local = node == HERE
    told = look_here(settings, revision) if local else ask_worker(settings, node, revision)
    missing = told["missing"] if told["revision"] else [f"revision {revision}"]
    told["wrong"] += [f"{name} is missing" for name in missing]
    if told["wrong"] or not deep:
        return told
    with pipe(container_command(settings, "verify", revision) if local else
              worker_command(settings, node, revision, "--here", "--deep")) as lines:  # fmt: skip
        for line in map(json.loads, lines):
            if "done" in line:
                bars.show(f"{node}, verified", line["done"], line["total"])
                told |= line
    return told
