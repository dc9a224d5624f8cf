"""`inv ship-image` between two real Docker Engines: what goes over the cable, and what a stream that is cut leaves."""

import json
import os
import re
import signal
import tarfile
from collections.abc import Iterator

import pytest
from operating import Terminal, inv

from rehearsal.hosts import Host
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
BASE, IMAGE = "ship/base:1", "ship/made:1"
BASE_BYTES, LAYER_BYTES = 30_000_000, 12_000_000
SHELL = {"VLLM_IMAGE": IMAGE, "WORKER_HOSTS": "spark-2"}


def docker(host: Host, *words: str, **how) -> str:
    done = host.run("docker", *words, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def images(rig, tmp_path_factory) -> Iterator[None]:
    """On the head an image of a base and a layer, both of random bytes, which no compression makes smaller."""
    folder = tmp_path_factory.mktemp("ship")
    (folder / "base").write_bytes(os.urandom(BASE_BYTES))
    with tarfile.open(folder / "base.tar", "w") as base:
        base.add(folder / "base", "base")
    (folder / "layer").write_bytes(os.urandom(LAYER_BYTES))
    (folder / "Dockerfile").write_text(f"FROM {BASE}\nCOPY layer /\nENV MADE=1\n")
    docker(rig.hosts[0], "import", str(folder / "base.tar"), BASE)
    docker(rig.hosts[0], "build", "--quiet", "--tag", IMAGE, str(folder))
    yield
    for host in rig.hosts:
        host.run("docker", "image", "rm", "--force", IMAGE, BASE)


@pytest.fixture
def pair(images, sparks, shells) -> list[Host]:
    """The two hosts. The worker has neither the image nor its base."""
    sparks[1].run("docker", "image", "rm", "--force", IMAGE, BASE)
    return sparks


def give_base(pair: list[Host]) -> None:
    saved = pair[0].run("docker", "save", BASE, text=False).stdout
    assert pair[1].run("docker", "load", input=saved, stdin=None, text=False).returncode == 0


def shipped(pair: list[Host], **env: str) -> str:
    done = inv(pair[0], "ship-image", **SHELL | env)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    layers = [docker(host, "image", "inspect", "--format", "{{json .RootFS.Layers}}", IMAGE) for host in pair]
    assert layers[0] == layers[1] and len(json.loads(layers[0])) == 2
    return done.stderr


def sent(text: str) -> float:
    """Return the megabytes that went over the cable, by the bar's last line."""
    return float(re.findall(r"^spark-2: ([0-9.]+) of ", text, re.M)[-1]) * 1000


def test_a_host_with_the_base_gets_the_lacking_layers_alone(pair):
    """The stream has at most 1.2 times the bytes of those layers, and a second time nothing is sent."""
    give_base(pair)
    text = shipped(pair)
    assert "whole image" not in text and sent(text) <= 1.2 * LAYER_BYTES / 1e6
    again = shipped(pair)
    assert "spark-2 has ship/made:1 already" in again and "docker load" not in again


def test_a_host_without_the_base_gets_the_whole_image(pair):
    """The message says why. Engine and layers are then the same."""
    text = shipped(pair)
    assert "spark-2 has no layer of the image: the whole image is sent." in text
    assert sent(text) >= (BASE_BYTES + LAYER_BYTES) / 1e6


@pytest.mark.parametrize("with_base", [True, False], ids=["lacking layers", "whole image"])
def test_a_sender_that_is_killed_leaves_no_half_image(pair, terminal, with_base, rig):
    """Nothing stands under the tag, and the same line brings the image."""
    if with_base:
        give_base(pair)
    typed: Terminal = terminal(pair[0], "ship-image", **SHELL)
    loading = lambda: pair[1].run("pgrep", "-f", "docker load").returncode == 0  # noqa: E731
    assert wait(loading, 30, pause=0.01), typed.read()
    typed.end(signal.SIGKILL)
    assert wait(lambda: not loading(), 20)
    assert pair[1].run("docker", "image", "inspect", IMAGE).returncode != 0
    shipped(pair)


def test_hosts_that_are_not_reached_and_no_image(pair, shells):
    """The message names the host and ssh's own words, or the line that gets the image."""
    shells.stop(pair[1])
    done = inv(pair[0], "ship-image", **SHELL)
    shells.start(pair[1])
    assert done.returncode == 1 and "ssh -v spark-2 true" in done.stderr and "Traceback" not in done.stderr
    none = inv(pair[0], "ship-image", "--to", "spark-2", VLLM_IMAGE="local/none:1")
    assert none.returncode != 0 and "inv build-image" in none.stderr and "Traceback" not in none.stderr
