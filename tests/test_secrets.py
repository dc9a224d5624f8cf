"""Secrets are passed by name: the value of a secret is in no output and in no command line."""

import os
import re
import subprocess

import pytest

from cluster import check

HF, KEY = "hf_marker7", "sk_marker7"
SECRETS = {"HF_TOKEN": HF, "VLLM_API_KEY": KEY}
LINES = [
    *("--dry build-image", "--dry stop", "--dry health", "--dry cleanup", "--dry memory"),
    *(f"{task} --model nemotron" for task in ("--dry head", "--dry worker", "--dry launch", "--dry up", "plan")),
]


@pytest.mark.parametrize("line", LINES)
def test_no_secret_is_printed(line, inv):
    """No task prints the value of a secret, on either stream."""
    said = inv(line, **SECRETS)
    assert said.code == 0 and "marker7" not in said.out + said.err


def test_no_secret_of_dotenv_is_printed(inv, env_file):
    """A secret in .env is shown as set, with its origin."""
    env_file.write_text(f"HF_TOKEN={HF}\nVLLM_API_KEY='{KEY}'\n")
    said = inv("plan --model nemotron")
    assert "marker7" not in said.out + said.err
    assert {"HF_TOKEN set (.env)", "VLLM_API_KEY set (.env)"} <= set(said.err.splitlines())


def test_the_nodes_containers_get_no_secret(inv):
    """The line of `docker run` does not even name HF_TOKEN and VLLM_API_KEY."""
    for task in ("head", "worker"):
        out = inv(f"--dry {task} --model nemotron", **SECRETS).out
        assert "HF_TOKEN" not in out and "API_KEY" not in out


def test_the_server_takes_its_secrets_by_name(inv):
    """`docker exec` gets the names alone, and a pasted line stops if a required secret is missing."""
    out = inv("--dry launch --model nemotron", **SECRETS).out
    serve = out[out.index(': "${HF_TOKEN:?}" && \\\n: "${VLLM_API_KEY:?}" && \\\ndocker exec') :]
    assert re.findall(r"^  -e (.*) \\$", serve, re.M) == ["HF_TOKEN", "VLLM_API_KEY"]


@pytest.mark.parametrize(
    ("name", "broken"), [("HF_TOKEN", "marker7\n"), ("HF_TOKEN", "mar\x1bker7"), ("VLLM_API_KEY", "marker7\udcff")]
)
def test_a_malformed_secret_is_not_shown(name, broken, inv):
    """The refusal of a secret shows its name and origin, and not its value."""
    said = inv("--dry launch --model nemotron", **{name: broken})
    assert said.code and said.out == "" and "ker7" not in said.err
    assert f"{name} (shell)" in said.err


@pytest.mark.parametrize("line", [f"VLLM_API_KEY: {KEY}", f'VLLM_API_KEY="{KEY}', KEY, f"{KEY} {HF}"])
def test_a_malformed_line_of_dotenv_is_not_shown(line, inv, env_file):
    """The message does not show the line, because the line may hold a part of a secret."""
    env_file.write_text(f"{line}\n")
    said = inv("--dry launch --model nemotron")
    assert said.code and said.out == "" and "marker7" not in said.err


@pytest.mark.parametrize(
    "words",
    [
        f"--api-key {KEY}",
        f"--api_key={KEY}",
        f"--seed 1 '--api-ke' {KEY}",
        f"--hf-token {HF}",
        f"--hf-t {HF}",
    ],
)
def test_a_secret_among_the_extra_words_is_refused_and_not_shown(words, inv):
    """SERVE_EXTRA refuses a key, which every user could read in `ps`. The refusal does not repeat it."""
    said = inv("--dry launch --model nemotron", SERVE_EXTRA=words)
    assert said.code and said.out == "" and "SERVE_EXTRA (shell)" in said.err
    assert "marker7" not in said.err


def test_a_secret_in_no_argv(inv, operator, env_file, tmp_path):
    """A program gets the secrets of .env in its environment, and none among its words."""
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >>"$SEEN.argv"\nenv >>"$SEEN.env"\necho said\n')
    (tmp_path / "docker").chmod(0o755)
    operator.setenv("SEEN", str(tmp_path / "seen"))
    env_file.write_text(f"HF_TOKEN={HF}\nVLLM_API_KEY={KEY}\n")
    operator.setattr("cluster.load.PAUSE_S", 0.005)
    operator.setattr("cluster.guards.before_launch", lambda settings: None)
    operator.setattr("cluster.guards.running_node", lambda what_next: None)
    operator.setattr("cluster.served.server_runs", lambda head: False)
    operator.setattr(check, "inspect", lambda settings, head: check.foresee(settings))
    said = inv("launch --model nemotron", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "marker7" not in said.out + said.err
    assert "marker7" not in (tmp_path / "seen.argv").read_text()
    assert {f"HF_TOKEN={HF}", f"VLLM_API_KEY={KEY}"} <= set((tmp_path / "seen.env").read_text().splitlines())


def test_a_paste_at_a_prompt_stops_at_a_missing_secret(inv, tmp_path):
    """An interactive bash would go on with the next line after a failed `${NAME:?}`, so the command is on that line."""
    (tmp_path / "docker").write_text('#!/bin/sh\ntouch "$RAN"\n')
    (tmp_path / "docker").chmod(0o755)
    (text,) = (text for text in inv("--dry launch --model qwen-30b").out.split("\n\n") if "vllm serve" in text)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAN": str(tmp_path / "ran")}
    for keys, ran in (({}, False), ({"VLLM_API_KEY": KEY}, True)):
        subprocess.run(
            ["bash", "--norc", "-i"], input=text + "\n", env=env | keys, text=True, capture_output=True, check=False
        )
        assert (tmp_path / "ran").exists() == ran


def test_a_hook_is_not_shown(inv, env_file):
    """WATCH_HOOK may hold a key of the operator, so only the fact that it is set is shown."""
    said = inv("--dry down --here", WATCH_HOOK="hook --key marker7")
    assert "WATCH_HOOK set (shell)" in said.err and "marker7" not in said.out + said.err
    env_file.write_text("WATCH_HOOK=\n")
    assert "WATCH_HOOK = (empty) (.env)" in inv("--dry down --here").err
    said = inv("--dry down --here", WATCH_HOOK="'marker7")
    assert said.code and "WATCH_HOOK (shell)" in said.err and "marker7" not in said.err
