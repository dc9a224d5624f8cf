"""Time all-reduces between all nodes, and print each rank's answer as JSON: fabric.py, in the head's container.

Each rank is a process of its own, `fabric.py RANK RANKS ADDRESS PORT`, because a process reads NCCL's environment only
once. The ranks use NCCL if all of them have CUDA, else gloo, which proves the network only. A rank ends within RANK_S,
also after its parent has gone. NCCL's log goes to a pipe, so no file is left.
"""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

RANK_S, ANSWER_S, PATIENCE = 40, 48, timedelta(seconds=30)
MEASURED_S, MOST_TIMES = 2, 20
# Without CUDA more bytes would measure the additions of the processor, not the network.
BYTES, BYTES_WITHOUT_CUDA = 256 * 2**20, 32 * 2**20
# Decoding waits for all-reduces of about this size, two for each layer of a model.
LATENCY_BYTES, LATENCY_TIMES = 16 * 2**10, 200
GPU_S, MATRIX = 0.5, 8192
LOG_CHARS = 100_000
# With a file name for the log NCCL writes each line at once, so that the last lines before a hang are there.
LOGGED = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": "/dev/stderr"}


# --- The head asks every node -----------------------------------------------------------------------------------------


def start_rank(script, *words):
    """Run one rank on this node. Return its answer, and NCCL's log."""
    done = subprocess.run(
        ["timeout", "--signal=KILL", str(RANK_S), sys.executable, script, *words],
        env={**os.environ, **LOGGED},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    told = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))}
    return {"status": done.returncode, "told": done.stdout, "log": done.stderr[-LOG_CHARS:], "environment": told}


def ask_every_node():
    """Start a rank on each node, and yield the answers. The head's is the first, because the others connect to it."""
    import every
    import ray

    here = os.environ["VLLM_HOST_IP"]
    nodes = sorted(every.nodes(), key=lambda node: (node["NodeManagerAddress"] != here, node["NodeManagerAddress"]))
    with socket.create_server((here, 0)) as free:
        meeting = [str(len(nodes)), here, str(free.getsockname()[1])]
    task = ray.remote(num_cpus=0, max_retries=0)(start_rank)
    # A rank takes the node's GPU, so it does not start while a server holds it.
    asked = {
        rank: task.options(num_gpus=min(1, node["Resources"].get("GPU", 0)), **every.pinned(node)).remote(
            os.path.abspath(__file__), str(rank), *meeting
        )
        for rank, node in enumerate(nodes)
    }
    for rank, answer in every.gather(asked, ANSWER_S).items():
        if isinstance(answer, ray.exceptions.GetTimeoutError):
            ray.cancel(asked[rank], force=True)
            answer = {"error": f"no answer within {ANSWER_S} s; a rank cannot start while a server runs (inv stop)"}
        elif isinstance(answer, Exception):
            answer = {"error": f"{type(answer).__name__}: {str(answer).strip().splitlines()[-1]}"}
        where = nodes[rank]
        yield {"address": where["NodeManagerAddress"], "hostname": where["NodeManagerHostname"], **answer}


# --- One rank ---------------------------------------------------------------------------------------------------------


def be_rank(rank, ranks, address, port):
    """Connect to the other ranks, and time the all-reduces with them."""
    import torch
    import torch.distributed as dist

    def seconds(tensor, count):
        begun = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(tensor)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    store = dist.TCPStore(address, port, ranks, rank == 0, PATIENCE)
    store.set(f"cuda/{rank}", str(torch.cuda.is_available()))
    cuda = all(store.get(f"cuda/{number}") == b"True" for number in range(ranks))
    backend, device, size = ("nccl", "cuda", BYTES) if cuda else ("gloo", "cpu", BYTES_WITHOUT_CUDA)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    try:
        tensor = torch.zeros(size // 4, device=device)
        seconds(tensor, 1)  # the first connects
        slowest = torch.tensor([seconds(tensor, 1)], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        count = max(1, min(MOST_TIMES, int(MEASURED_S / slowest.item())))
        told = {"backend": backend, "cuda": torch.cuda.is_available(), "size": size, "iterations": count}
        told["seconds"] = seconds(tensor, count)
        small = tensor[: LATENCY_BYTES // 4]
        seconds(small, LATENCY_TIMES // 10)
        told["latency"] = seconds(small, LATENCY_TIMES)
        if cuda:
            told |= gpu_rates(torch, tensor)
        dist.barrier()  # no rank may leave while another still measures
    finally:
        dist.destroy_process_group()
    print(json.dumps(told), flush=True)


def gpu_rates(torch, tensor):
    """Return how many bytes a second this GPU reads and writes, and how many operations it does, once it is warm."""

    def rate(amount, work, *operands, **out):
        for _ in ("warm-up", "measurement"):
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < GPU_S:
                work(*operands, **out)
                torch.cuda.synchronize()
                count += 1
        return amount * count / (time.perf_counter() - begun)

    matrix = torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda")
    copied = rate(2 * tensor.nbytes, torch.empty_like(tensor).copy_, tensor)
    return {"copied": copied, "computed": rate(2 * MATRIX**3, torch.mm, matrix, matrix, out=torch.empty_like(matrix))}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(list(ask_every_node())))
    else:
        be_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
