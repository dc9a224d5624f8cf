"""Models are data: a folder or a file more is a model more, with its names and tasks, and no Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from invoke import Exit

import tasks
from settings import models

ROOT = Path(__file__).resolve().parent.parent


def test_every_profile_is_a_model():
    """`<folder>/<size>.env` beside a serve.j2 is a model; cluster.env is what its containers start with."""
    files = {file for serve in ROOT.glob("*/serve.j2") for file in serve.parent.glob("*.env")}
    found = {ROOT / model.folder / f"{model.size}.env" for model in models.known().values()}
    assert found == {file for file in files if file.name != "cluster.env"}


@pytest.mark.parametrize(
    ("called", "name"),
    [("nemotron", "nemotron"), ("nemotron-120b", "nemotron"), ("qwen-30b", "qwen-30b"), ("qwen-122b", "qwen-122b")],
)
def test_a_folder_with_one_model_answers_to_both_names(called, name):
    """The full name always works; a folder's own name does where there is no doubt."""
    assert models.find(called).name == name


@pytest.mark.parametrize("called", ["qwen", "nemotrom", "", "../nemotron", "nemotron/120b", "cluster", "qwen-cluster"])
@pytest.mark.parametrize("line", ["--dry launch", "--dry head", "plan"])
def test_an_unknown_model_is_refused_with_those_that_there_are(called, line, inv):
    """Not a traceback: the names, in a sentence."""
    said = inv(f"{line} --model '{called}'")
    assert said.code and said.out == ""
    assert f"No model is called {called!r}." in said.err and ", ".join(models.known()) in said.err


def test_the_nearest_name_is_offered():
    """A typing error is answered with what was probably meant."""
    with pytest.raises(Exit, match=r"Did you mean nemotron\?"):
        models.find("nemotorn")


@pytest.mark.parametrize("name", models.known())
def test_each_model_has_a_launch_task_of_its_own(name, inv):
    """`inv launch-NAME` is `inv launch --model NAME`, its flags too."""
    assert inv(f"--dry launch-{name} --max-len 256").out == inv(f"--dry launch --model {name} --max-len 256").out


def test_there_is_no_launch_task_without_a_model():
    """The tasks are made from the profiles, and not written out."""
    made = {name.removeprefix("launch-") for name in tasks.ns.task_names if name.startswith("launch-")}
    assert made == set(models.known())


def test_a_new_model_is_a_folder_and_no_python(tmp_path):
    """A copy of this project with one folder more launches its models, whatever their files are called."""
    for part in ("tasks.py", "cluster", "command", "host", "settings", "templates", "nemotron", ".env.example"):
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
