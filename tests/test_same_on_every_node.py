"""The wrapper, `docker run` up to the image: the same bytes on every node, taken from what the two tasks print."""

import hashlib
import re
import shlex

import pytest

ARTICLE = """
--rm --init --name node-ray --network host --shm-size 16g --gpus all --device=/dev/infiniband --cap-add=IPC_LOCK
--ulimit memlock=-1:-1 --entrypoint /bin/bash -e NCCL_CROSS_NIC=1 -e RAY_memory_monitor_refresh_ms=0
"""
CONTRACT = {
    "nemotron": """vllm serve nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4 --served-model-name nvidia/nemotron-3-super
        --host 0.0.0.0 --port 8000 --tensor-parallel-size 2 --pipeline-parallel-size 1 --data-parallel-size 1
        --quantization fp4 --dtype auto --kv-cache-dtype fp8 --mamba-ssm-cache-dtype auto --max-model-len 1048576
        --gpu-memory-utilization 0.75 --enable-chunked-prefill --trust-remote-code --enable-auto-tool-choice
        --tool-call-parser qwen3_coder --reasoning-parser super_v3 --async-scheduling --moe-backend marlin
        --max-cudagraph-capture-size 128 --distributed-executor-backend ray""",
    "qwen-30b": """vllm serve Qwen/Qwen3-30B-A3B-Thinking-2507-FP8 --served-model-name qwen3_30b_thinking --host 0.0.0.0
        --port 8000 --tensor-parallel-size 2 --max-num-seqs 8 --max-model-len 131072 --max-num-batched-tokens 32768
        --gpu-memory-utilization 0.70 --enable-prefix-caching --reasoning-parser deepseek_r1 --enable-auto-tool-choice
        --tool-call-parser hermes --distributed-executor-backend ray""",
    "qwen-122b": """vllm serve Qwen/Qwen3.5-122B-A10B-FP8 --served-model-name qwen35_122b_thinking --host 0.0.0.0
        --port 8000 --tensor-parallel-size 2 --max-num-seqs 4 --max-model-len 65536 --max-num-batched-tokens 16384
        --gpu-memory-utilization 0.85 --enable-prefix-caching --reasoning-parser qwen3 --enable-auto-tool-choice
        --tool-call-parser qwen3_coder --trust-remote-code --distributed-executor-backend ray""",
}
OURS = tuple(f"NODE_RAY_{name}" for name in ("WRAPPER", "WRAPPER_SHA256", "REPOSITORY", "IMAGE", "CGROUP_DRIVER"))
HOSTILE = "a 'b' \"c\" $(touch x) `touch x`; * # \\ {{ 1 }} é"


def _wrapper(out: str) -> str:
    start = out.rindex("docker run \\\n")
    return out[start : out.index(" \\\n  /opt/inside/start.sh", start)]


def _exported(out: str) -> dict[str, str]:
    return dict(shlex.split(line)[1].split("=", 1) for line in re.findall("^export .*$", out, re.M))


@pytest.fixture
def both(inv, addresses):
    """Return the text of head and worker, each on its own node. Settings are for both, or for one of them."""

    def typed(flags: str = "", head: dict | None = None, worker: dict | None = None, **shell: str) -> tuple[str, str]:
        addresses["enp1s0f1np1"] = "10.0.0.1"
        on_head = inv(f"--dry head {flags}", **shell, **(head or {}))
        addresses["enp1s0f1np1"] = "10.0.0.2"
        on_worker = inv(f"--dry worker {flags}", **shell, **(worker or {}))
        assert (on_head.code, on_worker.code) == (0, 0), on_head.err + on_worker.err
        return on_head.out, on_worker.out

    return typed


def _own(head: dict, worker: dict, **shell: str) -> dict:
    return {"head": head, "worker": worker, **shell}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"flags": "--model nemotron"},
        {"HEAD_NODE_IP": "192.168.7.1", "VLLM_IMAGE": "registry:5000/a/b@sha256:0a"},
        {"NCCL_DEBUG": HOSTILE, "NCCL_DEBUG_SUBSYS": HOSTILE, "CACHE_DIR": f"/{HOSTILE}", "HF_CACHE": "/a b"},
        {"RDMA_HCAS": ""},
        _own({"PRIMARY_IF": "eth0", "VLLM_HOST_IP": "10.9.9.1"}, {"VLLM_HOST_IP": "10.9.9.2"}),
        _own({"RDMA_HCAS": "mlx5_0", "DATA_IFS": "eth7"}, {"RDMA_HCAS": "mlx5_1,mlx5_2", "DATA_IFS": "eth8,eth9"}),
        _own(
            {"A": "1", "B": HOSTILE, "NCCL_IB_GID_INDEX": "3", "OBJECT_STORE_MEMORY": "1"},
            {"A": "2", "B": "plain", "NCCL_IB_GID_INDEX": "5", "OBJECT_STORE_MEMORY": "2"},
            VLLM_FORWARD_VARS="B A",
        ),
    ],
    ids=str,
)
def test_head_and_worker_print_the_same_wrapper(given, both):
    """From `docker run` to the image head and worker print the same bytes, whatever differs between the nodes."""
    head, worker = both(**given)
    assert _wrapper(head) == _wrapper(worker)
    for name in OURS:
        assert _exported(head)[name] == _exported(worker)[name]
    assert head != worker


