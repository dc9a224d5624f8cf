"""A worker's task from the head's terminal: the words for ssh, the settings that go along, the message if it fails."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from invoke import Exit

from cluster import remote, repository, up
from cluster.command import Command
from cluster.models import find_model
from cluster.settings import OF_ONE_NODE, ModelSettings, load_settings

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
    "ENV_FILE": "",
    "VLLM_HOST_IP": "10.0.0.1",
    "NCCL_IB_GID_INDEX": "3",
    "SYSFS": "/sys",
    "CACHE_DIR": "/mine",
    "HF_CACHE": "/mine",
    "RAY_AUTH_TOKEN_PATH": "/mine",
    "WORKER_HOSTS": "spark-2",
    "REPO_DIR": "mine",
    "SHIP_VIA": "10.0.0.2",
    "REHEARSAL_DIR": "/mine",
    "WATCH_INTERVAL_S": "7",
    "WATCH_FAILURES": "7",
    "WATCH_HOOK": "mine",
    "WATCH_COOLDOWN_S": "7",
    "WATCH_MAX": "7",
}


@pytest.fixture
def settled(operator):
    """Makes the settings of nemotron on the head from flags and from the variables of the shell."""

    def settle(flags=None, **shell: str) -> ModelSettings:
        environment = {"HOME": "/home/operator", "ENV_FILE": "", **shell}
        return load_settings(find_model("nemotron"), flags or {}, environment)

    return settle


def there(command: Command) -> list[str]:
    """The words that the shell on the worker reads."""
    return shlex.split(command.words[-1])


def test_every_value_reaches_the_worker_as_it_is(settled, tmp_path):
    """The shell on the worker reads the line once more. Words and variables arrive unchanged, and nothing else runs."""
    folder = tmp_path / "a spark's $(touch pwned); touch pwned"
    folder.mkdir()
    (folder / "inv").write_text('#!/bin/sh\n{ printf "%s\\0" "$@" "" ""; env -0; } >called\n')
    (folder / "inv").chmod(0o755)
    wanted = up.worker_up_command(
        settled(**HOSTILE, **KEYS, VLLM_FORWARD_VARS="MINE", REPO_DIR=f"~/{folder.name}"), "spark-2"
    )
    assert wanted.words[:-1] == [*SSH, "spark-2"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run(["bash", "-c", wanted.words[-1]], cwd=tmp_path, env=env, check=True)
    called, found = (tmp_path / "called").read_text().split("\0\0\0")
    typed = [
        "worker",
        "--detach",
        "--model",
        "nemotron",
        "--head-ip",
        "10.0.0.1",
        "--repository",
        repository.repository_digest(),
    ]
    assert (called.split("\0"), {file.name for file in tmp_path.iterdir()}) == (typed, {folder.name, "called"})
    variables = dict(item.split("=", 1) for item in found.split("\0") if item)
    assert HOSTILE.items() <= variables.items() and KEYS.keys().isdisjoint(variables)


def test_down_on_a_worker_names_the_head(settled):
    """The worker removes its node only if the node belongs to this head."""
    wanted = up.worker_down_command(settled(REPO_DIR="/opt/spark", **KEYS), "me@spark-2", "10.0.0.9")
    assert wanted.words == [*SSH, "me@spark-2", "/opt/spark/inv down --here --head-ip 10.0.0.9"]
    assert wanted.alias == "me@spark-2: `inv down --here --head-ip 10.0.0.9`"


@pytest.mark.parametrize("name", ["SERVED_NAME", "REPO_DIR", "MODEL_CKPT"])
def test_a_value_of_two_lines_is_refused(name, settled):
    """A line end would begin a second command on the worker. The message names the setting."""
    with pytest.raises(Exit, match=f"{name} "):
        settled(**{name: "a\ntouch pwned"})


def test_settings_of_shell_and_flags_are_handed_on(settled, env_file):
    """Their values go unchanged, even empty ones. Values of `.env` and profile do not go: the worker has its own."""
    env_file.write_text("MAX_NUM_SEQS=7\nKV_CACHE_DTYPE=auto\n")
    shell = {"NCCL_DEBUG": "", "MAX_MODEL_LEN": "1M", "KV_CACHE_DTYPE": "fp8", "HEAD_NODE_IP": "10.0.0.9"}
    found = settled({"MAX_MODEL_LEN": "256K"}, **shell, ENV_FILE=str(env_file))
    assert found["MAX_NUM_SEQS"] == "7"
    asked = there(up.worker_up_command(found, "spark-2"))
    *given, inv = asked[: asked.index("worker")]
    assert given == ["env", "KV_CACHE_DTYPE=fp8", "MAX_MODEL_LEN=256K", "NCCL_DEBUG="] and inv.endswith("/inv")


def test_settings_of_one_node_are_not_handed_on(settled):
    """Addresses, folders and the place of the repository differ from node to node. Secrets never go."""
    assert OWN.keys() == set(OF_ONE_NODE)
    found = settled(**OWN, **KEYS)
    assert {found.origin(name) for name in (*OWN, *KEYS)} == {"shell"}
    assert there(up.worker_up_command(found, "spark-2"))[:2] == ["env", "mine/inv"]


@pytest.mark.parametrize("line", ["up --model nemotron", "down"])
def test_no_command_or_message_has_a_secret(line, inv, env_file):
    """Commands and messages of `up` and `down` hold no secret of the shell or of `.env`."""
    env_file.write_text("HF_TOKEN=hf_marker\n")
    said = inv(f"--dry {line}", VLLM_API_KEY="sk_marker", WORKER_HOSTS="spark-2")
    assert said.code == 0 and "\n  spark-2 \\\n" in said.out
    assert "marker" not in said.out + said.err


@pytest.mark.parametrize(
    ("said", "inv"),
    [
        (None, f"{repository.ROOT}/inv"),
        ("/opt/spark", "/opt/spark/inv"),
        ("/opt/spark/", "/opt/spark/inv"),
        ("~/git/spark", "./git/spark/inv"),
        ("git/spark", "git/spark/inv"),
    ],
)
def test_the_folder_of_the_repository_on_the_worker(said, inv, settled):
    """The folder is the same as here, or REPO_DIR: absolute, or below the home folder, where ssh starts."""
    wanted = up.worker_down_command(settled(**({"REPO_DIR": said} if said else {})), "spark-2", "10.0.0.1")
    assert there(wanted)[0] == inv


def test_a_repository_that_is_the_home_itself(settled):
    """The word is `./inv`, because a shell would look for `inv` on the PATH."""
    asked = [up.worker_down_command(settled(REPO_DIR=said), "spark-2", "10.0.0.1") for said in ("~", "~/", ".", "./")]
    assert {there(wanted)[0] for wanted in asked} == {"./inv"}


@pytest.mark.parametrize("said", ["/opt/a=b", "=", "-x", ""])
def test_a_repository_that_env_would_misread_is_refused(said, settled):
    """`env` runs the first word that is neither an option nor a variable."""
    with pytest.raises(Exit, match=r"^REPO_DIR \(shell\) is .*; it takes a folder without an equals sign"):
        settled(REPO_DIR=said)


def test_a_checkout_that_env_would_misread_is_refused(settled, monkeypatch):
    """`env` on the worker would take /opt/a=b/inv for a variable, and `worker` for a program."""
    monkeypatch.setattr(repository, "ROOT", Path("/opt/a=b"))
    with pytest.raises(Exit, match=r"^/opt/a=b has an equals sign, .* set REPO_DIR"):
        up.worker_down_command(settled(), "spark-2", "10.0.0.1")
    assert there(up.worker_down_command(settled(REPO_DIR="/opt/spark"), "spark-2", "10.0.0.1"))[0] == "/opt/spark/inv"


def test_the_workers_are_hosts_or_else_addresses(settled):
    """WORKER_HOSTS names the ssh hosts, and may be empty. If it is unset, WORKER_IP counts."""
    assert up.workers_needed(settled(WORKER_IP="10.0.0.2,10.0.0.3")) == ["10.0.0.2"]
    assert up.workers_needed(settled(WORKER_HOSTS="me@spark-2,spark-3.local")) == ["me@spark-2"]
    assert up.workers_needed(settled(WORKER_HOSTS="a,b,c,d", TP_SIZE="2", PP_SIZE="2")) == ["a", "b", "c"]
    assert up.workers_needed(settled(WORKER_HOSTS="", TP_SIZE="1")) == []
    assert settled(WORKER_HOSTS="a,b,c,d", TP_SIZE="2").workers() == ["a", "b", "c", "d"]


def test_a_worker_that_is_named_twice_is_one(settled):
    """If one host counted twice, the model would lack a node."""
    assert settled(WORKER_HOSTS="b,a,b").workers() == ["b", "a"]
    with pytest.raises(Exit, match=r"needs 2 workers .* names 1: a"):
        up.workers_needed(settled(WORKER_HOSTS="a,a", TP_SIZE="3"))


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ({"WORKER_HOSTS": ""}, "needs 1 workers .*WORKER_HOSTS .shell. names 0: none. Set it in .env"),
        ({"TP_SIZE": "4"}, "needs 3 workers .*WORKER_IP .default. names 1: 10.0.0.2. Set it in .env"),
    ],
)
def test_too_few_workers_are_refused(shell, said, settled):
    """`up` refuses before it starts anything. The message names the number of workers and the setting."""
    with pytest.raises(Exit, match=said):
        up.workers_needed(settled(**shell))


def test_a_host_that_ssh_would_misread_is_refused(inv):
    """ssh would take a host that begins with a dash for an option."""
    for hosts in ("-oProxyCommand", "spark-2,-v", "a b", "a;b", "$(id)", "a,,b", ",", "a\n"):
        said = inv("--dry down", WORKER_HOSTS=hosts)
        assert said.code and said.out == "" and "it takes ssh destinations, comma separated" in said.err


@pytest.mark.parametrize(
    ("status", "last", "hint"),
    [
        (255, "Permission denied (publickey).", "That is the status of ssh itself. Type: ssh -v spark-2 true"),
        (127, "env: 'x/inv': No such file or directory", "in the same folder or in REPO_DIR?"),
        (126, "env: 'x/inv': Permission denied", "Is this repository there, in the same folder"),
        (1, "No idea what '--repository' is!", "In it, type: git pull"),
        (1, "The engine is down.", None),
        (2, "", None),
    ],
)
def test_a_failure_names_node_command_and_last_lines(status, last, hint, settled, tmp_path, operator, capfd):
    """For some exit statuses the message adds the next command. The exit status is passed on."""
    (tmp_path / "ssh").write_text(f"#!/bin/sh\nprintf %s {shlex.quote(last)} >&2; exit {status}\n")
    (tmp_path / "ssh").chmod(0o755)
    operator.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Exit) as failed:
        remote.run_there("spark-2", up.worker_down_command(settled(), "spark-2", "10.0.0.1"), 7)
    first, *lines = failed.value.message.splitlines()
    assert first.rstrip(":.") == f"spark-2: `inv down --here --head-ip 10.0.0.1` failed with status {status}"
    assert failed.value.code == status and lines[:1] == ([f"  {last}"] if last else [])
    assert len(lines) == bool(last) + bool(hint) and (hint is None or hint in lines[-1])
    assert capfd.readouterr() == ("", f"spark-2 | {last}\n" if last else "")


@pytest.mark.parametrize(
    ("shell", "config", "options"),
    [
        ({}, "hostname 192.168.1.5\nport 22", ["HostName=10.0.0.2", "HostKeyAlias=192.168.1.5"]),
        ({}, "hostname spark-2.lan\nport 2222", ["HostName=10.0.0.2", "HostKeyAlias=[spark-2.lan]:2222"]),
        ({}, "hostname x\nport 22\nhostkeyalias spark", ["HostName=10.0.0.2", "HostKeyAlias=spark"]),
        ({"SHIP_VIA": "10.9.0.2"}, "hostname x\nport 22", ["HostName=10.9.0.2", "HostKeyAlias=x"]),
        ({"SHIP_VIA": ""}, "hostname x\nport 22", []),
        ({"WORKER_IP": "10.0.0.2,10.0.0.3"}, "hostname x\nport 22", []),
    ],
    ids=["another address", "another port", "an alias", "SHIP_VIA", "empty", "lists of two lengths"],
)
def test_bytes_take_the_fast_link_with_the_host_key_of_the_name(settled, operator, tmp_path, shell, config, options):
    """ssh connects to the fast address, and compares the key with the one that it knows for the worker's own name."""
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n[ \"$*\" = '-G spark-2' ] && cat <<'END'\n{config}\nEND\n")
    (tmp_path / "ssh").chmod(0o755)
    operator.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = settled(WORKER_HOSTS="spark-2", **shell)
    words = remote.ssh_command(found, "spark-2", ["true"], fast=True).words
    assert [word for word in words if "Host" in word] == options
    assert not [word for word in remote.ssh_command(found, "spark-2", ["true"]).words if "Host" in word]


def test_every_host_that_fails_is_named_and_the_others_act():
    """One host that fails keeps no other from acting."""
    acted = []

    def act(host):
        if host == "spark-3":
            raise Exit("spark-3: no route")
        if host == "spark-4":
            raise OSError("odd")
        acted.append(host)

    failed = remote.at_once(["spark-2", "spark-3", "spark-4"], act)
    assert acted == ["spark-2"] and failed == {"spark-3": "spark-3: no route", "spark-4": "spark-4: odd"}
