"""Every knob of every model, with the lines that it adds to the output of `inv --dry launch` and those it removes."""

import pytest

from cluster.models import known_models
from cluster.settings import CORE

PARSERS = "/root/.cache/huggingface/parsers"
SUPER = "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4"
FETCH = (
    "- # head",
    '- : "${HF_TOKEN:?}" &&',
    "- docker exec",
    "- -e HF_TOKEN",
    "- node-ray /bin/bash /opt/inside/serve.sh fetch",
    f"- hf download {SUPER} super_v3_reasoning_parser.py",
    "- --revision main",
    f"- --local-dir {PARSERS}/{SUPER}/main",
)
PLUGIN = f"--reasoning-parser-plugin {PARSERS}/{{}}/{{}}/super_v3_reasoning_parser.py"
NO_PARSER = ("- " + PLUGIN.format(SUPER, "main"), "- --reasoning-parser super_v3")
RECORDER = "node-ray /bin/bash /opt/inside/serve.sh record {} 8 1"

CHANGES = [
    (
        "nemotron MODEL_CKPT=a/b",
        f"- hf download {SUPER} super_v3_reasoning_parser.py",
        "+ hf download a/b super_v3_reasoning_parser.py",
        f"- --local-dir {PARSERS}/{SUPER}/main",
        f"+ --local-dir {PARSERS}/a/b/main",
        f"- vllm serve {SUPER}",
        "+ vllm serve a/b",
        "- " + PLUGIN.format(SUPER, "main"),
        "+ " + PLUGIN.format("a/b", "main"),
    ),
    (
        "nemotron PARSER_REVISION=1a2b",
        "- --revision main",
        "+ --revision 1a2b",
        f"- --local-dir {PARSERS}/{SUPER}/main",
        f"+ --local-dir {PARSERS}/{SUPER}/1a2b",
        "- " + PLUGIN.format(SUPER, "main"),
        "+ " + PLUGIN.format(SUPER, "1a2b"),
    ),
    ("nemotron ENABLE_REASONING_PARSER=0", *FETCH, *NO_PARSER),
    ("nemotron REASONING_PARSER=nemotron_v3", *FETCH, *NO_PARSER, "+ --reasoning-parser nemotron_v3"),
    ("nemotron SERVED_NAME=x", "- --served-model-name nvidia/nemotron-3-super", "+ --served-model-name x"),
    ("nemotron TP_SIZE=4", "- --tensor-parallel-size 2", "+ --tensor-parallel-size 4"),
    ("nemotron PP_SIZE=2", "- --pipeline-parallel-size 1", "+ --pipeline-parallel-size 2"),
    ("nemotron MAX_MODEL_LEN=524288", "- --max-model-len 1048576", "+ --max-model-len 524288"),
    ("nemotron GPU_MEM_UTIL=0.8", "- --gpu-memory-utilization 0.75", "+ --gpu-memory-utilization 0.8"),
    ("nemotron MAX_NUM_SEQS=4", "+ --max-num-seqs 4"),
    ("nemotron MAX_NUM_BATCHED_TOKENS=16K", "+ --max-num-batched-tokens 16384"),
    ("nemotron QUANTIZATION=", "- --quantization fp4"),
    ("nemotron KV_CACHE_DTYPE=", "- --kv-cache-dtype fp8"),
    ("nemotron MAMBA_SSM_DTYPE=float32", "- --mamba-ssm-cache-dtype auto", "+ --mamba-ssm-cache-dtype float32"),
    ("nemotron MOE_BACKEND=", "- --moe-backend marlin"),
    ("nemotron CUDAGRAPH_CAPTURE_SIZE=", "- --max-cudagraph-capture-size 128"),
    ("nemotron ENABLE_EAGER=1", "+ --enforce-eager"),
    ("nemotron ENABLE_ASYNC_SCHEDULING=0", "- --async-scheduling"),
    (
        "nemotron ENABLE_MTP=1",
        """+ --speculative-config '{"method": "mtp", "moe_backend": "triton", "num_speculative_tokens": 3}'""",
    ),
    ("nemotron TOOL_CALL_PARSER=", "- --enable-auto-tool-choice", "- --tool-call-parser qwen3_coder"),
    (
        "nemotron HOST=::1",
        "- --host 0.0.0.0",
        "+ --host ::1",
        "- " + RECORDER.format("http://127.0.0.1:8000"),
        "+ " + RECORDER.format("'http://[::1]:8000'"),
    ),
    (
        "nemotron PORT=8001",
        "- --port 8000",
        "+ --port 8001",
        "- " + RECORDER.format("http://127.0.0.1:8000"),
        "+ " + RECORDER.format("http://127.0.0.1:8001"),
    ),
    ("nemotron SERVE_EXTRA=--seed=1", "+ --seed=1"),
    ("qwen-30b MODEL_CKPT=a/b", "- vllm serve Qwen/Qwen3-30B-A3B-Thinking-2507-FP8", "+ vllm serve a/b"),
    ("qwen-30b SERVED_NAME=x", "- --served-model-name qwen3_30b_thinking", "+ --served-model-name x"),
    ("qwen-30b TP_SIZE=1", "- --tensor-parallel-size 2", "+ --tensor-parallel-size 1"),
    ("qwen-30b MAX_MODEL_LEN=64K", "- --max-model-len 131072", "+ --max-model-len 65536"),
    ("qwen-30b GPU_MEM_UTIL=0.5", "- --gpu-memory-utilization 0.70", "+ --gpu-memory-utilization 0.5"),
    ("qwen-30b MAX_NUM_SEQS=", "- --max-num-seqs 8"),
    ("qwen-30b MAX_NUM_BATCHED_TOKENS=", "- --max-num-batched-tokens 32768"),
    ("qwen-30b ENABLE_PREFIX_CACHING=0", "- --enable-prefix-caching"),
    ("qwen-30b ENABLE_TRUST_REMOTE_CODE=1", "+ --trust-remote-code"),
    ("qwen-122b ENABLE_TRUST_REMOTE_CODE=", "- --trust-remote-code"),
    ("qwen-30b REASONING_PARSER=", "- --reasoning-parser deepseek_r1"),
    ("qwen-30b TOOL_CALL_PARSER=", "- --enable-auto-tool-choice", "- --tool-call-parser hermes"),
]


