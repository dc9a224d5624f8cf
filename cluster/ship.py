"""The image of this node on other hosts: `docker save` here, `docker load` there.

A host that has the first layers of the image, such as its base, gets a stream without them. Docker takes the others
from that stream, and keeps nothing of a stream that is cut. No copy is written on the way. Functions here raise Exit.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from os.path import commonprefix
from shutil import copyfileobj
from typing import IO, BinaryIO

from invoke import Exit

from cluster.command import Command, pipe, render, run, say, words_of
from cluster.image import image_line
from cluster.remote import SSH_FAILED, at_once, run_there, ssh_command
from cluster.settings import Settings
from cluster.transfer import Bars, transferring

CHUNK = 2**20
LAYERS = "{{.Id}} {{.Size}} {{json .RootFS}}"


def shipped_image(settings: Settings) -> str:
    """Return the image that build-image has just made, or the one that the nodes run."""
    return settings.get("TAG", settings["VLLM_IMAGE"])


def ship_commands(settings: Settings) -> list[Command]:
    """Return the two ends of the stream to each host."""
    save = replace(save_command(shipped_image(settings)), where="this node; `docker load` reads its output")
    return [save, *(load_command(settings, host) for host in settings.workers())]


def load_command(settings: Settings, host: str) -> Command:
    return ssh_command(settings, host, words_of(render("docker_load.j2")), reads=True, fast=True)


def ship_image(settings: Settings) -> None:
    """Bring the image to all workers at once. A host that fails keeps no other from the image."""
    name, hosts = shipped_image(settings), settings.workers()
    if not hosts:
        return say("No worker gets the image: WORKER_HOSTS names none.")
    inspect = render("image_inspect.j2", image=name, format=LAYERS)
    try:
        image_id, size, told = run(Command(inspect), capture=True).split(" ", 2)
    except Exit as error:
        raise Exit(f"{error.message}\nTo get the image: {image_line(settings, has=False)}") from None
    layers = json.loads(told)["Layers"]
    common: dict[str, int] = {}  # how many of the first layers a host has

    def look(host: str) -> None:
        has = images_there(settings, host)
        if has.get(image_id) == layers:
            ask_there(settings, host, render("docker_tag.j2", image=image_id, tag=name))
            return say(f"{host} has {name} already ({image_id[:19]}).")
        common[host] = max((len(commonprefix([layers, theirs])) for theirs in has.values()), default=0)

    def taken(host: str) -> str:
        there_id = ask_there(settings, host, render("image_inspect.j2", image=name, format="{{.Id}}"))
        return there_id if images_there(settings, host).get(there_id) == layers else ""

    def ship(host: str) -> None:
        there_id, has, lacks = "", stream[: common[host]], stream[common[host] :]
        if has:
            try:
                send(settings, host, name, bars, sum(size for _, size in lacks), {*dict(has)} - {*dict(lacks)})
                there_id = taken(host)
            except Exit as error:
                if error.code == SSH_FAILED:
                    raise
                say(str(error.message))
        if not there_id:
            reason = "did not take the lacking layers alone" if has else "has no layer of the image"
            say(f"{host} {reason}: the whole image is sent.")
            send(settings, host, name, bars, int(size))
            there_id = taken(host)
        if not there_id:
            raise Exit(f"{name} lacks layers there. Type: ssh {host} docker image rm {name}; then again")
        say(f"{host} has {name} now ({there_id[:19]}, the same {len(layers)} layers).")
        if there_id != image_id:
            say(f"{host}: the id differs from {image_id[:19]} here, because Docker stores images in another way there.")

    failed = at_once(hosts, look)
    stream = layers_in_stream(name) if any(common.values()) else []
    with transferring() as bars:
        failed |= at_once([*common], ship)
    if failed:
        raise Exit("\n".join([*failed.values(), f"Then type the same line again: {settings.line()}"]))


def images_there(settings: Settings, host: str) -> dict[str, list[str]]:
    """Return the layers of every image of a host by its id.

    Containerd's store takes an image that lacks a part. Docker 26 then lists no id of it, and Docker 28 no layers.
    """
    ids = [*dict.fromkeys(ask_there(settings, host, render("image_ids.j2")).split())]
    if not ids:
        return {}
    (words,) = render("image_inspect.j2", image=ids[0], format=LAYERS)
    lines = ask_there(settings, host, [(*words, *ids[1:])]).splitlines()
    return {one[0]: json.loads(one[2]).get("Layers") or [] for one in (line.split(" ", 2) for line in lines)}


def ask_there(settings: Settings, host: str, lines: Sequence[Sequence[str]]) -> str:
    command = ssh_command(settings, host, [word for line in lines for word in line])
    return run_there(host, command, 60)


# --- The stream ------------------------------------------------------------------------------------------------------


class Counted:
    """A stream into a host that shows its bytes."""

    def __init__(self, sink: BinaryIO, bars: Bars, host: str, total: int) -> None:
        self.sink, self.bars, self.host, self.total, self.done = sink, bars, host, total, 0

    def write(self, data: bytes) -> int:
        self.done += len(data)
        self.bars.show(self.host, self.done, max(self.total, self.done))
        return self.sink.write(data)


def send(settings: Settings, host: str, name: str, bars: Bars, total: int, left_out: Set[str] = frozenset()) -> None:
    """Send the image without these layers. total: the bytes that the others take."""
    save = pipe(save_command(name))
    # A `docker save` that has failed says why.
    with pipe(load_command(settings, host), into=True) as sink, save as source, suppress(tarfile.ReadError):
        counted = Counted(sink, bars, host, total)
        if not left_out:
            return copyfileobj(source, counted, CHUNK)
        with tarfile.open(fileobj=counted, mode="w|", bufsize=CHUNK) as part:  # type: ignore[call-overload]  # `write` is enough
            for member, data in members(source):
                if member.name not in left_out:
                    part.addfile(member, data)


def layers_in_stream(name: str) -> list[tuple[str, int]]:
    """Return path and bytes of each layer in what `docker save` writes, in the order of RootFS.Layers.

    Both formats end with manifest.json: `<id>/layer.tar` up to Docker 24, `blobs/sha256/<digest>` from 25 on. In the
    store of containerd a digest is that of the compressed layer, so only the order pairs it with RootFS.Layers.
    """
    sizes, paths = {}, []
    with pipe(save_command(name)) as source, suppress(tarfile.ReadError):
        for member, data in members(source):
            sizes[member.name] = member.size
            if member.name == "manifest.json" and data:
                paths = json.load(data)[0]["Layers"]
    return [(path, sizes.get(path, 0)) for path in paths]


def members(source: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    with tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK) as whole:
        for member in whole:
            yield member, whole.extractfile(member) if member.isreg() else None


def save_command(name: str) -> Command:
    return Command(render("docker_save.j2", image=name))
