"""A worker's task from the head's terminal: what ssh is given, what goes along, what is said when it fails."""

import os
import shlex
import subprocess

import pytest
from invoke import Exit

from command import run
from fleet import remote
from settings import models, resolve, version
from settings.names import NODE_OWN
from settings.resolve import Settings

KEYS = {"HF_TOKEN": "hf_marker", "VLLM_API_KEY": "sk_marker"}
SSH = ["ssh", "-n", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5"]
# Each in a setting of its own; MINE is forwarded.
HOSTILE = {
    "SERVED_NAME": " two  words ",
    "MODEL_CKPT": "a'b\"c\\d \\",
    "QUANTIZATION": "$(touch pwned) `touch pwned`",
    "KV_CACHE_DTYPE": "a; touch pwned & touch pwned | tee pwned >pwned",
    "MAMBA_SSM_DTYPE": "~root/*",
    "NCCL_DEBUG": "$HOME ${HOME} * ?[a-z] {a,b}",
    "NCCL_DEBUG_SUBSYS": "#no A=b#c !! !$ %s {{ 7 * 7 }} {% raw %} {# no #}",
    "MINE": "-é 漢字 🎉",
    "MAX_NUM_SEQS": "",
    "SERVE_EXTRA": "--x 'a b'",
}
OWN = {
    "VLLM_HOST_IP": "10.0.0.1",
    "NCCL_IB_GID_INDEX": "3",
    "SYSFS": "/sys",
    "CACHE_DIR": "/mine",
    "HF_CACHE": "/mine",
    "RAY_AUTH_TOKEN_PATH": "/mine",
    "WORKER_HOSTS": "spark-2",
    "REPO_DIR": "mine",
    "REHEARSAL_DIR": "/mine",
    "WATCH_INTERVAL_S": "7",
    "WATCH_FAILURES": "7",
    "WATCH_HOOK": "mine",
    "WATCH_COOLDOWN_S": "7",
    "WATCH_MAX": "7",
}


@pytest.fixture
def settled(operator):
    """Settings of nemotron as the head has them, by what the shell says, and by flags in small letters."""

    def settle(flags=None, **shell: str) -> Settings:
        return resolve.load(models.find("nemotron"), flags or {}, {"HOME": "/home/operator", "ENV_FILE": "", **shell})

    return settle


def there(wanted: remote.Remote) -> list[str]:
    """The words of a line that the shell on the worker reads."""
    return shlex.split(wanted.command.words[-1])


def test_every_value_reaches_the_worker_as_it_is(settled, tmp_path):
    """Through ssh a real shell reads it once more: words and variables arrive unchanged, and nothing else happens."""
    folder = tmp_path / "a spark's $(touch pwned); touch pwned"
    folder.mkdir()
    (folder / "inv").write_text('#!/bin/sh\n{ printf "%s\\0" "$@" "" ""; env -0; } >called\n')
    (folder / "inv").chmod(0o755)
    wanted = remote.worker(settled(**HOSTILE, **KEYS, VLLM_FORWARD_VARS="MINE", REPO_DIR=f"~/{folder.name}"), "spark-2")
    assert wanted.command.words[:-1] == [*SSH, "spark-2"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", wanted.command.words[-1]], cwd=tmp_path, env=env, check=True)
    called, found = (tmp_path / "called").read_text().split("\0\0\0")
    typed = ["worker", "--detach", "--model", "nemotron", "--head-ip", "10.0.0.1", "--repository", version.digest()]
    assert (called.split("\0"), {file.name for file in tmp_path.iterdir()}) == (typed, {folder.name, "called"})
    variables = dict(item.split("=", 1) for item in found.split("\0") if item)
    assert HOSTILE.items() <= variables.items() and KEYS.keys().isdisjoint(variables)


def test_down_there_is_the_same_task(settled):
    """Only for this head's own nodes."""
    wanted = remote.down(settled(REPO_DIR="/opt/spark", **KEYS), "me@spark-2", "10.0.0.9")
    assert wanted.command.words == [*SSH, "me@spark-2", "/opt/spark/inv down --here --head-ip 10.0.0.9"]
    assert wanted.task == "inv down --here --head-ip 10.0.0.9"


@pytest.mark.parametrize("name", ["SERVED_NAME", "REPO_DIR", "MODEL_CKPT"])
def test_a_value_of_two_lines_goes_nowhere(name, settled):
    """A line end would be a second command there; it is refused with the name of its setting."""
    with pytest.raises(Exit, match=f"{name} "):
        settled(**{name: "a\ntouch pwned"})


def test_what_shell_and_flags_say_is_handed_on(settled, env_file):
    """As they say it, set but empty too; what is in `.env` or a profile is each node's own."""
    env_file.write_text("MAX_NUM_SEQS=7\nKV_CACHE_DTYPE=auto\n")
    shell = {"NCCL_DEBUG": "", "MAX_MODEL_LEN": "1M", "KV_CACHE_DTYPE": "fp8", "HEAD_NODE_IP": "10.0.0.9"}
    found = settled({"MAX_MODEL_LEN": "256K"}, **shell, ENV_FILE=str(env_file))
    assert found["MAX_NUM_SEQS"] == "7"
    asked = there(remote.worker(found, "spark-2"))
    *given, inv = asked[: asked.index("worker")]
    assert given == ["env", "KV_CACHE_DTYPE=fp8", "MAX_MODEL_LEN=256K", "NCCL_DEBUG="] and inv.endswith("/inv")


def test_what_is_one_nodes_own_stays_here(settled):
    """Addresses, folders and the place of the repository are the worker's to know; a secret is nobody's."""
    assert OWN.keys() == set(NODE_OWN)
    found = settled(**OWN, **KEYS)
    assert {found.origin(name) for name in (*OWN, *KEYS)} == {"shell"}
    assert there(remote.worker(found, "spark-2"))[:2] == ["env", "mine/inv"]


@pytest.mark.parametrize("line", ["up --model nemotron", "down"])
def test_no_secret_is_in_what_is_run_or_said(line, inv, env_file):
    """From shell or `.env`: neither in a command of `up` or `down`, nor in anything that they say."""
    env_file.write_text("HF_TOKEN=hf_marker\n")
    said = inv(f"--dry {line}", VLLM_API_KEY="sk_marker", WORKER_HOSTS="spark-2")
    assert said.code == 0 and "\n  spark-2 \\\n" in said.out
    assert "marker" not in said.out + said.err


@pytest.mark.parametrize(
    ("said", "inv"),
    [
        (None, f"{models.ROOT}/inv"),
        ("/opt/spark", "/opt/spark/inv"),
        ("/opt/spark/", "/opt/spark/inv"),
        ("~/git/spark", "git/spark/inv"),
        ("git/spark", "git/spark/inv"),
    ],
)
def test_where_the_repository_is_there(said, inv, settled):
    """In this one's own folder, or in REPO_DIR: absolute, or from the home that ssh starts in."""
    wanted = remote.down(settled(**({"REPO_DIR": said} if said else {})), "spark-2", "10.0.0.1")
    assert there(wanted)[0] == inv


def test_a_repository_that_is_the_home_itself(settled):
    """A folder, so that the shell there runs a file in it, and asks no PATH."""
    asked = [remote.down(settled(REPO_DIR=said), "spark-2", "10.0.0.1") for said in ("~", "~/", ".", "./")]
    assert {there(wanted)[0] for wanted in asked} == {"./inv"}


@pytest.mark.parametrize("said", ["/opt/a=b", "=", "-x", ""])
def test_a_repository_that_env_would_misread_is_refused(said, settled):
    """What `env` is given after the variables is a command: neither another variable nor an option."""
    with pytest.raises(Exit, match=r"^REPO_DIR \(shell\) is .*; it takes a folder without an equals sign"):
        settled(REPO_DIR=said)


def test_the_workers_are_hosts_or_else_addresses(settled):
    """WORKER_HOSTS as ssh knows them, empty is none; without it WORKER_IP; as many as the model needs."""
    assert remote.needed(settled(WORKER_IP="10.0.0.2,10.0.0.3")) == ["10.0.0.2"]
    assert remote.needed(settled(WORKER_HOSTS="me@spark-2,spark-3.local")) == ["me@spark-2"]
    assert remote.needed(settled(WORKER_HOSTS="a,b,c,d", TP_SIZE="2", PP_SIZE="2")) == ["a", "b", "c"]
    assert remote.needed(settled(WORKER_HOSTS="", TP_SIZE="1")) == []
    assert settled(WORKER_HOSTS="a,b,c,d", TP_SIZE="2").workers() == ["a", "b", "c", "d"]


def test_a_worker_that_is_named_twice_is_one(settled):
    """Two lines to one host would be one node too few, and two who take it down."""
    assert settled(WORKER_HOSTS="b,a,b").workers() == ["b", "a"]
    with pytest.raises(Exit, match=r"needs 2 workers .* names 1: a"):
        remote.needed(settled(WORKER_HOSTS="a,a", TP_SIZE="3"))


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ({"WORKER_HOSTS": ""}, "needs 1 workers .* WORKER_HOSTS .shell. names 0: none. Set it in .env"),
        ({"TP_SIZE": "4"}, "needs 3 workers .* WORKER_IP .default. names 1: 10.0.0.2. Set it in .env"),
    ],
)
def test_too_few_workers_are_refused(shell, said, settled):
    """Before anything starts, with how many there should be, and where those were named."""
    with pytest.raises(Exit, match=said):
        remote.needed(settled(**shell))


