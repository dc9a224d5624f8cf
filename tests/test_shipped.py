"""What `inv ship-image` sends to a worker of the newer format of `docker save`, and what it says if a side fails."""

import io
import json
import os
import tarfile

import pytest
from invoke import Exit

from cluster.settings import load_settings
from cluster.ship import ship_image

BASE, OURS, CONFIG = (f"blobs/sha256/{name}" for name in ("base", "ours", "config"))


@pytest.fixture
def ship(operator, tmp_path):
    """Stands for `docker` here and for ssh to a worker that has the base. Returns ship-image between them."""
    manifest = json.dumps([{"Config": CONFIG, "Layers": [BASE, OURS]}]).encode()
    files = {BASE: b"b" * 9000, OURS: b"o" * 500, CONFIG: b"{}", "manifest.json": manifest}
    with tarfile.open(tmp_path / "image.tar", "w") as image:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            image.addfile(member, io.BytesIO(data))

    def program(name: str, cases: str) -> None:
        text = f'#!/bin/sh\ncd {tmp_path}\nfor word; do :; done\ncase "$*" in\n{cases}\nesac\n'
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def ship(save="cat image.tar", load="cat >loaded.tar; touch whole") -> None:
        made, half, base = '{"Layers": ["sha256:1", "sha256:2"]}', "{}", '{"Layers": ["sha256:1"]}'
        program("docker", f"save*) echo >>saves; {save};;\nimage*) echo 'sha256:made 9500 {made}';;")
        there = f"if [ -e whole ]; then echo '{made}'; elif [ -e half ]; then echo '{half}'; else echo '{base}'; fi"
        asked = f"*.Size*) echo -n 'sha256:made 1 '; {there};;\n*inspect*) echo sha256:made;;"
        program("ssh", f"*'docker load') {load};;\n*'image ls'*) echo sha256:made;;\n{asked}")
        ship_image(load_settings(None, {}, {"WORKER_HOSTS": "spark-2", "SHIP_VIA": "", "ENV_FILE": ""}))

    operator.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return ship


def test_a_worker_with_the_base_gets_everything_else(ship, tmp_path):
    """Docker from 25 on names a layer by its digest."""
    ship()
    with tarfile.open(tmp_path / "loaded.tar") as loaded:
        assert loaded.getnames() == [OURS, CONFIG, "manifest.json"]


def test_an_image_that_lacks_a_part_there_is_sent_whole(ship, tmp_path, capfd):
    """Docker 28 takes an image whose base it has under other digests, and then tells no layers of it."""
    ship(load="cat >loaded.tar; if [ -e half ]; then touch whole; else touch half; fi")
    with tarfile.open(tmp_path / "loaded.tar") as loaded:
        assert BASE in loaded.getnames()
    assert "spark-2 did not take the lacking layers alone: the whole image is sent." in capfd.readouterr().err


def test_a_save_that_fails_says_why(ship):
    """Docker's words count, and not that its archive is empty."""
    with pytest.raises(Exit, match=r"^docker save \S+ failed with status 1: no space left$"):
        ship(save="echo no space left >&2; exit 1")


def test_a_connection_that_is_lost_says_why(ship, tmp_path):
    """The words of ssh count. The whole image does not go the same way after it."""
    with pytest.raises(Exit, match=r"^spark-2: `docker load` failed with status 255: Connection refused\n"):
        ship(load="echo Connection refused >&2; exit 255")
    assert (tmp_path / "saves").read_text() == "\n\n"