@pytest.fixture(scope="module")
def unchanged() -> dict[str, list[str]]:
    """The lines that launch prints for each model with its unchanged profile. Filled in when needed."""
    return {}


def _lines(out: str) -> list[str]:
    return [line.removesuffix(" \\").strip() for line in out.splitlines()]


@pytest.mark.parametrize(("knob", "changes"), [(row[0], row[1:]) for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_knob_changes_these_lines_and_no_others(knob, changes, inv, unchanged):
    """A knob changes its own flag and no other. Empty and 0 remove the flag."""
    model, setting = knob.split()
    if model not in unchanged:
        unchanged[model] = _lines(inv(f"--dry launch --model {model}").out)
    before = unchanged[model]
    after = _lines(inv(f"--dry launch --model {model}", **dict([setting.split("=", 1)])).out)
    gone = [f"- {line}" for line in _only_in(before, after)]
    come = [f"+ {line}" for line in _only_in(after, before)]
    assert sorted([*gone, *come]) == sorted(changes)


def _only_in(some: list[str], others: list[str]) -> list[str]:
    others = others.copy()
    return [line for line in some if line and (line not in others or others.remove(line))]


@pytest.mark.parametrize("folder", ["nemotron", "qwen"])
def test_every_knob_of_a_folder_has_a_row(folder):
    """A new knob of a profile needs a row in CHANGES."""
    shown = {knob.split()[1].split("=")[0] for knob, *_ in CHANGES if knob.startswith(folder)}
    knobs = frozenset().union(*(model.knobs for model in known_models().values() if model.folder == folder))
    assert knobs - CORE.keys() <= shown


def test_the_extra_words_come_last(inv):
    """SERVE_EXTRA is split as a shell would split it, and ends the line, so that its options win."""
    said = inv("--dry launch --model qwen-30b", SERVE_EXTRA="""--hf-overrides '{"a": "b c"}' --seed 1""").out
    assert """--tool-call-parser hermes \\\n  --hf-overrides \\\n  '{"a": "b c"}' \\\n  --seed \\\n  1\n""" in said


def test_max_len_is_shown_as_a_number(inv):
    """`--max-len 1M` becomes the number that vLLM would read, and the operator sees it."""
    said = inv("--dry launch --model nemotron --max-len 1M")
    assert "--max-model-len 1048576" in said.out
    assert "MAX_MODEL_LEN = 1048576 (flag --max-len)" in said.err
