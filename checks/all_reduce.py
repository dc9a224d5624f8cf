"""One rank of a timed all-reduce, run as `python3 -c SOURCE RANK RANKS ADDRESS PORT BYTES` in the container of a node:
says its seconds as one line of JSON. NCCL where every rank has CUDA, else gloo, which proves the network only. Rank 0
listens at ADDRESS:PORT, on every interface, for as long as it lasts."""

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=30)
MEASURED_S, MOST = 2, 20
# A processor adds up what a GPU would: more bytes would measure that, not the network.
MOST_WITHOUT_CUDA = 32 * 2**20


def every_rank_has_cuda(store: dist.Store, rank: int, ranks: int) -> bool:
    """Whether torch finds a GPU in all containers; each tells the others."""
    store.set(f"cuda/{rank}", str(torch.cuda.is_available()))
    return all(store.get(f"cuda/{number}") == b"True" for number in range(ranks))


def seconds(tensor: torch.Tensor, count: int) -> float:
    """How long one all-reduce takes, of count in a row."""
    start = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def iterations(tensor: torch.Tensor) -> int:
    """How often to measure: the same on every rank, which the slowest one's second try decides."""
    seconds(tensor, 1)  # the first connects
    slowest = torch.tensor([seconds(tensor, 1)], device=tensor.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return max(1, min(MOST, int(MEASURED_S / slowest.item())))


def measure(backend: str, size: int) -> dict:
    """Time the all-reduce; the process group is up."""
    tensor = torch.zeros(size // 4, device="cuda" if backend == "nccl" else "cpu")
    count = iterations(tensor)
    return {
        "backend": backend,
        "cuda": torch.cuda.is_available(),
        "size": size,
        "iterations": count,
        "seconds": seconds(tensor, count),
    }


def main(rank: int, ranks: int, address: str, port: int, size: int) -> None:
    """Meet the other ranks, measure, say it, part."""
    store = dist.TCPStore(address, port, ranks, rank == 0, PATIENCE)
    backend = "nccl" if every_rank_has_cuda(store, rank, ranks) else "gloo"
    size = size if backend == "nccl" else min(size, MOST_WITHOUT_CUDA)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    try:
        told = measure(backend, size)
        dist.barrier()  # nobody parts while another still measures
    finally:
        dist.destroy_process_group()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
