"""A model's shape and the size of its weights: read where they stand, never guessed."""

import json

import pytest

from checks import footprint, shape
from checks.fields import ATTENTION, STATE, CannotKnow
from checks.footprint import GIB
from rehearsal import model as tiny
from settings.models import ROOT, known

NEMOTRON = json.loads((ROOT / "nemotron/120b.json").read_text())["config"]
QWEN = json.loads((ROOT / "qwen/122b.json").read_text())["config"]
PLAIN = json.loads((ROOT / "qwen/30b.json").read_text())["config"]


@pytest.mark.parametrize("model", known().values(), ids=known())
def test_every_profile_has_a_shape_with_sources(model):
    """A model's JSON can be read by itself, and says where each measured value comes from."""
    file = ROOT / model.folder / f"{model.size}.json"
    kept = json.loads(file.read_text())
    footprint.load(file, None, "a/b")
    assert kept.keys() - kept["_source"].keys() == {"_source", "_unverified"}
    assert set(kept["_unverified"]) <= kept.keys() | kept["config"].keys()


def test_the_tiny_model_is_the_one_that_is_written():
    """What stands beside the rehearsal's profile is what rehearsal/model.py writes."""
    kept = json.loads((ROOT / "rehearsal/tiny.json").read_text())["config"]
    assert kept.items() <= tiny.config().items()


def test_nemotron_is_forty_mamba_layers_and_eight_of_attention():
    """The pattern's letters count; MTP adds one attention layer."""
    found = shape.read(NEMOTRON, "config.json")
    assert (len(found.layers), found.layers.count(STATE), found.layers.count(ATTENTION)) == (88, 40, 8)
    assert found.mtp.count(ATTENTION) == 1
    assert found.state.dtype == "float32"


def test_newer_names_of_the_same_model_say_the_same():
    """transformers 5 writes lists of words where older ones wrote a pattern, and dtype for torch_dtype."""
    words = {"M": "mamba", "*": "full_attention", "E": "moe"}
    newer = dict(NEMOTRON, layers_block_type=[words[letter] for letter in NEMOTRON["hybrid_override_pattern"]])
    newer |= {"mtp_layers_block_type": ["attention", "moe"], "dtype": "bfloat16"}
    for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "torch_dtype"):
        del newer[name]
    assert shape.read(newer, "config.json") == shape.read(NEMOTRON, "config.json")


def test_a_vision_model_is_what_its_text_config_says():
    """Qwen3.5's layers by interval, by name and nested are one shape."""
    named = dict(QWEN, layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 12)
    nested = {"model_type": "qwen3_5_moe", "vision_config": {"hidden_size": 1}, "text_config": named}
    assert shape.read(nested, "config.json") == shape.read(QWEN, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        None,
        [],
        {},
        {"model_type": ["nemotron_h"]},
        {"model_type": "deepseek_v4"},
        {"model_type": "qwen3", "text_config": []},
        *({name: value for name, value in NEMOTRON.items() if name != lost} for lost in ("n_groups", "torch_dtype")),
        *(
            NEMOTRON | {name: value}
            for name, value in [
                ("hybrid_override_pattern", "MEX"),
                ("hybrid_override_pattern", ""),
                ("hybrid_override_pattern", ["M", {}]),
                ("mamba_num_heads", "128"),
                ("mamba_num_heads", True),
                ("mamba_num_heads", -1),
                ("ssm_state_size", 10**30),
                ("num_key_value_heads", 0),
                ("head_dim", 1.5),
                ("mtp_hybrid_override_pattern", None),
            ]
        ),
        QWEN | {"layer_types": ["full_attention"]},
        QWEN | {"full_attention_interval": 0},
        PLAIN | {"use_sliding_window": True, "sliding_window": 4096},
        PLAIN | {"sliding_window": 4096},
    ],
    ids=repr,
)
def test_what_is_not_known_is_said(config):
    """An unknown architecture and a value of the wrong form raise, and name file or field."""
    with pytest.raises(CannotKnow, match=r"config\.json"):
        shape.read(config, "config.json")


@pytest.fixture
def snapshot(tmp_path):
    """A Hugging Face cache with one snapshot of a/b."""
    folder = tmp_path / "hub/models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc123\n")
    (folder / "snapshots/abc123").mkdir(parents=True)
    return folder / "snapshots/abc123"


def load(snapshot, checkpoint="a/b"):
    """What the gate makes of that cache, with Nemotron's profile beside it."""
    return footprint.load(ROOT / "nemotron/120b.json", snapshot.parents[3], checkpoint)


def test_the_cache_is_believed_before_the_profile(snapshot):
    """config.json and the index of the weights come from the snapshot that refs/main names."""
    (snapshot / "config.json").write_text(json.dumps(PLAIN))
    index = {"metadata": {"total_size": 5 * GIB}, "weight_map": {"mtp.layers.0.norm": "x"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    found, weights, source = load(snapshot)
    assert found == shape.read(PLAIN, "")
    assert (weights.weights, weights.mtp_weights) == (5 * GIB, 0)
    assert source == str(snapshot / "config.json") and weights.source.startswith(str(snapshot))


def test_an_empty_cache_leaves_it_to_the_profile(snapshot):
    """A snapshot without files, and another checkpoint, come to what stands beside the profile."""
    for checkpoint in ("a/b", "c/d", "../..", "/nowhere"):
        found, weights, source = load(snapshot, checkpoint)
        assert found == shape.read(NEMOTRON, "") and source.endswith("nemotron/120b.json")
        assert weights.weights == int(70.2 * GIB)


def test_a_folder_by_its_path_in_the_container(snapshot):
    """A MODEL_CKPT below the container's cache is a folder of this host's."""
    (snapshot / "config.json").write_text(json.dumps(PLAIN))
    place = snapshot.relative_to(snapshot.parents[3])
    assert load(snapshot, f"/root/.cache/huggingface/{place}")[0] == shape.read(PLAIN, "")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[" * 100_000),
        ("config.json", "\x00"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"metadata": {"total_size": "70e9"}}'),
        ("model.safetensors.index.json", '{"metadata": {"total_size": -1}}'),
        ("model.safetensors.index.json", '{"metadata": {"total_size": NaN}}'),
    ],
)
def test_a_broken_file_is_no_reason_to_guess(snapshot, file, text):
    """A file that is there and cannot be read raises, and is not passed over for the profile."""
    (snapshot / file).write_text(text)
    with pytest.raises(CannotKnow):
        load(snapshot)
