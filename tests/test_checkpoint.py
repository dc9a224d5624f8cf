"""A checkpoint in the Hugging Face cache, as `look` sees it in every layout, and how it arrives from another node."""

import io
import json
from pathlib import Path

import pytest

from cluster.inside import weights
from cluster.weights import left_to_send
from tests.rehearsal import hub

MODEL, COMMIT = hub.NAME, "c" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    hub.checkpoint(folder)
    return folder


def hashed(path: Path) -> str:
    one = hub.hashes(path, path.stat().st_size, path.stat().st_mtime_ns)
    return one["sha256"] or one["git"]


def cache(at: Path, made: Path, layout: str = "classic") -> Path:
    """Lay the model into a cache as huggingface_hub does: blobs with links, plain files, or the shared store of 2.4."""
    folder = weights.folder_of(at, MODEL)
    for path in made.iterdir():
        name = folder / "snapshots" / COMMIT / path.name
        name.parent.mkdir(parents=True, exist_ok=True)
        if layout == "plain":
            name.write_bytes(path.read_bytes())
            continue
        blob = folder / "blobs" / hashed(path)
        blob.parent.mkdir(exist_ok=True)
        if layout == "shared":
            store = at / "blobs/ab" / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(path.read_bytes())
            blob.symlink_to(f"../../blobs/ab/{blob.name}")
        else:
            blob.write_bytes(path.read_bytes())
        name.symlink_to(f"../../blobs/{blob.name}")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    return folder


@pytest.mark.parametrize("layout", ["classic", "plain", "shared"])
@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_whole_checkpoint_has_one_revision_and_lacks_nothing(made, tmp_path, layout, revision):
    """Every layout of huggingface_hub up to 2.4 is read, by a ref or by the commit."""
    cache(tmp_path, made, layout)
    told = weights.look(tmp_path, MODEL, revision)
    assert told["revision"] == COMMIT and not told["missing"] and not told["wrong"]
    assert told["files"] == {path.name: path.stat().st_size for path in made.iterdir()}
    assert told["have"] == told["total"] == sum(told["files"].values()) and told["free"] > 0


def test_a_cache_without_the_model_or_its_revision_has_none(made, tmp_path):
    """Nothing is damaged where nothing is. The disk is asked even where no folder is there yet."""
    assert weights.look(tmp_path / "no/hub", MODEL)["revision"] is None
    cache(tmp_path, made)
    told = weights.look(tmp_path, MODEL, "v2")
    assert told["revision"] is None and not told["missing"] and told["free"] > 0


def test_a_load_that_ended_before_the_first_shard_has_damaged_nothing(made, tmp_path):
    """vLLM fetches config.json first. One shard without the others is damage."""
    folder = cache(tmp_path, made)
    for path in [*(folder / "snapshots" / COMMIT).iterdir()]:
        if path.name != "config.json":
            path.unlink()
    told = weights.look(tmp_path, MODEL)
    assert told["revision"] is None and not told["missing"]
    shard = "model-00002-of-00003.safetensors"
    (folder / "snapshots" / COMMIT / shard).write_bytes((made / shard).read_bytes())
    assert len(weights.look(tmp_path, MODEL)["missing"]) == 2


def damage(folder: Path, how: str) -> None:
    shard = folder / "snapshots" / COMMIT / "model-00002-of-00003.safetensors"
    blob = shard.resolve()
    if how == "shard gone":
        shard.unlink()
    elif how == "dangling":
        blob.unlink()
    elif how == "outside":
        blob.rename(folder.parents[1] / "elsewhere")
        blob.symlink_to(folder.parents[1] / "elsewhere")
    elif how == "too long":
        blob.write_bytes(blob.read_bytes() + b"0" * 781)
    elif how == "pointer":  # what git leaves without LFS
        blob.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "empty":
        blob.write_bytes(b"")
    elif how == "cut":
        blob.write_bytes(blob.read_bytes()[:-1])
    elif how == "no config":
        (shard.parent / "config.json").unlink()


@pytest.mark.parametrize(
    "how", ["shard gone", "dangling", "outside", "too long", "cut", "pointer", "empty", "no config"]
)
def test_a_damaged_checkpoint_says_what_is_wrong(made, tmp_path, how):
    """A shard of another size than its header says is wrong, also without any record of its size."""
    at = tmp_path / "hub"
    folder = cache(at, made)
    damage(folder, how)
    told = weights.look(at, MODEL)
    name = "config.json" if how == "no config" else "model-00002-of-00003.safetensors"
    if how in ("too long", "cut", "pointer", "empty"):
        assert told["wrong"][0].startswith(f"{name} has ") and not told["missing"]
        assert (at / told["bad"][0]).is_file()
    else:
        assert told["missing"] == [name] and not told["wrong"]


