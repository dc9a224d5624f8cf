"""A model is data: one more folder or file is one more model, with its names and its task, and no Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import Exit

import tasks
from cluster.models import Model, find_model, known_models

ROOT = Path(__file__).resolve().parent.parent
# On a Spark nobody wants to launch the rehearsal's model. `--model rehearsal` does.
LAUNCHED = [name for name in known_models() if name != "rehearsal"]


def test_every_profile_is_a_model():
    """Each `<folder>/<size>.env` beside a serve.j2 is a model, but for cluster.env."""
    files = {file for serve in ROOT.glob("*/serve.j2") for file in serve.parent.glob("*.env")}
    found = {ROOT / model.folder / f"{model.size}.env" for model in known_models().values()}
    assert found == {file for file in files if file.name != "cluster.env"}


@pytest.mark.parametrize(
    ("called", "name"),
    [("nemotron", "nemotron"), ("nemotron-120b", "nemotron"), ("qwen-30b", "qwen-30b"), ("qwen-122b", "qwen-122b")],
)
def test_a_folder_with_one_model_answers_to_both_names(called, name):
    """The full name always works. The folder's own name works if the folder has one model."""
    assert find_model(called).name == name


@pytest.mark.parametrize("called", ["qwen", "nemotrom", "", "../nemotron", "nemotron/120b", "cluster", "qwen-cluster"])
def test_an_unknown_model_is_refused_with_the_names_of_all(called, inv):
    """The refusal is one sentence with the names of all models."""
    said = inv(f"--dry head --model '{called}'")
    assert said.code and said.out == ""
    assert f"No model is called {called!r}" in said.err and f"There are: {', '.join(known_models())}." in said.err


def test_the_nearest_name_is_offered():
    """The refusal of a typing error offers the nearest name."""
    with pytest.raises(Exit, match=r"did you mean nemotron\?"):
        find_model("nemotorn")


@pytest.mark.parametrize("name", LAUNCHED)
def test_each_model_has_a_launch_task_of_its_own(name, inv):
    """`inv launch-NAME` does the same as `inv launch --model NAME`, flags included."""
    flags = "--max-len 256K --detach"
    assert inv(f"--dry launch-{name} {flags}").out == inv(f"--dry launch --model {name} {flags}").out


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty repository whose models are asked for."""
    monkeypatch.setattr("cluster.models.ROOT", tmp_path)
    known_models.cache_clear()
    yield tmp_path
    known_models.cache_clear()


def write_profiles(root, *names):
    """Write empty profiles, each beside a template."""
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
        (root / name).with_name("serve.j2").touch()


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [("a/b.env", "a-b/1.env", "a-b"), ("m/a_b.env", "m/a-b.env", "m-a_b"), ("m/3.1.env", "m/3-1.env", "m-3.1")],
)
def test_two_profiles_of_one_name_are_refused(one, other, name, root):
    """Neither of two profiles replaces the other silently: the refusal names both files."""
    write_profiles(root, one, other, "a/c.env")
    with pytest.raises(Exit, match=f"are both the model {name}") as refusal:
        known_models()
    assert one in refusal.value.message and other in refusal.value.message


def test_an_alias_outlives_a_second_profile(root):
    """A model with an ALIAS keeps that name when its folder gets another model. The full name works as well."""
    write_profiles(root, "nemotron/120b.env")
    (root / "nemotron/120b.env").write_text("ALIAS=nemotron\n")
    assert list(known_models()) == ["nemotron"]
    write_profiles(root, "nemotron/30b.env")
    known_models.cache_clear()
    assert list(known_models()) == ["nemotron", "nemotron-30b"]
    assert find_model("nemotron") == find_model("nemotron-120b") == Model("nemotron", "120b", "nemotron")
    (root / "nemotron/30b.env").write_text("ALIAS=nemotron\n")
    known_models.cache_clear()
    with pytest.raises(Exit, match="are both the model nemotron"):
        known_models()


def test_a_file_that_is_no_profile_is_no_model(root):
    """A hidden file and a folder with the ending of a profile are passed over."""
    write_profiles(root, "a/1.env", "a/.env", "a/.old.env")
    (root / "a/backup.env").mkdir()
    assert known_models() == {"a": Model("a", "1", "a")}


def test_a_broken_profile_stops_only_its_own_model(root):
    """Other models know no key of a profile that cannot be read, and go on."""
    write_profiles(root, "a/1.env", "b/1.env")
    (root / "a/1.env").write_bytes(b"X=\xff\n")
    (root / "b/1.env").unlink()
    (root / "b/1.env").mkdir()
    assert (Model("a", "1", "a").keys, Model("b", "1", "b").keys) == ({"X"}, set())


def test_there_is_no_launch_task_without_a_model():
    """There is exactly one launch task for each profile."""
    made = {name.removeprefix("launch-") for name in tasks.ns.task_names if name.startswith("launch-")}
    assert made == set(LAUNCHED)


def test_a_new_model_is_a_folder_and_no_python(tmp_path):
    """A copy of this repository with one more folder launches the models of that folder."""
    for part in ("tasks.py", "cluster", "templates", "nemotron", ".env.example"):
        whole = ROOT / part
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / part)
    new = tmp_path / "mistral"
    new.mkdir()
    for size in ("24b", "3.1_24b"):
        (new / f"{size}.env").write_text(
            f"MODEL_CKPT=mistral/{size}\nSERVED_NAME=m\nTP_SIZE=1\nMAX_MODEL_LEN=32K\nGPU_MEM_UTIL=0.5\n"
            "MAX_NUM_SEQS=\nMAX_NUM_BATCHED_TOKENS=\nTOOL_CALL_PARSER=\nTOKENIZER_MODE=mistral\n"
        )
    (new / "serve.j2").write_text(
        '{% extends "vllm_serve.j2" %}\n{% block flags %}\n--tokenizer-mode {{ TOKENIZER_MODE }}\n{% endblock %}\n'
    )
    words = [sys.executable, "-m", "invoke", "--dry", "launch-mistral-24b", "launch", "--model", "mistral-3.1_24b"]
    env = {"PATH": os.environ["PATH"], "ENV_FILE": "", "TOKENIZER_MODE": "slow"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall("^  vllm serve (.*) ", done.stdout, re.M) == ["mistral/24b", "mistral/3.1_24b"]
    assert done.stdout.count("  --tokenizer-mode slow \\\n") == done.stdout.count("--max-model-len 32768") == 2
