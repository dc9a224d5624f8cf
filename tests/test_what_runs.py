"""The printed text is what runs: pasted into a real bash, it starts the words and variables of its commands."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
from invoke import Exit

from cluster import health, image, links, load, node, plan, server, up
from cluster.command import ENDINGS, Command, words_of
from cluster.models import find_model
from cluster.node import CONTAINER
from cluster.repository import ROOT
from cluster.settings import Settings, load_settings

STUB = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\1\\0'; env -0; printf '\\1\\0'; } >>"$CALLS"
echo said
"""
# ssh reads its standard input unless told not to. setsid runs behind `&`, beside the others.
SSH = STUB + 'case " $* " in *" -n "*) ;; *) cat >/dev/null ;; esac\n'
SETSID = STUB.replace("$CALLS", "$CALLS.behind")
KEYS = {"HF_TOKEN": "hf_marker", "VLLM_API_KEY": "sk_marker"}
TEXTS = (
    *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "MODEL_CKPT", "SERVED_NAME", "QUANTIZATION", "KV_CACHE_DTYPE"),
    *("MAMBA_SSM_DTYPE", "MOE_BACKEND", "REASONING_PARSER", "TOOL_CALL_PARSER", "PARSER_REVISION"),
)
HOSTILE = [
    " two  words é 漢字 🎉 \u00a0" + "x" * 1000 + " ",
    "a'b\"c\\d \\",
    "$(touch pwned) `touch pwned`; touch pwned & touch pwned | tee pwned >pwned",
    "~root/* $HOME ${HOME} ?[a-z] {a,b}",
    "#no A=b#c !! !$ %s {{ 7 * 7 }} {% raw %} {# no #}",
]