def test_the_record_of_a_fetch_promises_files_and_sizes(made, tmp_path):
    """What the hub has listed counts also for files that are no safetensors."""
    folder = cache(tmp_path, made)
    promised = {"tokenizer.json": {"size": 1, "hash": "0"}, "other.txt": {"size": 5, "hash": "0"}}
    weights._write(weights.record_of(folder, COMMIT), json.dumps(promised))
    told = weights.look(tmp_path, MODEL)
    assert told["missing"] == ["other.txt"] and told["wrong"][0].startswith("tokenizer.json has ")
    assert told["total"] == 6


@pytest.mark.parametrize("layout", ["classic", "shared"])
def test_every_byte_is_compared(made, tmp_path, capsys, layout):
    """A flipped byte keeps the size, and only the hash finds it."""
    folder = cache(tmp_path, made, layout)
    weights.verify(tmp_path, MODEL, "")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["wrong"] == []
    blob = (folder / "snapshots" / COMMIT / "model-00001-of-00003.safetensors").resolve()
    body = bytearray(blob.read_bytes())
    body[-1] ^= 1
    blob.write_bytes(body)
    weights.verify(tmp_path, MODEL, "")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["wrong"] == ["model-00001-of-00003.safetensors is damaged"]
    assert told["bad"] == [str(blob.relative_to(tmp_path))]


# --- Receiving -------------------------------------------------------------------------------------------------------


def frame(path: Path, start: int = 0, body: bytes | None = None) -> bytes:
    body = path.read_bytes() if body is None else body
    head = {"path": f"blobs/{hashed(path)}", "size": path.stat().st_size, "start": start, "hash": hashed(path)}
    return json.dumps(head).encode() + b"\n" + body[start:]


def test_a_file_that_was_cut_goes_on_where_it_stopped(made, tmp_path):
    """The first part is kept under another name, and the whole has its name only once its hash is right."""
    shard = made / "model-00001-of-00003.safetensors"
    folder, blob = weights.folder_of(tmp_path, MODEL), hashed(shard)
    with pytest.raises(EOFError, match="stopped in the middle"):
        weights.receive(tmp_path, MODEL, "", io.BytesIO(frame(shard)[:-1000]))
    assert not (folder / "blobs" / blob).exists()
    start = weights.look(tmp_path, MODEL)["parts"][blob]
    assert start == shard.stat().st_size - 1000
    link = json.dumps({"path": f"snapshots/{COMMIT}/{shard.name}", "to": f"../../blobs/{blob}"}).encode() + b"\n"
    ref = json.dumps({"path": "refs/main", "text": COMMIT}).encode() + b"\n"
    weights.receive(tmp_path, MODEL, "", io.BytesIO(frame(shard, start) + link + ref))
    assert (folder / "snapshots" / COMMIT / shard.name).read_bytes() == shard.read_bytes()
    assert weights.look(tmp_path, MODEL)["revision"] == COMMIT and not list(folder.glob("blobs/*.incomplete"))


@pytest.mark.parametrize("layout", ["classic", "shared"])
def test_a_blob_of_another_revision_is_not_sent_again(made, tmp_path, layout):
    """A new revision of a model changes a file or two. Of the others the links come, and no byte."""
    folder = cache(tmp_path, made, layout)
    files = weights.listing(tmp_path, MODEL, COMMIT)
    there = weights.look(tmp_path, MODEL, "d" * 40)
    assert there["revision"] is None and left_to_send(there, "d" * 40, files) == dict.fromkeys(files, 0)
    assert left_to_send(weights.look(tmp_path, MODEL), COMMIT, files) == {}
    shard = made / "model-00001-of-00003.safetensors"
    link = {"path": f"snapshots/{'d' * 40}/{shard.name}", "to": f"../../blobs/{hashed(shard)}"}
    sent = frame(shard, shard.stat().st_size) + json.dumps(link).encode() + b"\n"
    weights.receive(tmp_path, MODEL, "", io.BytesIO(sent))
    assert (folder / link["path"]).read_bytes() == shard.read_bytes() and not [*folder.rglob("*.incomplete")]
    (folder / "blobs" / hashed(shard)).write_bytes(b"short")
    assert left_to_send(weights.look(tmp_path, MODEL, "d" * 40), "e" * 40, files)[shard.name] == shard.stat().st_size


def test_a_file_with_another_hash_gets_no_name(made, tmp_path):
    """The bytes begin anew with the next ship. A path that leaves the model's folder is refused."""
    shard = made / "model-00001-of-00003.safetensors"
    with pytest.raises(ValueError, match="another hash"):
        weights.receive(tmp_path, MODEL, "", io.BytesIO(frame(shard, body=b"0" * shard.stat().st_size)))
    assert weights.look(tmp_path, MODEL)["parts"] == {hashed(shard): 0}
    out = json.dumps({"path": "../../out", "text": ""}).encode() + b"\n"
    with pytest.raises(ValueError, match="leaves the folder"):
        weights.receive(tmp_path, MODEL, "", io.BytesIO(out))