def test_the_wrapper_has_every_flag_of_the_article(both):
    """The devices, limits and names that the article's container had are in the wrapper, and its image ends it."""
    head, _ = both()
    words = shlex.split(_wrapper(head).replace("\\\n", ""))
    assert _flags(ARTICLE) <= _flags(shlex.join(words))
    assert words[-1] == "local/vllm-ray:26.05.post1"


def test_the_sha256_is_of_the_words_that_travel(both):
    """The container gets the words and their sha256, so each can be checked by the other."""
    exported = _exported(both("--model nemotron")[0])
    assert hashlib.sha256(exported["NODE_RAY_WRAPPER"].encode()).hexdigest() == exported["NODE_RAY_WRAPPER_SHA256"]


def test_the_words_that_travel_are_the_wrapper_without_this_hosts_folders(both):
    """The fingerprint leaves out nothing but the host's side of the mounts."""
    out, _ = both("--model nemotron", HF_CACHE="/mnt/models")
    words = shlex.split(_wrapper(out).replace("\\\n", ""))
    assert shlex.split(_exported(out)["NODE_RAY_WRAPPER"]) == [re.sub("^/[^:]*:/", ":/", word) for word in words]


def test_two_operators_homes_are_one_wrapper(both):
    """Folders of the host may differ from node to node: the sha256 is the same."""
    head, worker = both(worker={"HOME": "/home/another", "HF_CACHE": "/mnt/h f"})
    assert _wrapper(head) != _wrapper(worker)
    assert _exported(head)["NODE_RAY_WRAPPER_SHA256"] == _exported(worker)["NODE_RAY_WRAPPER_SHA256"]


@pytest.mark.parametrize(
    "own", [{"VLLM_IMAGE": "local/other:1"}, {"NCCL_DEBUG": "INFO"}, {"VLLM_FORWARD_VARS": "A", "A": "1"}], ids=str
)
def test_a_node_that_differs_has_another_sha256(own, both):
    """An image, or a variable that one node alone would get, shows in the sha256."""
    head, worker = both(worker=own)
    assert _exported(head)["NODE_RAY_WRAPPER_SHA256"] != _exported(worker)["NODE_RAY_WRAPPER_SHA256"]


def test_what_the_containers_get_by_name(both):
    """Each node gets its own address, and everything that the contract lists, with these values."""
    links = "enp1s0f0np0,enp1s0f1np1,enP2p1s0f0np0,enP2p1s0f1np1"
    hcas = "rocep1s0f0,rocep1s0f1,roceP2p1s0f0,roceP2p1s0f1"
    head, worker = (_exported(out) for out in both("--model nemotron"))
    for name in OURS:
        assert head.pop(name) and worker.pop(name)
    assert head == {
        "VLLM_HOST_IP": "10.0.0.1",
        "MASTER_ADDR": "10.0.0.1",
        "TP_SOCKET_IFNAME": "enp1s0f1np1",
        "NCCL_SOCKET_IFNAME": links,
        "GLOO_SOCKET_IFNAME": links,
        "OMPI_MCA_btl_tcp_if_include": links,
        "NCCL_IB_HCA": hcas,
        "UCX_NET_DEVICES": ",".join(f"{hca}:1" for hca in hcas.split(",")),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1800",
        "RAY_CGRAPH_get_timeout": "1800",
        "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
        "MEM_ABORT_GIB": "6",
        "VLLM_NVFP4_GEMM_BACKEND": "marlin",
        "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
        "VLLM_USE_FLASHINFER_MOE_FP4": "0",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    }
    assert worker == head | {"VLLM_HOST_IP": "10.0.0.2"}


def test_every_exported_name_is_handed_to_the_container_by_name(both):
    """No value of a node stands in the wrapper: `-e NAME` takes each name that is exported."""
    out, _ = both("--model nemotron", NCCL_DEBUG="INFO", VLLM_FORWARD_VARS="A", A="1")
    assert re.findall(r"^  -e (\w+) \\$", out, re.M) == list(_exported(out))


@pytest.mark.parametrize("name", CONTRACT)
def test_the_server_line_holds_the_contract(name, inv):
    """Each model is served with the article's flags, Ray's among them. Qwen has no --quantization."""
    out = inv(f"--dry launch --model {name}").out
    serve = " ".join(
        out[out.index("vllm serve") : out.index("\n\n", out.index("vllm serve"))].replace("\\\n", "").split()
    )
    assert _flags(CONTRACT[name]) <= _flags(serve)
    assert "--quantization" in serve or name.startswith("qwen")
    assert not ("--quantization" in serve and name.startswith("qwen"))


def _flags(words: str) -> set[str]:
    """Return each flag with its value as one string."""
    return set(re.split(r" (?=-)", " ".join(words.split())))
