"""VLLM_FORWARD_VARS: the variables that both containers start with, and the names that are refused."""

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
    """Return the variables that the list brings into the containers, and the text on standard error."""
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
    """`inv head` without a model forwards the names of the operator, and no profile's."""
    assert forwarded()[0] == {}
    assert forwarded(VLLM_FORWARD_VARS="A B", A="1", B="two words")[0] == {"A": "1", "B": "two words"}


def test_the_operators_list_adds_to_the_profiles(forwarded):
    """The profile's variables stay on the list when the operator lists others."""
    names = list(forwarded("--model nemotron", VLLM_FORWARD_VARS="A VLLM_ALLOW_LONG_MAX_MODEL_LEN", A="1")[0])
    assert names == [*NEMOTRON, "A"]


def test_every_container_starts_with_the_allocator_and_the_engines_limits(inv, forwarded):
    """One setting feeds vLLM's three limits. VLLM_FORWARD_VARS may still give one of them a value of its own."""
    limits = ("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "RAY_CGRAPH_get_timeout", "VLLM_ENGINE_READY_TIMEOUT_S")
    said = inv("--dry worker", ENGINE_TIMEOUT_S="60", PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512")
    exported = _exports(said.out)
    assert [exported[name] for name in limits] == ["60"] * 3
    assert exported["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "ENGINE_TIMEOUT_S = 60 (shell)" in said.err and limits[0] not in said.err
    listed = _exports(inv("--dry head", VLLM_FORWARD_VARS=limits[2], VLLM_ENGINE_READY_TIMEOUT_S="7200").out)
    assert [listed[name] for name in limits] == ["1800", "1800", "7200"]
    assert "PYTORCH_CUDA_ALLOC_CONF=''" in inv("--dry head", PYTORCH_CUDA_ALLOC_CONF="").out


@pytest.mark.parametrize("option", ["--kv-transfer-config '{}'", "--kv_transfer_config={}", "--kv-offloading-size 16"])
def test_expandable_segments_are_dropped_beside_a_kv_connector(inv, option):
    """vLLM refuses the two together. A note says what is missing, and a value of the operator's stays."""
    for line in ("--dry head --model nemotron", "--dry worker --model nemotron"):
        said = inv(line, SERVE_EXTRA=option)
        assert _exports(said.out)["PYTORCH_CUDA_ALLOC_CONF"] == ""
        assert "PYTORCH_CUDA_ALLOC_CONF is empty, because vLLM refuses expandable_segments:True beside --kv" in said.err
    own = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    said = inv(line, SERVE_EXTRA=option, **own)
    assert _exports(said.out).items() >= own.items()
    assert "CONF must be empty, because vLLM refuses expandable_segments:True beside --kv" in said.err
    assert "must be empty" not in inv(line, **own).err


def test_qwen_forwards_nothing(forwarded):
    """A model without a cluster.env forwards no variable."""
    assert forwarded("--model qwen-30b")[0] == {}


def test_the_operator_has_the_last_word_on_a_forwarded_value(forwarded, env_file):
    """A forwarded variable is a setting: the shell beats .env, .env beats the profile, and the origin is shown."""
    env_file.write_text("VLLM_FORWARD_VARS=MINE\nMINE=from dotenv\nVLLM_USE_FLASHINFER_MOE_FP4=1\n")
    values, err = forwarded("--model nemotron", VLLM_NVFP4_GEMM_BACKEND="cutlass")
    assert values["MINE"] == "from dotenv"
    assert values["VLLM_USE_FLASHINFER_MOE_FP4"] == "1"
    assert values["VLLM_NVFP4_GEMM_BACKEND"] == "cutlass"
    assert "VLLM_NVFP4_GEMM_BACKEND = cutlass (shell)" in err and "MINE = from dotenv (.env)" in err


def test_a_listed_name_without_a_value_is_reported(forwarded):
    """A name that is unset or empty is reported and left out. Docker alone would drop it silently."""
    values, err = forwarded(VLLM_FORWARD_VARS="MINE OURS", OURS="")
    assert values == {}
    for name in ("MINE", "OURS"):
        assert f"VLLM_FORWARD_VARS lists {name}, which is unset or empty: no container gets it." in err


def test_a_profiles_variable_emptied_by_the_operator_is_reported(forwarded):
    """An empty value takes a profile's variable away, and a note says so."""
    values, err = forwarded("--model nemotron", VLLM_NVFP4_GEMM_BACKEND="")
    assert list(values) == NEMOTRON[1:]
    assert "which is unset or empty: no container gets it, and launch refuses this." in err


UNFIT = {
    "which is no variable name": ["1A", "A-B", "A=marker", "A;B", "$(id)", "é", "--privileged", "A,B"],
    "which looks like a secret": ["HF_TOKEN", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY", "MyToken", "KEY", "my_passwd"],
    "which bash, the container or this project sets": [
        *("PATH", "HOME", "EUID", "RANDOM", "LINENO", "GROUPS", "BASHPID", "SECONDS", "_"),
        *("VLLM_IMAGE", "VLLM_FORWARD_VARS", "NODE_RAY_IMAGE", "NODE_RAY_REPOSITORY"),
    ],
    "which every container has from the setting HEAD_NODE_IP": ["MASTER_ADDR"],
    "which every container has from the setting RDMA_HCAS": ["NCCL_IB_DISABLE"],
}


@pytest.mark.parametrize("why", UNFIT)
def test_an_unfit_name_is_refused(why, inv):
    """A container gets no secret, no name that bash would lose, and nothing that a setting decides."""
    for name in UNFIT[why]:
        said = inv("--dry head", VLLM_FORWARD_VARS=f"GOOD {name}", MyToken="marker", my_passwd="marker")
        assert said.code and said.out == "" and "marker" not in said.err
        assert f"VLLM_FORWARD_VARS lists {name.partition('=')[0]!r}, {why}" in said.err


def test_settings_that_nobody_forwards_stay_outside(inv):
    """A variable of the shell that is not listed stays outside of the container."""
    said = inv("--dry head --model nemotron", VLLM_IMAGE="mine:1", VLLM_LOGGING_LEVEL="DEBUG", PORT="1", FOO="bar")
    assert {"VLLM_IMAGE", "VLLM_FORWARD_VARS", "VLLM_LOGGING_LEVEL", "PORT", "FOO"}.isdisjoint(_exports(said.out))


def test_a_forwarded_value_is_handed_on_as_it_stands(forwarded):
    """A forwarded value is not changed, whatever it looks like."""
    given = {"NUMBER": "007", "WORDS": "a=b c", "DASH": "-1", "ENABLE_ZERO": "0", "ENABLE_TRUE": "true"}
    assert forwarded(VLLM_FORWARD_VARS=" ".join(given), **given)[0] == given


def test_nccls_own_switches_are_passed_on_only_if_set(forwarded):
    """NCCL_DEBUG, its parts and the GID index reach the containers only if the operator sets them."""
    own = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_IB_GID_INDEX": "3"}
    assert forwarded()[0] == {}
    assert forwarded(**own)[0] == own
    assert forwarded(NCCL_DEBUG="")[0] == {}
