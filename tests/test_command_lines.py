"""Whole command lines, as `inv --dry` and `inv plan` print them, compared with tests/golden."""

import re
from pathlib import Path

import pytest

from cluster.models import known_models

ROOT = Path(__file__).resolve().parent.parent

TASKS = [
    "build-image",
    "stop",
    "health",
    "cleanup",
    "head",
    "head --model nemotron",
    "worker",
    "worker --model nemotron",
    "worker --model nemotron --detach",
    "launch --model nemotron --detach",
    "logs",
    "logs --node --follow",
    "memory",
    "up --model nemotron",
    "down",
    "down --here",
    "weights --model nemotron",
    *(f"launch --model {name}" for name in known_models()),
]
PLANS = [f"plan --model {name}" for name in known_models()]


def _file(line: str) -> str:
    return re.sub(" (--model |--)?", "-", line)


@pytest.mark.parametrize("line", TASKS)
def test_a_dry_task_prints_this_and_no_more(line, inv, golden, addresses, operator):
    """`inv --dry TASK` prints the command lines of the task, and nothing else, to standard output."""
    if line.startswith("worker"):
        addresses["enp1s0f1np1"] = "10.0.0.2"
    for module in ("repository", "node"):
        operator.setattr(f"cluster.{module}.repository_digest", lambda: "SHA256")
    golden(_file(line), inv(f"--dry {line}").out)


@pytest.mark.parametrize("line", PLANS)
def test_a_plan_prints_this_and_no_more(line, inv, golden, operator):
    """`inv plan` prints the command lines of head, worker and launch, and nothing else, to standard output."""
    operator.setattr("cluster.node.repository_digest", lambda: "SHA256")
    golden(_file(line), inv(line).out)


def test_no_golden_file_is_left_over():
    """A test compares every file in tests/golden."""
    assert {file.stem for file in (ROOT / "tests/golden").iterdir()} == {_file(line) for line in TASKS + PLANS}


def test_the_plan_is_what_the_three_tasks_run(inv, addresses):
    """`inv plan` prints the same lines as head, worker and launch, each on its own node."""
    head = inv("--dry head --model nemotron").out
    addresses["enp1s0f1np1"] = "10.0.0.2"
    worker = inv("--dry worker --model nemotron").out
    assert inv("plan --model nemotron").out == "\n".join([head, worker, inv("--dry launch --model nemotron").out])


