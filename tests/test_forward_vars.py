"""VLLM_FORWARD_VARS: the variables that both containers start with, and those that never get in."""

import re
import shlex

import pytest

NEMOTRON = [
    "VLLM_NVFP4_GEMM_BACKEND",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND",
    "VLLM_USE_FLASHINFER_MOE_FP4",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
]


@pytest.fixture
def forwarded(inv):
    """What is forwarded to the containers, name and value, beyond what every container gets; and what was said."""
    standard = set(_exports(inv("--dry head").out))

    def typed(flags: str = "", **shell: str) -> tuple[dict[str, str], str]:
        said = inv(f"--dry head {flags}", **shell)
        assert said.code == 0, said.err
        exported = _exports(said.out)
        assert re.findall(r"^  -e (\w+) \\$", said.out, re.M) == list(exported)
        return {name: exported[name] for name in exported if name not in standard}, said.err

    return typed


def _exports(out: str) -> dict[str, str]:
    return dict(shlex.split(line)[1].split("=", 1) for line in re.findall("^export .*$", out, re.M))


def test_without_a_model_only_the_operators_list_counts(forwarded):
    """`inv head` forwards what the operator names, and nothing of any profile."""
    assert forwarded()[0] == {}
    assert forwarded(VLLM_FORWARD_VARS="A B", A="1", B="two words")[0] == {"A": "1", "B": "two words"}


def test_the_operators_list_adds_to_the_profiles(forwarded):
    """The profile's variables are in both containers whatever the operator lists besides."""
    names = list(forwarded("--model nemotron", VLLM_FORWARD_VARS="A VLLM_ALLOW_LONG_MAX_MODEL_LEN", A="1")[0])
    assert names == [*NEMOTRON, "A"]


def test_qwen_forwards_nothing(forwarded):
    """A model without a cluster.env needs no variable in both containers."""
    assert forwarded("--model qwen-30b")[0] == {}


def test_the_operator_has_the_last_word_on_a_forwarded_value(forwarded, env_file):
    """A forwarded variable is a setting like any other: shell, then .env, then the profile; its origin is said."""
    env_file.write_text("VLLM_FORWARD_VARS=MINE\nMINE=from dotenv\nVLLM_USE_FLASHINFER_MOE_FP4=1\n")
    values, err = forwarded("--model nemotron", VLLM_NVFP4_GEMM_BACKEND="cutlass")
    assert values["MINE"] == "from dotenv"
    assert values["VLLM_USE_FLASHINFER_MOE_FP4"] == "1"
    assert values["VLLM_NVFP4_GEMM_BACKEND"] == "cutlass"
    assert "VLLM_NVFP4_GEMM_BACKEND = cutlass (shell)" in err and "MINE = from dotenv (.env)" in err


@pytest.mark.parametrize("shell", [{}, {"MINE": ""}], ids=["unset", "empty"])
def test_a_listed_name_without_a_value_is_reported(shell, forwarded):
    """Docker drops an unset name in silence; here it is said, and the name stays out of the command line."""
    values, err = forwarded(VLLM_FORWARD_VARS="MINE", **shell)
    assert values == {}
    assert "VLLM_FORWARD_VARS lists MINE, which is unset or empty: no container gets it." in err


def test_a_profiles_variable_emptied_by_the_operator_is_reported(forwarded):
    """Set-but-empty holds for forwarded variables too, and is not silent."""
    values, err = forwarded("--model nemotron", VLLM_NVFP4_GEMM_BACKEND="")
    assert list(values) == NEMOTRON[1:]
    assert "lists VLLM_NVFP4_GEMM_BACKEND, which is unset or empty" in err


@pytest.mark.parametrize("name", ["1A", "A-B", "A=1", "A;B", "$(id)", "é", "--privileged", "A,B"])
def test_a_name_that_is_no_variable_name_is_refused(name, inv):
    """The list is names with spaces between them; anything else is a misunderstanding."""
    said = inv("--dry head", VLLM_FORWARD_VARS=f"GOOD {name}")
    assert said.code and said.out == ""
    assert f"VLLM_FORWARD_VARS lists {name!r}, which is no variable name" in said.err


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "my_password", "MyToken", "KEY", "HUGGING_FACE_HUB_TOKEN"],
)
def test_a_name_that_looks_like_a_secret_is_refused(name, inv):
    """What a container starts with can be read in `docker inspect`: no secret goes that way."""
    said = inv("--dry worker", VLLM_FORWARD_VARS=name, **{name: "marker"})
    assert said.code and said.out == "" and "marker" not in said.err
    assert f"VLLM_FORWARD_VARS lists {name}, which looks like a secret" in said.err


@pytest.mark.parametrize("name", ["VLLM_IMAGE", "VLLM_FORWARD_VARS"])
def test_this_projects_own_names_are_never_in_a_container(name, inv):
    """vLLM warns of VLLM_* names that it does not know, so the project's own stay outside: listed, they are refused."""
    said = inv("--dry head", VLLM_FORWARD_VARS=name)
    assert said.code and said.out == "" and f"lists {name}, which is this project's own" in said.err


def test_settings_that_nobody_forwards_stay_outside(inv):
    """The operator's own settings and environment do not leak into the container by being set."""
    said = inv("--dry head --model nemotron", VLLM_IMAGE="mine:1", VLLM_LOGGING_LEVEL="DEBUG", PORT="1", FOO="bar")
    assert {"VLLM_IMAGE", "VLLM_FORWARD_VARS", "VLLM_LOGGING_LEVEL", "PORT", "FOO"}.isdisjoint(_exports(said.out))


@pytest.mark.parametrize(
    ("name", "value"),
    [("MINE", "007"), ("MINE", "a=b c"), ("MINE", "-1"), ("ENABLE_MINE", "0"), ("ENABLE_MINE", "true")],
)
def test_a_forwarded_value_is_handed_on_as_it_stands(name, value, forwarded):
    """What the project knows nothing about it does not judge: it goes by name, where nothing can misread it."""
    assert forwarded(VLLM_FORWARD_VARS=name, **{name: value})[0] == {name: value}


def test_nccls_own_switches_are_passed_on_only_if_set(forwarded):
    """NCCL_DEBUG, its parts and the GID index reach the containers when the operator says so, and are never made up."""
    own = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_IB_GID_INDEX": "3"}
    assert forwarded()[0] == {}
    assert forwarded(**own)[0] == own
    assert forwarded(NCCL_DEBUG="")[0] == {}
