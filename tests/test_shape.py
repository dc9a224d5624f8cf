"""A model's shape and the size of its weights are read from files, and never guessed."""

import json

import pytest

from cluster.finding import GIB, CannotKnow
from cluster.kv_cache import ATTENTION, STATE, read_shape
from cluster.memory import checkpoint_folder, read_model
from cluster.models import known_models
from cluster.repository import ROOT

NEMOTRON = json.loads((ROOT / "nemotron/120b.json").read_text())["config"]
QWEN = json.loads((ROOT / "qwen/122b.json").read_text())["config"]
PLAIN = json.loads((ROOT / "qwen/30b.json").read_text())["config"]


@pytest.mark.parametrize("model", known_models().values(), ids=known_models())
def test_every_profile_has_a_shape_with_sources(model):
    """A JSON file beside a profile is enough, and gives the source of each measured value."""
    file = ROOT / model.folder / f"{model.size}.json"
    if not file.exists():
        pytest.skip("the file is optional")
    kept = json.loads(file.read_text())
    assert read_model(file)[2] == "" and None not in read_model(file)[1].values()
    assert kept.keys() - kept["_source"].keys() == {"_source", "_unverified"}
    assert set(kept["_unverified"]) <= kept.keys() | kept["config"].keys()


def test_the_rehearsals_model_is_the_one_that_is_written():
    """The JSON file beside the rehearsal's profile agrees with the model's config.json."""
    kept = json.loads((ROOT / "rehearsal/tiny.json").read_text())["config"]
    assert kept.items() <= json.loads((ROOT / "rehearsal/tiny/config.json").read_text()).items()


def test_nemotron_is_forty_mamba_layers_and_eight_of_attention():
    """The letters of the pattern are counted. MTP adds one attention layer."""
    found = read_shape(NEMOTRON)
    assert (len(found.layers), found.layers.count(STATE), found.layers.count(ATTENTION)) == (88, 40, 8)
    assert found.mtp.count(ATTENTION) == 1
    assert found.state.element == 4


def test_newer_names_of_the_same_model_say_the_same():
    """transformers 5 writes a list of words for the older pattern, and dtype for torch_dtype."""
    words = {"M": "mamba", "*": "full_attention", "E": "moe"}
    newer = dict(NEMOTRON, layers_block_type=[words[letter] for letter in NEMOTRON["hybrid_override_pattern"]])
    newer |= {"mtp_layers_block_type": ["attention", "moe"], "dtype": "bfloat16"}
    for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "torch_dtype"):
        del newer[name]
    assert read_shape(newer) == read_shape(NEMOTRON)


def test_a_vision_model_has_its_shape_in_text_config():
    """Qwen3.5's layers by interval, by name and nested are the same shape."""
    named = dict(QWEN, layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 12)
    nested = {"model_type": "qwen3_5_moe", "vision_config": {"hidden_size": 1}, "text_config": named}
    assert read_shape(nested) == read_shape(QWEN)


@pytest.mark.parametrize(
    "config",
    [
        None,
        [],
        {},
        {"model_type": ["nemotron_h"]},
        {"model_type": "deepseek_v4"},
        {"model_type": "qwen3", "text_config": []},
        *(
            NEMOTRON | {name: value}
            for name, value in [
                ("hybrid_override_pattern", "MEX"),
                ("hybrid_override_pattern", ""),
                ("hybrid_override_pattern", ["M", {}]),
                ("mamba_num_heads", True),
                ("mamba_num_heads", -1),
                ("ssm_state_size", 10**30),
                ("num_key_value_heads", 0),
                ("head_dim", 1.5),
                ("mtp_hybrid_override_pattern", None),
            ]
        ),
        QWEN | {"layer_types": ["convolution"]},
        QWEN | {"full_attention_interval": 0},
        PLAIN | {"use_sliding_window": True, "sliding_window": 4096},
        PLAIN | {"sliding_window": 4096},
    ],
)
def test_a_config_that_is_not_understood_is_refused(config, snapshot):
    """An unknown architecture and a value of the wrong form end in one sentence that names the file."""
    (snapshot / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotKnow, match=r"/config\.json is not understood: [^\n]+\.$"):
        load(snapshot)


@pytest.mark.parametrize("key", ["n_groups", "hybrid_override_pattern", "torch_dtype"])
def test_the_refusal_names_the_key(key, snapshot):
    """A key that is missing and a key with a wrong value are named."""
    for wrong in ({name: value for name, value in NEMOTRON.items() if name != key}, NEMOTRON | {key: {}}):
        (snapshot / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CannotKnow, match=key):
            load(snapshot)


@pytest.fixture
def snapshot(tmp_path):
    """A Hugging Face cache with one snapshot of a/b."""
    folder = tmp_path / "hub/models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc123\n")
    (folder / "snapshots/abc123").mkdir(parents=True)
    return folder / "snapshots/abc123"


def load(snapshot, checkpoint="a/b"):
    """Read a model out of that cache, with Nemotron's JSON file beside it."""
    found = read_model(ROOT / "nemotron/120b.json", checkpoint_folder(snapshot.parents[3], checkpoint))
    if found[2]:
        raise CannotKnow(found[2])
    return found[:2]


def test_the_cache_counts_before_the_profile(snapshot):
    """config.json and the index of the weights come from the snapshot that refs/main names."""
    (snapshot / "config.json").write_text(json.dumps(PLAIN))
    index = {"metadata": {"total_size": 5 * GIB}, "weight_map": {"mtp.layers.0.norm": "x"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    found, measured = load(snapshot)
    assert found == read_shape(PLAIN)
    assert (measured["weights"], measured["mtp_weights"]) == (5 * GIB, 0)


def test_the_profile_counts_where_the_cache_has_nothing(snapshot):
    """For a snapshot without files and for another checkpoint the JSON file beside the profile is read."""
    for checkpoint in ("a/b", "c/d", "../..", "/nowhere"):
        found, measured = load(snapshot, checkpoint)
        assert found == read_shape(NEMOTRON) and measured["weights"] == int(70.2 * GIB)


def test_a_folder_by_its_path_in_the_container(snapshot):
    """A MODEL_CKPT below the container's cache is a folder of this host."""
    (snapshot / "config.json").write_text(json.dumps(PLAIN))
    place = snapshot.relative_to(snapshot.parents[3])
    assert load(snapshot, f"/root/.cache/huggingface/{place}")[0] == read_shape(PLAIN)


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
    """A file that exists and is not understood raises, and the profile does not replace it."""
    (snapshot / file).write_text(text)
    with pytest.raises(CannotKnow):
        load(snapshot)