@pytest.fixture
def stubs(operator, tmp_path) -> Path:
    """A folder of programs, first on the PATH. They only write down their words and their environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = dict.fromkeys(("docker", "mkdir", "nvidia-smi"), STUB) | {"ssh": SSH, "setsid": SETSID}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    operator.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    operator.setenv("CALLS", str(tmp_path / "calls"))
    return folder


@pytest.fixture
def calls(stubs, tmp_path) -> Callable[..., list[tuple[list[str], dict[str, str]]]]:
    """Return the words and the environment of each call since the last time."""

    def read(file: str = "calls") -> list[tuple[list[str], dict[str, str]]]:
        parts = (tmp_path / file).read_text().split("\1\0")[:-1]
        (tmp_path / file).unlink()
        seen = [part.split("\0")[:-1] for part in parts]
        return [
            (words, dict(item.split("=", 1) for item in env)) for words, env in zip(seen[::2], seen[1::2], strict=True)
        ]

    return read


@pytest.fixture
def pasted(stubs, tmp_path) -> Callable[[str], None]:
    """Pastes text into a real bash, in a folder that must stay empty."""

    def paste(text: str) -> None:
        nowhere = tmp_path / "nowhere"
        nowhere.mkdir(exist_ok=True)
        subprocess.run(["bash"], input=text.encode(), cwd=nowhere, check=True, env={**os.environ, **KEYS})
        assert list(nowhere.iterdir()) == []

    return paste


def _settings(model: str | None, sysfs: Path, **shell: str) -> Settings:
    environment = {**os.environ, "SYSFS": str(sysfs), **shell}
    return load_settings(find_model(model) if model else None, {}, environment)


def _check(commands: list[Command], seen: list[tuple[list[str], dict[str, str]]]) -> None:
    asked = [words_of(lines) for command in commands for lines in command.asks.values()]
    seen = [(words, env) for words, env in seen if words not in asked]
    assert [words for words, _ in seen] == [command.words for command in commands]
    for command, (_, env) in zip(commands, seen, strict=True):
        assert env | dict(command.env) == env


def test_hostile_values_reach_the_programs_as_they_are(inv, pasted, calls, sysfs):
    """Every setting that takes text takes any text, and bash hands it to docker unchanged, as one word."""
    shell = dict(zip(TEXTS, cycle(HOSTILE)))
    everything = "".join(HOSTILE)
    shell |= {"CACHE_DIR": f"/{everything}", "VLLM_FORWARD_VARS": "MINE", "MINE": everything}
    shell["SERVE_EXTRA"] = shlex.join(["--x", *HOSTILE, ""])
    pasted(inv("plan --model nemotron", **shell).out)
    seen = calls()
    _check(plan.plan_commands(_settings("nemotron", sysfs(), **shell)), seen)
    assert [env["MINE"] for words, env in seen if words[:2] == ["docker", "run"]] == [everything] * 2
    (serve,) = (words for words, _ in seen if "vllm" in words)
    name, served = shell["MODEL_CKPT"], shell["SERVED_NAME"]
    assert serve[serve.index("vllm") : serve.index("--host")] == ["vllm", "serve", name, "--served-model-name", served]
    assert serve[-7:] == ["--x", *HOSTILE, ""]


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("stop", [server.stop_command()]),
        ("cleanup", [node.removal_command()]),
        ("health", [health.gpu_command(), health.gpu_command(CONTAINER)]),
    ],
)
def test_short_commands_paste_as_they_are(line, commands, inv, pasted, calls):
    """The lines of stop, cleanup and health start one program each, and nothing around it."""
    pasted(inv(f"--dry {line}").out)
    _check(commands, calls())


def test_build_image_runs_what_it_prints(inv, pasted, calls, sysfs):
    """A real build-image and its dry text pasted start the same programs, with the same answers by name."""
    pasted(inv("--dry build-image").out)
    from_paste = calls()
    assert inv("build-image").out == ""
    assert [words for words, _ in calls()] == [words for words, _ in from_paste]
    *asks, (build, env) = from_paste
    command = image.build_command(_settings(None, sysfs()))
    assert [words for words, _ in asks] == [words_of(lines) for lines in command.asks.values()]
    assert build == command.words
    assert env | dict.fromkeys(command.asks, "said") == env


def test_up_and_down_paste_as_they_are(inv, pasted, calls, addresses, sysfs, tmp_path):
    """The head runs behind, the rest in order. An ssh that read its standard input would swallow the next lines."""
    (tmp_path / "node-ray").mkdir()  # bash itself opens the log, and the mkdir here makes nothing
    shell = {"CACHE_DIR": str(tmp_path), "WORKER_HOSTS": "spark-2,spark-3,spark-4", "TP_SIZE": "4"}
    settings = _settings("nemotron", sysfs(), **shell)
    folders, container, *rest = up.up_commands(settings, node.network(settings, links.find_links(settings["SYSFS"])))
    pasted(inv("--dry up --model nemotron", **shell).out + "wait\n")
    asked = [words_of(lines) for lines in container.asks.values()]
    _check([folders, *rest], [(words, env) for words, env in calls() if words not in asked])
    _check([container], [(words[1:], env) for words, env in calls("calls.behind")])
    assert [command.words[0] for command in rest] == [*["ssh"] * 3, *["docker"] * 3]
    pasted(inv("--dry down", **shell).out)
    _check(up.down_commands(settings), calls())


def test_launch_runs_what_it_prints(inv, pasted, calls, sysfs, monkeypatch):
    """Launch starts the commands of its dry text in their order: fetch, serve, record, follow."""
    pasted(inv("--dry launch --model nemotron").out)
    from_paste = calls()
    monkeypatch.setattr(load, "PAUSE_S", 0.005)
    monkeypatch.setattr(load.guards, "running_node", lambda _: None)
    monkeypatch.setattr(load.served, "server_runs", lambda _: False)
    monkeypatch.setattr(load, "note_load", lambda _: None)
    with pytest.raises(Exit, match="The server has ended"):
        load.launch_model(_settings("nemotron", sysfs(), **KEYS), ["10.0.0.1"], detached=False)
    really = calls()
    assert [words for words, _ in really] == [words for words, _ in from_paste]
    assert [words[-1] for words, _ in really][-1] == "follow"
    for words, env in [*from_paste, *really]:
        assert {name: env[name] for name in KEYS if name in words} == {
            name: KEYS[name] for name in KEYS if name in words
        }


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDINGS], ids=lambda number: number.name)
def test_a_signal_while_the_server_starts_waits_for_its_recorder(number, stubs, calls, sysfs):
    """A server that loads without its recorder could starve its host of memory."""
    (stubs / "docker").write_text(STUB + f'case "$*" in *" serve "*) kill -{number:d} $PPID ;; esac\n')
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            server.begin(_settings("qwen-30b", sysfs(), **KEYS), offline=False)
    finally:
        signal.signal(number, before)
    commands = server.launch_commands(_settings("qwen-30b", sysfs(), **KEYS), detached=True)
    assert [words for words, _ in calls()] == [command.words for command in commands]


def test_a_secret_that_is_missing_stops_the_paste(inv, stubs, tmp_path):
    """Pasted without the keys, a launch starts no server: `: "${NAME:?}"` comes first."""
    text = inv("--dry launch --model qwen-30b").out
    done = subprocess.run(["bash"], input=text.encode(), stderr=subprocess.PIPE, check=False)
    assert done.returncode and b"VLLM_API_KEY" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_nothing_in_invokes_own_environment_changes_the_text(inv, real_run):
    """Standard output is command lines only: no echo, no colour, no setting or folder of Invoke's gets in."""
    lines = ("build-image", "launch --model nemotron", "stop", "health", "cleanup")
    assert real_run.stdout == "".join(inv(f"--dry {line}").out for line in lines)


def test_stop_gives_the_container_the_script(stubs, pasted, inv, operator, tmp_path):
    """A container of an earlier version lacks serve.sh, so bash there reads the script from standard input.

    After the stop the task also waits, by the same script, for what the server has left.
    """
    (stubs / "docker").write_text(f"#!/bin/sh\ncat >>{tmp_path}/given\necho $6 >>{tmp_path}/asked\n")
    operator.setattr("cluster.guards.before_stop", lambda: None)
    pasted(inv("--dry stop").out)
    assert inv("stop").code == 0
    assert (tmp_path / "given").read_text() == 3 * (ROOT / "cluster/inside/serve.sh").read_text()
    assert (tmp_path / "asked").read_text().split() == ["stop", "stop", "settle"]
