"""Mistakes that a person can make, each typed: one sentence on standard error, and nothing on standard output."""

import json
import os
import shlex
from pathlib import Path

import pytest
from invoke import Exit

import tasks
from cluster import health, options, recorder, served
from cluster.command import Command
from cluster.settings import load_settings
from cluster.token import make_token

LONG = f"/tmp/{'x' * 300}"
TYPED = [
    # SERVE_EXTRA against a knob, in every spelling
    ("launch --model qwen-30b", {"SERVE_EXTRA": "--port 9000"}, "SERVE_EXTRA has --port, which PORT writes. Take it"),
    ("plan --model qwen-30b", {"SERVE_EXTRA": "--seed 1 --host=::"}, "SERVE_EXTRA has --host, which HOST writes."),
    (
        "check --model qwen-30b",
        {"SERVE_EXTRA": "--max_model_len 5"},
        "has --max-model-len, which MAX_MODEL_LEN writes.",
    ),
    ("up --model qwen-30b", {"SERVE_EXTRA": "-tp 4"}, "SERVE_EXTRA has -tp, which TP_SIZE writes."),
    ("launch --model qwen-30b", {"SERVE_EXTRA": "--no-enable-prefix-caching"}, ", which ENABLE_PREFIX_CACHING writes."),
    ("launch --model qwen-30b", {"SERVE_EXTRA": "--reasoning-parser x"}, "which REASONING_PARSER writes."),
    ("launch --model nemotron", {"SERVE_EXTRA": "-q fp8"}, "SERVE_EXTRA has -q, which QUANTIZATION writes."),
    (
        "launch --model nemotron",
        {"ENABLE_MTP": "1", "SERVE_EXTRA": "--speculative-config.method x"},
        "ENABLE_MTP writes.",
    ),
    # a token's file that is none, or that cannot be reached
    ("head", {"RAY_AUTH_TOKEN_PATH": "/"}, "RAY_AUTH_TOKEN_PATH is /, a folder or an empty file. Type: ls -la /;"),
    ("head", {"RAY_AUTH_TOKEN_PATH": LONG}, f"{LONG}: File name too long. Type: namei -l {LONG}"),
    ("plan --model qwen-30b", {"RAY_AUTH_TOKEN_PATH": LONG}, f"{LONG}: File name too long."),
    # a password for every container
    (
        "head",
        {"VLLM_FORWARD_VARS": "A_PROXY", "A_PROXY": "http://me:marker@host:1"},
        "A_PROXY (shell) is not shown here",
    ),
    (
        "head",
        {"VLLM_FORWARD_VARS": "HTTPS_PROXY", "HTTPS_PROXY": "https://marker@host/"},
        "takes text without a password",
    ),
    ("head", {"VLLM_FORWARD_VARS": "MY_PASSPHRASE", "MY_PASSPHRASE": "marker"}, "which looks like a secret"),
    (
        "head",
        {"VLLM_FORWARD_VARS": "http://me:marker@host"},
        "VLLM_FORWARD_VARS lists 'http', which is no variable name",
    ),
    ("head", {"VLLM_IMAGE": "https://me:marker@host/a"}, "VLLM_IMAGE (shell) is not shown here, it may hold a secret"),
    ("head", {"VLLM_FORWARD_VARS": "OPTIND"}, "which bash, the container or this project sets for itself"),
    ("head", {"VLLM_FORWARD_VARS": "BASH_COMMAND"}, "which bash, the container or this project sets for itself"),
]


@pytest.mark.parametrize(
    ("line", "shell", "said"), TYPED, ids=[f"{line} {[*shell.items()][-1]}" for line, shell, _ in TYPED]
)
def test_a_mistake_is_a_sentence(line, shell, said, inv):
    """The cause is named before anything runs, and no password is repeated."""
    typed = inv(f"--dry {line}", **shell)
    assert typed.code and said in typed.err and "marker" not in typed.out + typed.err
    assert typed.out == ""


@pytest.mark.parametrize(
    "extra", ["--seed 1", "--dtype bfloat16", "--max-num-seqs 4", "--speculative-config {}", "-ep"]
)
def test_an_option_without_a_value_of_a_knob_may_be_added(extra, inv):
    """SERVE_EXTRA is for options that no knob writes; an empty knob writes none."""
    assert f"{shlex.split(extra)[0]}" in inv("--dry launch --model nemotron", SERVE_EXTRA=extra).out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/a b"), "/a b: Permission denied. Type: namei -l '/a b'"),
        (OSError(28, "No space left on device"), "No space left on device. Type: df -h"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused. Type: docker ps"),
        (OSError("Connection aborted"), "Connection aborted. Type: docker ps"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "A file or the terminal is not in UTF-8: 'ascii' codec"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "A file or the terminal is not in UTF-8: 'utf-8' codec",
        ),
    ],
)
def test_a_mistake_of_this_machine_ends_every_task_in_a_sentence(error, said, inv, operator):
    """Also where no line of ours expects the error."""

    def fails(*_: object) -> None:
        raise error

    operator.setattr(tasks.tokens, "make_token", fails)
    typed = inv("token")
    assert typed.code and said in typed.err and typed.out == ""


