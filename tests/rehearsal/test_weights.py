"""`inv weights` on stand-in Sparks: a hub, real safetensors files, a real sshd, and what is cut in the middle."""

import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from operating import inv
from shells import FULL

from rehearsal import sandbox
from rehearsal.hosts import Host
from rehearsal.shell import run, wait
from tests.rehearsal.hub import NAME, Hub

pytestmark = pytest.mark.rehearsal
PADDING = 150_000_000
WEIGHTS = ("weights", "--model", "rehearsal")
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def hub(rig, tmp_path_factory) -> Iterator[Hub]:
    made = Hub(rig.hosts[0], tmp_path_factory.mktemp("hub"), padding=PADDING)
    yield made
    made.stop()


@pytest.fixture
def shell(hub, sparks, shells) -> Iterator[dict[str, str]]:
    """The operator's settings. Before and after a test no node has the checkpoint, and the hub obeys no order."""

    def clear() -> None:
        hub.order()
        hub.forget()
        for file in hub.folder.glob("cut *"):
            file.unlink()
        for host in sparks:
            host.run("rm", "-rf", str(host.cache / "huggingface/hub"))

    clear()
    yield {"MODEL_CKPT": NAME, "HF_ENDPOINT": hub.url, "WORKER_HOSTS": "spark-2"}
    clear()


def has(host: Host, shell: dict[str, str]) -> dict:
    """What the node itself says that it has."""
    return json.loads(inv(host, *WEIGHTS, "--here", **shell).stdout)


def whole(host: Host, shell: dict[str, str]) -> bool:
    told = has(host, shell)
    return bool(told["revision"]) and not told["missing"] and not told["wrong"]


def test_a_checkpoint_is_fetched_once_and_shipped(sparks, shell, hub):
    """Both nodes have all files, the hub has sent each once, and the second time nothing moves."""
    first = inv(sparks[0], *WEIGHTS, "--deep", **shell)
    assert first.returncode == 0, first.stderr
    assert "whole on this node, spark-2 (every byte compared)" in first.stderr and first.stdout == ""
    assert all(whole(host, shell) for host in sparks)
    assert len(hub.requests("GET /stand-in")) == len(has(sparks[1], shell)["files"])
    hub.forget()
    again = inv(sparks[0], *WEIGHTS, **shell)
    assert again.returncode == 0 and not hub.requests("GET /stand-in") and "--receive" not in again.stderr


def test_a_cut_and_a_kill_cost_one_file(sparks, shell, hub, terminal):
    """A connection that is cut goes on within the file. After a kill no finished file is asked for again."""
    hub.order(cut={"padding.dat": 15_000_000}, rate=20_000_000)  # the hub's client writes pieces of 10 MiB
    typed = terminal(sparks[0], *WEIGHTS, **shell)
    assert wait(lambda: hub.requests("padding.dat bytes=10485760-"), 60), typed.read()
    typed.end(signal.SIGKILL)
    assert wait(lambda: not sparks[0].run("docker", "ps", "--quiet").stdout, 20), "the container ends with the task"
    hub.forget()
    hub.order()
    again = inv(sparks[0], *WEIGHTS, **shell)
    assert again.returncode == 0, again.stderr
    asked = {line.split()[1].rpartition("/")[2] for line in hub.requests("GET /stand-in")}
    assert asked == {"padding.dat", "tokenizer.json", "tokenizer_config.json"}
    assert all(whole(host, shell) for host in sparks)


def test_a_new_revision_ships_what_has_changed(sparks, shell, shells, hub):
    """The worker gets the new file and links to the blobs that it has. A branch that the worker lacks gets its name."""
    commit = json.loads(sparks[0].run("curl", "-s", f"{hub.url}/api/models/{NAME}").stdout)["sha"]
    assert inv(sparks[0], *WEIGHTS, "--revision", commit, **shell).returncode == 0
    assert not has(sparks[1], shell)["revision"]
    assert inv(sparks[0], *WEIGHTS, **shell).returncode == 0
    assert has(sparks[1], shell)["revision"] == commit
    new = hub.model / "README.md"
    try:
        new.write_text("new")
        done = inv(sparks[0], *WEIGHTS, "--deep", **shell)
    finally:
        new.unlink()
    assert done.returncode == 0 and "spark-2, shipped: 0.000 of 0.000 GB" in done.stderr, done.stderr
    told = has(sparks[1], shell)
    assert told["revision"] != commit and "README.md" in told["files"] and whole(sparks[1], shell)


def begun(blobs: Path) -> bool:
    """Whether a large file is on its way. A small one may get its name between two looks."""
    with suppress(FileNotFoundError):
        return any(file.stat().st_size > 2**20 for file in blobs.glob("*.ship.incomplete"))
    return False


