"""Ask vLLM's own get_kv_cache_configs for the blocks of a cache. This runs in an image with vLLM, without a GPU.

Standard input is a JSON list of cases, standard output a list of {"block", "blocks", "concurrency", "tokens"}. Layers,
heads and states go into vLLM's own specs and state shapes. Only the size of a block is computed here, as in
_align_hybrid_block_size of platforms/interface.py, which needs a CUDA platform to run.
"""

import contextlib
import json
import sys
from math import ceil, lcm
from types import SimpleNamespace


def layers(case: dict) -> dict:
    """Return the spec of every layer that has a cache, by name and in the order of the model."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    dtype = torch.uint8 if case["cache_bytes"] == 1 else torch.bfloat16
    sizes = {"num_kv_heads": case["kv_heads"], "head_size": case["head_dim"], "dtype": dtype}
    token = FullAttentionSpec(block_size=1, **sizes).page_size_bytes
    block, state = 16, None
    if case["state"]:
        state = {"shapes": shapes(case), "dtypes": (torch.bfloat16, getattr(torch, case["state_dtype"]))}
        step = lcm(case["state"]["chunk"], 16) if case["mode"] == "all" else 16
        block = step * ceil(MambaSpec(block_size=-1, **state).page_size_bytes / (step * token))
        each = case["length"] if case["mode"] == "none" else block
        state |= {"block_size": each, "page_size_padded": block * token, "mamba_cache_mode": case["mode"]}
        state |= {"num_speculative_blocks": case["drafts"]}
    make = {"attention": lambda: FullAttentionSpec(block_size=block, **sizes), "state": lambda: MambaSpec(**state)}
    return {f"layer.{index}": make[kind]() for index, kind in enumerate(case["layers"]) if kind in make}


def shapes(case: dict) -> tuple:
    """Return the two shapes of one layer's state, by vLLM's own calculator."""
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Calculator

    state, tp, drafted = case["state"], case["tp"], case["drafts"]
    if case["family"] == "mamba2":
        width = state["heads"] * state["head_dim"]
        sizes = [state[name] for name in ("groups", "heads", "head_dim", "columns", "kernel")]
        return Calculator.mamba2_state_shape(tp, width, *sizes, drafted)
    sizes = [state[name] for name in ("groups", "heads", "columns", "head_dim", "kernel")]
    return Calculator.gated_delta_net_state_shape(tp, *sizes, drafted)


def answer(case: dict) -> dict:
    """Return the blocks that vLLM makes for one case."""
    from vllm.v1.core import kv_cache_utils as own

    length = case["length"]
    none = {"disable_hybrid_kv_cache_manager": False, "num_gpu_blocks_override": None}
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=length, original_max_model_len=length),
        scheduler_config=SimpleNamespace(**none, max_num_batched_tokens=8192),
        cache_config=SimpleNamespace(
            **none,
            mamba_cache_mode=case["mode"],
            enable_prefix_caching=False,
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=memory_order,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, tensor_parallel_size=case["tp"]
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        device_config=SimpleNamespace(device_type="cuda"),
        speculative_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=8192,
        kv_transfer_config=None,
    )
    specs = layers(case)
    found = own.get_kv_cache_configs(config, [specs], [case["bytes"]])
    times = own.get_max_concurrency_for_kv_cache_config(config, found[0])
    block = next(spec.block_size for name, spec in specs.items() if case["layers"][int(name[6:])] == "attention")
    return {"block": block, "blocks": found[0].num_blocks, "concurrency": times, "tokens": int(times * length)}


def memory_order() -> object:
    """Layer by layer, then block by block: version 0.21 always does so, and newer ones mostly."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return KVCacheLayout.LBNHC


def asked(case: dict) -> dict:
    """Return the answer, or the reason why vLLM refused."""
    try:
        return answer(case)
    except ValueError as refusal:
        return {"refused": str(refusal)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answers = [asked(case) for case in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)
