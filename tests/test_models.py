"""A model is data: one more folder or file is one more model, with its names and its task, and no Python."""

import json
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
    """Neither of two profiles replaces the other silently: the refusal names both files. Other tasks go on."""
    write_profiles(root, one, other, "a/c.env")
    kept = next(known for known, model in known_models().items() if model.clash)
    with pytest.raises(Exit, match=f"are both the model {name}") as refusal:
        find_model(kept)
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
        find_model("nemotron")


def test_a_file_that_is_no_profile_is_no_model(root):
    """A hidden file, such as an operator's `.env`, and a folder are passed over. Git ignores each `.env`."""
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
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


@pytest.fixture
def copied(tmp_path):
    """Runs Python in a copy of this repository, to which a test adds a model."""
    for part in ("tasks.py", "cluster", "templates", "nemotron", ".env.example", "requirements.lock"):
        whole = ROOT / part
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, tmp_path / part)

    def run(*words, **env):
        env = {"PATH": os.environ["PATH"], "ENV_FILE": "", "HOME": "/home/operator", **env}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_a_new_model_is_a_folder_and_no_python(tmp_path, copied):
    """A copy of this repository with one more folder launches the models of that folder."""
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
    words = ("-m", "invoke", "--dry", "launch-mistral-24b", "launch", "--model", "mistral-3.1_24b")
    done = copied(*words, TOKENIZER_MODE="slow")
    assert re.findall("^  vllm serve (.*) ", done.stdout, re.M) == ["mistral/24b", "mistral/3.1_24b"]
    assert done.stdout.count("  --tokenizer-mode slow \\\n") == done.stdout.count("--max-model-len 32768") == 2


# A checkpoint of an architecture that no formula knows, with a drafter and a cache of 12 GiB. It has no JSON file.
UNKNOWN_MODEL = {
    "420b.env": "MODEL_CKPT=ursa/420b\nSERVED_NAME=ursa\nVLLM_IMAGE=ursa/vllm:2\nTP_SIZE=2\nMAX_MODEL_LEN=64K\n"
    "GPU_MEM_UTIL=0.8\nMAX_NUM_SEQS=\nMAX_NUM_BATCHED_TOKENS=\nTOOL_CALL_PARSER=\nKV_CACHE_BYTES=12G\n"
    """DRAFTER='{"method":"eagle3","model":"ursa/drafter","num_speculative_tokens":4}'\n""",
    "cluster.env": "URSA_EXPERTS=fused\nVLLM_FORWARD_VARS=URSA_EXPERTS\n",
    "serve.j2": '{% extends "vllm_serve.j2" %}\n{% block flags %}\n--kv-cache-memory-bytes {{ KV_CACHE_BYTES }}\n'
    "--speculative-config {{ DRAFTER }}\n{% endblock %}\n",
}
# `check` without Docker: the argument has the recorded facts of every node, and the variables are those of the model.
CHECK = """
import json, sys
from types import SimpleNamespace
from cluster import agreement, check
from cluster.models import find_model
from cluster.options import Known
from cluster.settings import load_settings

settings, told = load_settings(find_model("ursa")), json.loads(sys.argv[1])
for each in told.values():
    each["environment"] = {name: settings[name] for name in settings.forward} | each["environment"]
check.known_options = lambda *_: Known("0.31.0", {})
check.gated = lambda settings, *_: (settings, (), ())
check.ask_nodes = lambda head, *_: [agreement.Node(*each.split(), 1, told[each]) for each in told]
check.ask_server, check.settle = lambda _: None, lambda: None
agreement.repository_digest = lambda: "0123"
print(check.as_json(check.inspect(settings, SimpleNamespace(image=SimpleNamespace(id="a")))))
"""
TOLD = {
    "repository": "0123",
    "gpus": [{"name": "NVIDIA GB10", "memory": None}],
    "wrapper": {"sha256": "a", "words": "docker run ursa/vllm:2"},
    "image": "sha256:aa base@sha256:bb",
    "token": None,
    "weights": None,
    **dict.fromkeys(("python", "ray", "vllm", "torch"), "0.31.0"),
    "infiniband": ["uverbs0"],
    "memlock": -1,
    "ipc_lock": True,
    "network": "10.0.0.0/24",
    "links": {},
}


def test_a_new_model_of_an_unknown_architecture_is_planned_and_checked(tmp_path, copied):
    """Its own image, variables, drafter and size of the cache are taken as they are, and no JSON file is needed.

    A warning says what is not computed. The host's floor refuses what is too large, and the nodes are compared.
    """
    (tmp_path / "ursa").mkdir()
    for name, text in UNKNOWN_MODEL.items():
        (tmp_path / "ursa" / name).write_text(text)
    plan = copied("-m", "invoke", "plan", "--model", "ursa", KV_CACHE_BYTES="110G")
    assert "\n  --kv-cache-memory-bytes 110G" in plan.stdout and '"method":"eagle3"' in plan.stdout
    assert "\n  ursa/vllm:2" in plan.stdout and "\n  -e URSA_EXPERTS" in plan.stdout
    assert "WARNING memory-unknown: How many tokens the KV cache holds is not computed." in plan.stderr
    assert "WOULD BE REFUSED memory-floor: a Spark would keep" in plan.stderr

    def found(gib, experts="fused"):
        memory = {"MemTotal": int(121.7 * 2**30), "MemAvailable": int(gib * 2**30)}
        head = TOLD | {"host": "a/1", "memory": memory, "environment": {}}
        worker = head | {"host": "b/2", "environment": {"URSA_EXPERTS": experts}}
        told = json.dumps({"10.0.0.1 spark-1": head, "10.0.0.2 spark-2": worker})
        said = json.loads(copied("-c", CHECK, told).stdout)["findings"]
        return {one["rule"]: one["refuses"] for one in said if one["refuses"] or one["rule"].startswith("memory-")}

    assert found(117.4) == {"memory-unknown": False}
    assert found(100, "slow") == {"variables": True, "memory-unknown": False, "memory-floor": True}
