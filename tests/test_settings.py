"""Settings: which source wins, which values are taken, and how a refusal or a note reads."""

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress

import pytest
from invoke import Exit

from cluster import models, settings
from cluster.models import Model, find_model
from cluster.notes import operator_notes, overridden
from cluster.repository import ROOT
from cluster.settings import CORE, Settings, load_settings


def noted(found: Settings, shell: Mapping[str, str] = os.environ) -> list[str]:
    """Return the notes about these settings."""
    return list(operator_notes(found, shell))


@pytest.fixture
def settle(operator):
    """Load the settings of one run: settle("nemotron", {"MAX_MODEL_LEN": "1M"}, PORT="1")."""

    def settled(model: str | None = "nemotron", flags: dict | None = None, **shell: str) -> Settings:
        return load_settings(find_model(model) if model else None, flags, {**os.environ, **shell})

    return settled


@pytest.mark.parametrize(
    ("flag", "shell", "dotenv", "value", "origin"),
    [
        ("1", "2", "3", "1", "flag --max-len"),
        (None, "2", "3", "2", "shell"),
        (None, None, "3", "3", ".env"),
        (None, None, None, "1048576", "nemotron/120b.env"),
    ],
)
def test_a_flag_beats_the_shell_and_so_on(flag, shell, dotenv, value, origin, settle, env_file):
    """A flag beats the shell, the shell beats .env, .env beats the profile."""
    env_file.write_text(f"MAX_MODEL_LEN={dotenv}\n" if dotenv else "")
    settings = settle("nemotron", {"MAX_MODEL_LEN": flag}, **({"MAX_MODEL_LEN": shell} if shell else {}))
    assert (settings["MAX_MODEL_LEN"], settings.origin("MAX_MODEL_LEN")) == (value, origin)


def test_a_profile_beats_the_default_and_the_default_is_last(settle):
    """A profile may replace a default. A setting that is set nowhere is absent."""
    assert settle("rehearsal")["VLLM_IMAGE"] == "rehearsal/vllm-ray"
    assert settle("nemotron").origin("VLLM_IMAGE") == "default"
    assert "NCCL_IB_GID_INDEX" not in settle("nemotron")


def test_a_setting_of_the_operator_is_shown_with_its_origin(inv, env_file):
    """A run begins with one line for each value of a flag, the shell and .env, and for no other."""
    env_file.write_text("PORT=8001\nMOE_BACKEND=\nHF_TOKEN=hf_marker\n")
    err = inv("--dry launch --model nemotron --max-len 256k", SYSFS="/sys", SERVED_NAME="mine").err
    assert err.splitlines() == [
        f"ENV_FILE = {env_file} (shell)",
        "HF_TOKEN set (.env)",
        "MAX_MODEL_LEN = 256000 (flag --max-len)",
        "MOE_BACKEND = (empty) (.env)",
        "PORT = 8001 (.env)",
        "SERVED_NAME = mine (shell)",
        "SYSFS = /sys (shell)",
        "To paste these lines, first export HF_TOKEN: they are set in a file, not in this shell.",
    ]


@pytest.mark.parametrize("where", ["shell", "dotenv"])
def test_set_but_empty_is_a_value(where, settle, env_file):
    """An empty value in the shell or in .env replaces the profile's value."""
    env_file.write_text("MOE_BACKEND=\n" if where == "dotenv" else "MOE_BACKEND=triton\n")
    assert settle(**({"MOE_BACKEND": ""} if where == "shell" else {}))["MOE_BACKEND"] == ""