def test_a_worker_that_dies_in_the_middle_goes_on(sparks, shell, shells, terminal):
    """The blobs that have arrived stay, and the one under way goes on where it was. Nothing half-made has a name."""
    assert inv(sparks[0], *WEIGHTS, **shell | {"TP_SIZE": "1"}).returncode == 0
    blobs = sparks[1].cache / "huggingface/hub/models--stand-in--tiny/blobs"
    typed = terminal(sparks[0], *WEIGHTS, **shell)
    assert wait(lambda: begun(blobs) and sparks[1].run("docker", "kill", "node-weights").returncode == 0, 60, pause=0)
    assert typed.process.wait(60) != 0 and "spark-2" in typed.read() and "type the same line again" in typed.said
    told = has(sparks[1], shell)
    assert not told["revision"] or told["missing"]
    again = inv(sparks[0], *WEIGHTS, "--deep", **shell)
    assert again.returncode == 0 and all(whole(host, shell) for host in sparks), again.stderr
    assert told["parts"] and not list(blobs.glob("*.incomplete"))


def test_a_disk_that_is_too_small_is_refused_before_a_byte(sparks, shell, shells, hub):
    """The sentence has the node and the numbers, also where no hub answers. No file has been asked for."""
    shells.start(sparks[1], CACHE_DIR=FULL)
    done = inv(sparks[0], *WEIGHTS, **shell)
    assert not hub.requests("padding.dat")
    assert inv(sparks[0], *WEIGHTS, **shell | {"TP_SIZE": "1"}).returncode == 0
    silent = inv(sparks[0], *WEIGHTS, **shell | {"HF_ENDPOINT": "http://10.0.0.1:1"})
    shells.start(sparks[1])
    for one in (done, silent):
        assert one.returncode == 1 and "spark-2: 0.2 GB are to come and 5 GB have to stay" in one.stderr, one.stderr
    assert "--receive" not in silent.stderr


def test_a_disk_that_fills_leaves_no_half_file(rig, sparks, shell):
    """The sentence has the kernel's words. Every blob that has its name is whole."""
    engine = str(sandbox.child(sandbox.child(rig.processes["spark-1"].pid)))
    cache = sparks[0].cache / "huggingface"
    words = ("nsenter", "--target", engine, "--mount")
    run(*words, "mount", "-t", "tmpfs", "-o", "size=20m", "small", cache)
    try:
        done = inv(sparks[0], *WEIGHTS, **shell | {"TP_SIZE": "1"})
        blobs = run(*words, "find", cache, "-path", "*/blobs/*", "-type", "f", "-printf", "%f %s\n").splitlines()
    finally:
        run(*words, "umount", cache)
    assert done.returncode == 1 and "df -h" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert blobs and not [blob for blob in blobs if blob.endswith(f" {PADDING}")]


def test_a_worker_that_is_not_reached_keeps_nobody_from_the_weights(sparks, shell, shells):
    """The head has all files, and the message names the worker and the line to type."""
    shells.stop(sparks[1])
    done = inv(sparks[0], *WEIGHTS, **shell)
    shells.start(sparks[1])
    assert done.returncode == 1 and "ssh -v spark-2 true" in done.stderr and "Traceback" not in done.stderr
    assert whole(sparks[0], shell)


def test_damage_is_found_and_named(sparks, shell):
    """A shard that is too long is found by its header, a flipped byte by --deep. The line that is told mends it."""
    assert inv(sparks[0], *WEIGHTS, **shell).returncode == 0
    told = has(sparks[1], shell)
    at = sparks[1].cache / "huggingface/hub/models--stand-in--tiny/snapshots" / told["revision"] / SHARD
    body = at.read_bytes()
    at.resolve().write_bytes(body + b"0" * 781)
    found = inv(sparks[0], *WEIGHTS, **shell)
    assert found.returncode == 1 and f"spark-2: {SHARD} has" in found.stderr and "sudo rm" in found.stderr
    at.resolve().write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    assert inv(sparks[0], *WEIGHTS, **shell).returncode == 0
    deep = inv(sparks[0], *WEIGHTS, "--deep", **shell)
    assert deep.returncode == 1 and f"spark-2: {SHARD} is damaged. Type there: sudo rm " in deep.stderr
    blob = deep.stderr.partition("sudo rm ")[2].split()[0]
    assert blob == str(at.resolve())  # below the worker's own CACHE_DIR
    sparks[1].run("rm", blob)
    assert inv(sparks[0], *WEIGHTS, "--deep", **shell).returncode == 0


def test_what_the_hub_refuses_is_one_sentence(sparks, shell, hub):
    """A gated model, no such model or revision, a hub that does not answer. A right token opens the gate."""
    hub.order(token="hf_marker")
    gated = inv(sparks[0], *WEIGHTS, **shell)
    assert gated.returncode == 1 and "HF_TOKEN" in gated.stderr and "Traceback" not in gated.stderr
    opened = inv(sparks[0], *WEIGHTS, **shell | {"HF_TOKEN": "hf_marker"})
    assert opened.returncode == 0 and "hf_marker" not in opened.stderr, opened.stderr
    for wrong in ({"MODEL_CKPT": "stand-in/none"}, {"REVISION": "v9"}, {"HF_ENDPOINT": "http://10.0.0.1:1"}):
        done = inv(sparks[0], *WEIGHTS, **shell | {"HF_TOKEN": "hf_marker"} | wrong)
        if "HF_ENDPOINT" in wrong:
            assert done.returncode == 0 and "which is whole: it is used" in done.stderr, done.stderr
        else:
            assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
