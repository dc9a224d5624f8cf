"""The groups that vLLM deals a model's layers into: every group has a block table, and a block is as wide as one.

Sources, in vLLM 0.21.0: v1/core/kv_cache_utils.py (_get_kv_cache_groups_uniform_page_size) and distributed/utils.py
(get_pp_indices).
"""

from checks.fields import ATTENTION, STATE, CannotKnow


def size(layers: tuple[str, ...]) -> int:
    """How many layers a group has: as many as the rarer kind, or as the other if that has less than half more."""
    attention, states = layers.count(ATTENTION), layers.count(STATE)
    if not states:
        return attention
    few, many = sorted((attention, states))
    return many if many < few * 1.5 else few


def widest(layers: tuple[str, ...], last: int, size: int, pp: int) -> int:
    """The most layers that one group has on one pipeline stage; layers are dealt out to the groups in turn.

    last: how many of the layers are MTP's, which the last stage has beside its share; pp: how many stages there are.
    """
    ends = _ends(len(layers) - last, pp)
    stages = [sum(end <= layer for end in ends[:-1]) for layer in range(len(layers))]
    most = 0
    for kind in (ATTENTION, STATE):
        of_kind = [stage for stage, found in zip(stages, layers, strict=True) if found == kind]
        dealt = -(-len(of_kind) // size)
        most = max([most, *(of_kind[group::dealt].count(stage) for group in range(dealt) for stage in range(pp))])
    return most


def _ends(layers: int, pp: int) -> list[int]:
    """The layer behind the last of each pipeline stage."""
    if pp > layers:
        raise CannotKnow(f"{layers} layers do not make {pp} pipeline stages.")
    shares = [layers // pp] * pp
    for stage in range(2, layers % pp + 2):
        shares[-stage] += 1
    return [sum(shares[: stage + 1]) for stage in range(pp)]