def test_a_mistake_of_ours_keeps_its_traceback(inv, operator):
    """A developer needs the place of a wrong name or type."""
    operator.setattr(tasks.tokens, "make_token", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        inv("token")


# --- Ray's token -----------------------------------------------------------------------------------------------------


def test_a_token_that_cannot_be_written_leaves_no_file(operator, tmp_path):
    """An empty file would be mounted, and Ray would ask for an empty token."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "token"
    operator.setattr(os, "write", full)
    with pytest.raises(Exit, match=rf"^{file} cannot be written: No space left on device\. Type: df -h "):
        make_token(load_settings(shell={"RAY_AUTH_TOKEN_PATH": str(file), "ENV_FILE": ""}))
    assert not file.exists()


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_token_is_refused(text, inv, tmp_path):
    """Ray would refuse every node. The message says how to make a token."""
    (tmp_path / "token").write_text(text)
    said = inv("--dry head", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert said.code and f"RAY_AUTH_TOKEN_PATH is {tmp_path}/token, a folder or an empty file." in said.err


@pytest.mark.parametrize(("mode", "noted"), [(0o600, False), (0o644, True)])
def test_a_token_is_for_its_owner(mode, noted, inv, tmp_path):
    """A token that other users can read brings the same note as such a `.env`."""
    (tmp_path / "token").write_text("0a")
    (tmp_path / "token").chmod(mode)
    said = inv("--dry head", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert (f"token holds a secret and others can read it: chmod 600 {tmp_path}" in said.err) is noted and not said.code


# --- .env ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["TUFSS0VS==", "/marker+S0VS=", "marker-more=1", "A=marker\\"])
def test_a_secret_that_goes_on_in_the_next_line_is_refused(tail, inv, env_file):
    """Only the number of the line is said, because the line is a part of the secret."""
    env_file.write_text(f"VLLM_API_KEY=QUJDREVGR0hJSktM\n{tail}\n")
    said = inv("--dry head")
    assert said.code and said.err == f"{env_file}, line 2: expected NAME=value, with closed quotes."


def test_a_name_without_a_value_that_nothing_knows_is_not_shown(inv, env_file):
    """A key in base64 may end in one `=`, and then looks like a name."""
    env_file.write_text("VLLM_API_KEY=QUJDREVGR0hJSktM\nTUFSS0VS=\n")
    said = inv("--dry head").err
    assert ".env, line 2, has an unknown name without a value. Is it the rest" in said
    assert "TUFSS0VS" not in said


# --- Odd answers, and odd files of our own ----------------------------------------------------------------------------

ODD = ["[]", "[1]", "null", "5", '"a"', "{}", '{"at": "x"}', '{"at": 1e999}', '{"at": [], "nodes": 1}', "[" * 9999]


@pytest.mark.parametrize("text", ODD)
def test_a_file_of_ours_with_another_json_counts_as_missing(text, operator, tmp_path):
    """Another version may have written the file, or a disk may have lost a part of it."""
    for module in (recorder, options):
        operator.setattr(module, "log_folder", lambda _: tmp_path)
    for name in ("vitals", "ended", "options-0123456789ab", "asked"):
        (tmp_path / f"{name}.json").write_text(text)
    assert (recorder.read_recorded({}), recorder.read_ended({}), type(recorder.read_lows({}))) == (None, None, dict)
    assert health.waited_in_vain(tmp_path / "asked.json", silent=True, hang=10) == 0


@pytest.mark.parametrize("told", ["a banner\n0\n5\nvllm\nserve\nx", "banner"])
def test_an_odd_state_of_the_server_is_not_no_server(told, operator):
    """A second server must not be started because a start-up file of bash prints a line."""
    operator.setattr(served, "run", lambda *_, **__: told)
    for ask in (served.ask_server, served.server_runs):
        with pytest.raises(Exit, match=r"^The state of the server in node-ray is unreadable: \['.*banner'"):
            ask(type("Head", (), {"name": "node-ray"}))


def test_a_line_of_rays_own_is_passed_over(operator, capfd):
    """`inv memory` goes on when Ray prints something else."""
    node = json.dumps({"10.0.0.1": dict.fromkeys(recorder.MEMORY, 1073741824)})
    ours = Command((("printf", f"a warning\\n{node}\\n[1]\\n{{half\\n"),))
    operator.setattr(recorder, "memory_command", lambda: ours)
    operator.setattr(recorder, "log_folder", lambda _: Path("/nowhere"))
    with pytest.raises(Exit, match="does not answer any more"):
        recorder.watch_memory({"MEM_FLOOR_GIB": "5"}, None)
    assert capfd.readouterr().err.count("GiB available") == 1