REFUSED = {
    "GPU_MEM_UTIL": [
        "inf",
        "nan",
        "0,85",
        "1e0",
        "abc",
        "-1",
        "+0.5",
        "",
        "0",
        "0.0",
        "1.01",
        " 0.5",
        "0.5 ",
        "\u0660.\u0665",
    ],
    "GPU_MEM_UTIL_MAX": ["", "2", "-0.1", "1e0"],
    "MAX_MODEL_LEN": ["", "0", "-1", "1.5M", "1T", "1 M", "1e6", "auto", "K", "0x10", "\u0661"],
    "MAX_NUM_SEQS": ["0", "-1", "4.0", "four", "1K"],
    "MAX_NUM_BATCHED_TOKENS": ["0", "-1", "x"],
    "CUDAGRAPH_CAPTURE_SIZE": ["0", "-128"],
    "TP_SIZE": ["", "0", "two", "-2", "2 "],
    "PP_SIZE": ["", "0"],
    "PORT": ["", "0", "65536", "-1", "80a", "8000/tcp", "99999999999999999999999"],
    "OBJECT_STORE_MEMORY": ["", "0", "1G"],
    "WAIT_HEAD_S": ["", "-1", "1.5", "soon"],
    "HANG_S": ["", "0", "-1", "0.5", "5m"],
    "STALL_S": ["", "0"],
    "WATCH_INTERVAL_S": ["", "0"],
    "NCCL_IB_GID_INDEX": ["-1", "a"],
    "HEAD_NODE_IP": ["", "spark-1", "10.0.0", "10.0.0.256", "10.0.0.1:6379", "-1.2.3.4", "010.0.0.1"],
    "VLLM_HOST_IP": ["", "localhost"],
    "WORKER_IP": ["", "10.0.0.2,", "10.0.0.2 10.0.0.3", "spark-2"],
    "HOST": ["", "localhost", "*", "-1"],
    "PRIMARY_IF": ["", "a b", "eth0,eth1", "../eth0", "x" * 16, "é"],
    "DATA_IFS": ["eth0,", "eth0 eth1", ",", "a;b"],
    "RDMA_HCAS": ["mlx5_0:1", ",", "a b"],
    "VLLM_IMAGE": ["", "-it", "a//b", "--privileged", "a b", "$(id)", "a;b", "é"],
    "BASE_IMAGE": ["", "--network=host"],
    "TAG": ["", "-t"],
    "RAY_VERSION": ["", "2.60 ", "latest;", "-1"],
    "CACHE_DIR": ["", "relative", "/a:b", "/a:/b:ro"],
    "HF_CACHE": ["", ".", "/x:/y"],
    "INCLUDE_DASHBOARD": ["true", "2", "yes"],
    "ENABLE_EAGER": ["true", "2", "on", " 1"],
    "MODEL_CKPT": ["", "-x", "--api-key"],
    "SERVED_NAME": ["", "-x"],
    "PARSER_REVISION": ["", "--help"],
    "MOE_BACKEND": ["-x", "--trust-remote-code"],
    "REASONING_PARSER": ["--x"],
    "NCCL_DEBUG": ["-x"],
    "REQUIRED_SECRETS": ["HF_TOKENVLLM_API_KEY", "HF_TOKEN,VLLM_API_KEY"],
    "SERVE_EXTRA": ["'", '--a "b', "x\\"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_of_the_wrong_form_is_refused_in_a_sentence(name, settle):
    """A refusal names the setting, its origin, its value and the values that it takes."""
    for value in REFUSED[name]:
        with pytest.raises(Exit) as refusal:
            settle(None if name in CORE else "nemotron", **{name: value})
        said = refusal.value.message
        got = "not shown here, it may hold a secret" if name == "SERVE_EXTRA" else repr(value)
        assert said.startswith(f"{name} (shell) is {got}; it takes ") and said.endswith(".")
        assert said.count("\n") == 0 and refusal.value.code


TAKEN = {
    "GPU_MEM_UTIL": {"0.85": "0.85", ".5": ".5", "0.7": "0.7"},
    "MAX_MODEL_LEN": {"1M": "1048576", "1m": "1000000", "256K": "262144", "256k": "256000", "007": "7"},
    "PORT": {"1": "1", "65535": "65535", "08000": "8000"},
    "TP_SIZE": {"16": "16"},
    "HOST": {"::": "::", "::1": "::1", "127.0.0.1": "127.0.0.1"},
    "WORKER_IP": {"10.0.0.2,10.0.0.3": "10.0.0.2,10.0.0.3"},
    "VLLM_IMAGE": {
        "nvcr.io/nvidia/vllm:26.05-py3": "nvcr.io/nvidia/vllm:26.05-py3",
        "a:5/b@sha256:0": "a:5/b@sha256:0",
    },
    "CACHE_DIR": {"~/c": "/home/operator/c", "/a b": "/a b", "/$HOME": "/$HOME"},
    "INCLUDE_DASHBOARD": {"1": "1", "0": "", "": ""},
    "RDMA_HCAS": {"": "", "mlx5_0": "mlx5_0", "a,b": "a,b"},
    "SERVED_NAME": {"a b": "a b", "a-b": "a-b"},
    "WAIT_HEAD_S": {"0": "0"},
    "HANG_S": {"1": "1", "0300": "300"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_value_of_the_right_form_is_brought_to_one_spelling(name, settle):
    """Numbers become plain digits, tokens are counted out, and ~ becomes the home folder."""
    assert {value: settle(**{name: value})[name] for value in TAKEN[name]} == TAKEN[name]


@pytest.mark.parametrize("char", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\udcff"], ids=ascii)
def test_control_characters_are_refused_everywhere(char, settle):
    """No value may break a line or move a cursor. The refusal shows the character escaped."""
    for name in ("SERVED_NAME", "CACHE_DIR", "VLLM_FORWARD_VARS", "SERVE_EXTRA", "HF_TOKEN", "PORT"):
        with pytest.raises(Exit) as refusal:
            settle(**{name: f"/a{char}b"})
        assert refusal.value.message.startswith(f"{name} (shell) is ") and refusal.value.message.isprintable()


@pytest.mark.parametrize(
    ("line", "origin"),
    [
        ("--dry launch --model nemotron --max-len 'a lot'", "MAX_MODEL_LEN (flag --max-len)"),
        ("plan --model nemotron --max-len 'a lot'", "MAX_MODEL_LEN (flag --max-len)"),
        ("--dry worker --head-ip 'a lot'", "HEAD_NODE_IP (flag --head-ip)"),
        ("--dry build-image --base-image 'a lot'", "BASE_IMAGE (flag --base-image)"),
        ("--dry build-image --tag 'a lot'", "TAG (flag --tag)"),
        ("--dry head", "PORT (.env)"),
    ],
)
def test_a_refusal_names_flag_or_file(line, origin, inv, env_file):
    """The refusal says which flag or file the value came from."""
    env_file.write_text("PORT=a lot\n" if origin.endswith("(.env)") else "")
    said = inv(line)
    assert said.code and said.out == "" and said.err.startswith(f"{origin} is 'a lot'; it takes ")


def test_more_memory_than_the_host_can_give_is_refused(settle):
    """GPU_MEM_UTIL is at most GPU_MEM_UTIL_MAX. The operator may set that higher."""
    with pytest.raises(Exit, match=r"^GPU_MEM_UTIL \(shell\) is 0.86; .* GPU_MEM_UTIL_MAX, which is 0.85 \(default\)"):
        settle(GPU_MEM_UTIL="0.86")
    assert settle(GPU_MEM_UTIL="0.86", GPU_MEM_UTIL_MAX="0.9")["GPU_MEM_UTIL"] == "0.86"
    with pytest.raises(Exit, match=r"^GPU_MEM_UTIL \(nemotron/120b.env\) is 0.75; .* 0.7 \(shell\)"):
        settle(GPU_MEM_UTIL_MAX="0.7")


@pytest.mark.parametrize(("abort", "floor", "warn"), [("5", "5", "12"), ("4", "13", "12"), ("6", "0", "12")])
def test_limits_of_memory_in_the_wrong_order_are_refused(abort, floor, warn, settle):
    """A guard at the floor would end what a launch allows. A MEM_ABORT_GIB of 0 means no guard."""
    with pytest.raises(
        Exit, match=rf"^MEM_ABORT_GIB is {abort} \(shell\), .* MEM_ABORT_GIB must be below MEM_FLOOR_GIB \(or 0\)"
    ):
        settle(MEM_ABORT_GIB=abort, MEM_FLOOR_GIB=floor, MEM_WARN_GIB=warn)
    assert settle(MEM_ABORT_GIB="0", MEM_FLOOR_GIB="0", MEM_WARN_GIB="0")["MEM_FLOOR_GIB"] == "0"


# --- The typed line ---


@pytest.fixture
def typed(inv, operator):
    """Types `inv launch …` or `inv up …` and returns the settings with which the task goes to work."""

    def type_it(line: str, **shell: str) -> Settings:
        got = []
        operator.setattr("cluster.up.bring_up", lambda settings, *_: got.append(settings))
        operator.setattr("cluster.guards.before_launch", got.append)
        operator.setattr("cluster.check.inspect", lambda *_: sys.exit())
        with suppress(SystemExit):
            inv(line, SYSFS="/sys", RDMA_HCAS="", VLLM_HOST_IP="10.0.0.1", **shell)
        return got[0]

    return type_it


BEFORE = "RDMA_HCAS= SYSFS=/sys VLLM_HOST_IP=10.0.0.1"
KEYS = {"HF_TOKEN": "hf_marker", "VLLM_API_KEY": "sk_marker", "WATCH_HOOK": "/hook marker"}


@pytest.mark.parametrize("task", ["launch --detach", "up --keep"])
def test_a_remedy_repeats_what_was_typed(task, typed, env_file):
    """Flags and the shell's settings stay, changed where the remedy changes them. A secret and `.env` stay out."""
    env_file.write_text("PORT=8001\n")
    task, own = task.split()
    line = f"{task} --model nemotron --max-len 256K --allow memory-low {own}"
    found = typed(line, SERVED_NAME="a b", GPU_MEM_UTIL="0.8", **KEYS)
    before = f"ENV_FILE={env_file} GPU_MEM_UTIL={{}} " + BEFORE.replace(" SYSFS", " SERVED_NAME='a b' SYSFS")
    assert found.line() == f"{before} inv {line}".format("0.8")
    assert found.line(GPU_MEM_UTIL="0.7") == f"{before} inv {line}".format("0.7")
    assert found.line(MAX_MODEL_LEN="1") == f"{before} inv {line.replace('256K', '1')}".format("0.8")


def test_a_remedy_for_another_task_keeps_its_model(typed):
    """`head` and `worker` get the model and the shell's settings. After an `up` it is `up`, which starts all nodes."""
    assert typed("launch --model nemotron --max-len 1M").line("head") == f"ENV_FILE= {BEFORE} inv head --model nemotron"
    up = f"ENV_FILE= {BEFORE} inv up --model nemotron --max-len 1M"
    for where in ("here", "elsewhere"):
        assert typed("up --model nemotron --max-len 1M").line("head", where) == up


def test_a_remedy_for_another_node_has_nothing_of_this_node(typed):
    """This node's own address would be refused on the other node, and its ENV_FILE may not be there."""
    assert typed("launch --model nemotron").line("worker", "elsewhere") == "RDMA_HCAS= inv worker --model nemotron"


# --- .env ---


def test_nothing_in_dotenv_is_expanded(settle, env_file):
    """`${X}` stays as written: one setting never depends on another or on the shell."""
    env_file.write_text('SERVED_NAME="${HOME}-$(id)"\nCACHE_DIR=/$USER\n')
    settings = settle()
    assert (settings["SERVED_NAME"], settings["CACHE_DIR"]) == ("${HOME}-$(id)", "/$USER")


def test_dotenv_reads_quotes_comments_and_exports(settle, env_file):
    """Quotes, comments and `export` are understood. The last line of a name counts."""
    env_file.write_text("# ours\nexport PORT=1 # first\nPORT=2\nSERVED_NAME='a # b'\n\nHEAD_NODE_IP = 10.1.1.1\n")
    settings = settle()
    assert (settings["PORT"], settings["SERVED_NAME"], settings["HEAD_NODE_IP"]) == ("2", "a # b", "10.1.1.1")


@pytest.mark.parametrize("line", ["PORT", "PORT: 8000", "a b c", 'PORT="8000', "= 1", "\x1b[31mPORT=1"])
def test_a_malformed_line_is_named(line, settle, env_file):
    """A line of .env that is no NAME=value is refused by its number. Its text may be a secret and is not shown."""
    env_file.write_text(f"HOST=::\n{line}\n")
    with pytest.raises(Exit, match=r"site.env, line 2: expected NAME=value, with closed quotes\.$"):
        settle()


def test_a_dotenv_that_is_no_text_is_refused(settle, env_file):
    """No setting takes bytes that are no UTF-8. A comment may have them."""
    env_file.write_bytes(b"# \xff\nPORT=1\n")
    assert settle()["PORT"] == "1"
    env_file.write_bytes(b"SERVED_NAME=\xff\n")
    with pytest.raises(Exit, match=r"^SERVED_NAME \(.env\) is '.*'; it takes "):
        settle()


def test_an_env_file_that_is_not_there_is_refused(settle):
    """An ENV_FILE that does not exist is refused. Only an empty ENV_FILE means no file."""
    for file in ("/no/such/file", "/dev/zero"):
        with pytest.raises(Exit, match=rf"^{file} is no file that can be read\. ENV_FILE may name another"):
            settle(ENV_FILE=file)


@pytest.mark.parametrize(
    ("name", "near"), [("HEAD_NODE_IPS", "HEAD_NODE_IP"), ("MAX_MODEL_LENGTH", "MAX_MODEL_LEN"), ("COLOUR", None)]
)
def test_an_unknown_name_in_dotenv_is_a_note_with_the_nearest(name, near, settle, env_file):
    """A name that nothing knows is reported, because a typing error would otherwise go unseen."""
    env_file.write_text(f"{name}=1\n")
    hint = f" (did you mean {near}?)" if near else ""
    assert noted(settle()) == [f".env sets {name}, which nothing knows{hint}."]


def test_a_variable_that_a_setting_decides_is_a_note(settle, env_file):
    """`.env` of an older script may have NCCL's own variables."""
    env_file.write_text("NCCL_IB_HCA=rocep1s0f1\n")
    said = ".env sets NCCL_IB_HCA, but every container gets it from RDMA_HCAS: set RDMA_HCAS."
    assert noted(settle()) == [said]


def test_a_knob_of_another_model_in_dotenv_is_known(settle, env_file):
    """One .env serves all models, so a knob that this model lacks is no mistake."""
    env_file.write_text("ENABLE_PREFIX_CACHING=0\nENABLE_MTP=1\nVLLM_FORWARD_VARS=MINE\nMINE=1\n")
    assert noted(settle("nemotron")) == noted(settle("qwen-30b")) == []


def test_a_knob_in_the_shell_that_this_run_does_not_use_is_a_note(settle):
    """`ENABLE_MTP=1 inv launch --model qwen-30b` changes nothing, and a note says so."""
    said = noted(settle("qwen-30b"), {"ENABLE_MTP": "1"})
    assert said == ["ENABLE_MTP is set in the shell, but this run does not use it."]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ENABLE_MPT", "ENABLE_MPT is set in the shell, and nothing here knows it (did you mean ENABLE_MTP?)."),
        ("NCCL_IB_HCA", "NCCL_IB_HCA is set in the shell, but every container gets it from RDMA_HCAS: set RDMA_HCAS."),
        (
            "VLLM_ENGINE_READY_TIMEOUT_S",
            "VLLM_ENGINE_READY_TIMEOUT_S is set in the shell, but every container gets it from ENGINE_TIMEOUT_S: "
            "set ENGINE_TIMEOUT_S.",
        ),
        ("GPU_MEM_UTILS", "GPU_MEM_UTILS is set in the shell, and nothing here knows it (did you mean GPU_MEM_UTIL?)."),
        *((name, None) for name in ("HOSTNAME", "HF_HOME", "NCCL_DEBUG_FILE", "XDG_CACHE_HOME", "LANG", "SSH_TTY")),
    ],
)
def test_a_name_in_the_shell_that_does_nothing_is_a_note(name, said, settle):
    """A typing error, and a variable that the bring-up sets itself, would otherwise go unseen."""
    assert noted(settle(), {name: "1"}) == ([said] if said else [])


def test_a_variable_in_a_dotenv_that_a_setting_writes_is_a_note(settle, env_file):
    """The note names the setting, as it does for the shell."""
    env_file.write_text("MASTER_ADDR=10.0.0.9\n")
    assert "but every container gets it from HEAD_NODE_IP: set HEAD_NODE_IP." in noted(settle())[0]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
@pytest.mark.parametrize("text", ["HF_TOKEN=hf_marker\n", "VLLM_API_KEY=sk_marker\n"])
def test_a_dotenv_with_a_secret_is_for_its_owner(mode, warned, text, settle, env_file):
    """A secret that other users can read brings a note with the chmod to type. A file without a secret brings none."""
    env_file.write_text(text)
    env_file.chmod(mode)
    said = noted(settle())
    assert said == ([f"{env_file} holds a secret and others can read it: chmod 600 {env_file}"] if warned else [])
    env_file.write_text("PORT=1\n")
    assert noted(settle()) == []


@pytest.fixture
def site(operator, tmp_path):
    """Load settings in a checkout whose folders have a `.env`: site({"nemotron": "PORT=1"}, "nemotron")."""
    operator.delenv("ENV_FILE")
    for module in (settings, models):
        operator.setattr(module, "ROOT", tmp_path)
    (tmp_path / "nemotron").mkdir()
    for name in ("120b", "cluster"):
        shutil.copy(ROOT / f"nemotron/{name}.env", tmp_path / "nemotron")

    def settled(files: dict[str, str], model: str | None = "nemotron", **shell: str) -> Settings:
        for folder, text in files.items():
            (tmp_path / folder / ".env").write_text(text)
            (tmp_path / folder / ".env").chmod(0o644)
        found = Model("nemotron", "120b", "nemotron") if model else None
        return load_settings(found, {}, {**os.environ, **shell})

    return settled


def test_a_models_dotenv_beats_the_roots(site, tmp_path):
    """`nemotron/.env` is read for its model, wins over `.env`, and its origin is shown. Secrets in it are noted."""
    files = {"": "PORT=1\nHOST=::\nHF_TOKEN=hf_marker", "nemotron": "PORT=2\nMOE_BACKEND=\nVLLM_API_KEY=sk\nCOLOUR=1"}
    found = site(files)
    assert (found["PORT"], found.origin("PORT"), found["HOST"]) == ("2", "nemotron/.env", "::")
    assert {"PORT = 2 (nemotron/.env)", "VLLM_API_KEY set (nemotron/.env)"} <= {*overridden(found)}
    assert noted(found) == [
        "nemotron/.env sets COLOUR, which nothing knows.",
        f"nemotron/.env holds a secret and others can read it: chmod 600 {tmp_path}/nemotron/.env",
        f".env holds a secret and others can read it: chmod 600 {tmp_path}/.env",
    ]
    assert found.handed_on() == {} and found["MOE_BACKEND"] == ""
    assert site({}, PORT="3")["PORT"] == "3" and site({}, None)["PORT"] == "1"
    assert site({}, ENV_FILE="")["PORT"] == "8000"


# --- Profiles ---


@pytest.fixture
def profile(operator, tmp_path, settle):
    """Load the settings of a profile with this text, beside qwen's template."""

    def settled(text: str, **shell: str) -> Settings:
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "8b.env").write_text(text)
        operator.setattr(models, "ROOT", tmp_path)
        operator.setattr(Model, "serve", "qwen/serve.j2")
        return load_settings(Model("mine", "8b", "mine"), {}, {"ENV_FILE": "", **shell})

    return settled


QWEN = """MODEL_CKPT=a/b\nSERVED_NAME=x\nTP_SIZE=2\nMAX_MODEL_LEN=64K\nGPU_MEM_UTIL=0.5\nMAX_NUM_SEQS=
MAX_NUM_BATCHED_TOKENS=\nENABLE_PREFIX_CACHING=\nENABLE_TRUST_REMOTE_CODE=\nREASONING_PARSER=\nTOOL_CALL_PARSER=\n"""


def test_a_whole_profile_is_taken(profile):
    """A profile sets each name that its template uses, and may set other settings too."""
    assert profile(QWEN + "VLLM_IMAGE=mine:1\n")["VLLM_IMAGE"] == "mine:1"


def test_an_unknown_key_in_a_profile_is_an_error(profile):
    """The refusal names the file, the key and the nearest key that exists."""
    with pytest.raises(Exit, match=r"mine/8b.env sets MAX_NUM_SEQ, .* \(did you mean MAX_NUM_SEQS\?\)"):
        profile(QWEN + "MAX_NUM_SEQ=4\n")


def test_a_key_that_a_profile_lacks_is_an_error(profile):
    """A profile must set each name that its template uses. The refusal names the file."""
    with pytest.raises(Exit, match=r"mine/8b.env lacks SERVED_NAME, TP_SIZE, which "):
        profile(QWEN.replace("SERVED_NAME=x\nTP_SIZE=2\n", ""))


def test_a_value_of_the_wrong_form_in_a_profile_names_the_file(profile):
    """A profile's values have the same forms as the operator's."""
    with pytest.raises(Exit, match=r"^TP_SIZE \(.*mine/8b.env\) is 'two'; it takes a whole number"):
        profile(QWEN.replace("TP_SIZE=2", "TP_SIZE=two"))