@pytest.mark.parametrize("hosts", ["-oProxyCommand", "spark-2,-v", "a b", "a;b", "$(id)", "a,,b", ",", "a\n"])
def test_a_host_that_ssh_would_misread_is_refused(hosts, inv):
    """What begins with a dash would be an option of ssh."""
    said = inv("--dry down", WORKER_HOSTS=hosts)
    assert said.code and said.out == "" and "it takes ssh destinations, comma separated" in said.err


@pytest.mark.parametrize(
    ("status", "last", "hint"),
    [
        (255, "Permission denied (publickey).", "That is ssh's own status. Type: ssh -v spark-2 true"),
        (127, "env: 'x/inv': No such file or directory", "Clone it to the same folder, or say where it is: REPO_DIR"),
        (126, "env: 'x/inv': Permission denied", "Is this repository there?"),
        (1, "No idea what '--repository' is!", "The repository there is another version. On spark-2, in it: git pull"),
        (1, "The engine is down.", None),
        (2, "", None),
    ],
)
def test_a_failure_names_node_command_and_last_lines(status, last, hint, settled, monkeypatch):
    """And, where the status tells more, what to do; the status stays what it was."""

    def told(command, who, seconds):
        assert seconds == 7
        raise Exit(last, code=status)

    monkeypatch.setattr(run, "told", told)
    with pytest.raises(Exit) as failed:
        remote.run_there(remote.down(settled(), "spark-2", "10.0.0.1"), 7)
    lines = failed.value.message.splitlines()
    task = "inv down --here --head-ip 10.0.0.1"
    assert lines[0] == f"spark-2: `{task}` failed with status {status}. Its last lines:"
    assert lines[1] == f"  {last or '(it said nothing)'}" and failed.value.code == status
    assert len(lines) == 2 + bool(hint) and (hint is None or hint in lines[2])