def test_a_laptop_without_links_plans_with_the_documented_ones(inv, tmp_path):
    """Without a RoCE device `inv plan` uses the links that .env.example names, and tells the operator so."""
    said = inv("plan --model nemotron", SYSFS=str(tmp_path / "nothing"))
    documented = dict(re.findall("^# (RDMA_HCAS|DATA_IFS)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    assert said.out == inv("plan --model nemotron", **documented).out
    assert "the links are those that .env.example names" in said.err
    opened = [line.removeprefix("  sudo ufw allow in on ") for line in said.err.splitlines() if " ufw allow " in line]
    assert set(opened) == set(documented["DATA_IFS"].split(",")) and len(opened) == len(set(opened))
    assert "  sudo ufw allow in on lan9\n" in inv("plan --model nemotron", PRIMARY_IF="lan9", **documented).err


@pytest.mark.parametrize(
    "shell", [{"TP_SIZE": "4"}, {"WORKER_IP": "10.0.0.1"}, {"WORKER_IP": "10.0.0.2,10.0.0.2", "TP_SIZE": "3"}]
)
def test_a_plan_that_would_be_refused_says_so(shell, inv):
    """With too few workers the plan is still printed, after a warning that launch would refuse."""
    said = inv("plan --model nemotron", **shell)
    assert said.code == 0 and "as it stands, launch would refuse." in said.err and "vllm serve" in said.out
    assert "would refuse" not in inv("plan --model nemotron").err


@pytest.mark.parametrize("task", ["launch", "up", "check", "plan"])
def test_a_model_that_is_not_named_is_asked_for(task, inv):
    """The message lists all models."""
    said = inv(task)
    assert said.code and said.err == "--model is missing; it takes one of nemotron, qwen-122b, qwen-30b, rehearsal."


def test_down_by_another_heads_address_is_for_this_node_alone(inv):
    """`down --head-ip` without `--here` is refused, because it would take all nodes down."""
    said = inv("--dry down --head-ip 10.0.0.9")
    assert said.code and said.out == "" and "--head-ip goes with --here" in said.err


def test_a_log_that_is_missing_is_said_to_be_elsewhere(inv, tmp_path):
    """The operator is told on which node to look."""
    assert "serve.log. The server's log is on the head; a node" in inv("logs", CACHE_DIR=str(tmp_path)).err


def test_a_plan_names_the_values_of_this_machine(inv):
    """The caches and the token of the machine that plans may differ from those of a Spark."""
    said = inv("plan --model nemotron", CACHE_DIR="/somewhere", RAY_AUTH_TOKEN_PATH="/none").err
    assert "may differ on a Spark: the caches in /somewhere, Ray's token: none." in said


def test_a_plan_has_one_worker_for_each_address(inv):
    """A plan for three nodes has a head and two workers."""
    said = inv("plan --model nemotron", WORKER_IP="10.0.0.2,10.0.0.3", TP_SIZE="3").out
    assert re.findall("^# (.*)\nexport", said, re.M) == ["head, 10.0.0.1", "worker, 10.0.0.2", "worker, 10.0.0.3"]


@pytest.mark.parametrize(
    ("line", "shell"),
    [
        ("--base-image nvcr.io/nvidia/vllm:26.03-py3 --tag mine:26.03", {}),
        ("", {"BASE_IMAGE": "nvcr.io/nvidia/vllm:26.03-py3", "TAG": "mine:26.03"}),
        ("--tag mine:26.03", {"BASE_IMAGE": "nvcr.io/nvidia/vllm:26.03-py3", "TAG": "not-this"}),
    ],
)
def test_another_base_has_another_name(line, shell, inv):
    """Base and tag can be flags or variables, and every `docker run` uses the base that was chosen."""
    out = inv(f"--dry build-image {line}", **shell).out
    assert "--build-arg BASE_IMAGE=nvcr.io/nvidia/vllm:26.03-py3 \\\n" in out and "--tag mine:26.03 \\\n" in out
    assert out.count("nvcr.io/nvidia/vllm:26.03-py3") == 4 and "26.05" not in out


def test_another_base_does_not_take_the_usual_name(inv):
    """Another base or another name without a tag is refused: no image replaces one that it is not."""
    said = inv("--dry build-image --base-image nvcr.io/nvidia/vllm:26.03-py3")
    assert said.code and said.out == "" and "--tag" in said.err and "flag --base-image" in said.err
    said = inv("--dry build-image", VLLM_IMAGE="nvcr.io/nvidia/vllm:25.11-py3")
    assert said.code and said.out == "" and "would replace nvcr.io/nvidia/vllm:25.11-py3" in said.err


@pytest.mark.parametrize("line", ["status", "check --model nemotron", "token", "watch --url http://head"])
def test_a_task_without_a_command_says_so(line, inv):
    """A dry run that shows nothing would look like a failure."""
    said = inv(f"--dry {line}")
    assert (said.out, said.code) == ("", 0) and "This task runs no command line" in said.err


def test_lines_whose_secrets_are_in_a_file_say_what_to_export(inv, env_file):
    """Pasted lines take secrets from the shell. `plan` says too which of its values are this machine's."""
    env_file.write_text("HF_TOKEN=hf_marker\nVLLM_API_KEY=sk_marker\n")
    hint = "To paste these lines, first export {}: they are set in a file, not in this shell."
    for line in ("--dry launch --model nemotron", "plan --model nemotron"):
        assert hint.format("HF_TOKEN and VLLM_API_KEY") in inv(line).err
        assert hint.format("HF_TOKEN") in inv(line, VLLM_API_KEY="sk_marker").err
        assert "To paste" not in inv(line, VLLM_API_KEY="sk", HF_TOKEN="hf").err
    said = inv("plan --model nemotron").err
    assert "the caches in /home/operator/.cache, Ray's token: none." in said


def test_every_cache_has_a_mount(inv):
    """Five folders survive the container, even if HF_CACHE is the folder of another cache; scripts are read-only."""
    for folder in ("/big/huggingface", "/big/vllm"):
        out = inv("--dry head", CACHE_DIR="/big", HF_CACHE=folder).out
        assert re.findall(r"^  -v [^:]+:(\S+) \\$", out, re.M) == [
            "/root/.cache/huggingface",
            "/root/.cache/flashinfer",
            "/root/.cache/vllm",
            "/root/.triton",
            "/var/log/node-ray",
            "/opt/inside:ro",
        ]
