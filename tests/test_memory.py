"""The memory of a model: the numbers are those that a real vLLM printed, and every proposal of a refusal is exact."""

import re
import shlex
from dataclasses import replace

import pytest

from cluster.finding import GIB, CannotKnow
from cluster.kv_cache import Demand, cache_layout, kept_states, read_demand, state_bytes
from cluster.memory import (
    SPARK,
    Loaded,
    NodeMemory,
    as_loaded,
    beyond_limit,
    budget_rows,
    memory_budgets,
    memory_findings,
    node_budget,
    read_model,
)
from cluster.models import find_model
from cluster.repository import ROOT
from cluster.settings import load_settings

NEMOTRON, MEASURED, _ = read_model(ROOT / "nemotron/120b.json")
QWEN30, QWEN122 = (read_model(ROOT / f"qwen/{size}.json")[0] for size in ("30b", "122b"))
H100 = NodeMemory("an H100", 1000 * GIB, 900 * GIB, int(79.19 * GIB))  # as CUDA counts its memory; NVML: 79.65
ARTICLE = Demand(1048576, 0.75, tp=2, cache_dtype="fp8")
MTP = replace(ARTICLE, drafts=3)


def settings(**shell):
    """The settings of Nemotron, as its profile has them."""
    return load_settings(find_model("nemotron"), shell={"ENV_FILE": "", "HOME": "/home/operator", **shell})


def budget(asked=ARTICLE, node=SPARK):
    """The memory of one node with Nemotron on it."""
    return node_budget(cache_layout(NEMOTRON, asked), MEASURED, asked, node)


def findings(asked=ARTICLE, node=SPARK, **shell):
    """The findings for one node with Nemotron on it."""
    return memory_findings(budget(asked, node), settings(**shell))


def rules(asked=ARTICLE, node=SPARK, **shell):
    """The rules of these findings. A rule that refuses is in capitals."""
    return [finding.rule.upper() if finding.refuses else finding.rule for finding in findings(asked, node, **shell)]


def numbers(layout, blocks, length):
    """The tokens and the concurrency that vLLM's log has for so many blocks."""
    times = blocks / layout.needed(length)
    return int(times * length), round(times, 2)


# --- The KV cache ----------------------------------------------------------------------------------------------------


def test_two_h100_without_mtp_to_the_token():
    """20.01 GiB of cache: block 8320, 1260 blocks, 10,009,134 tokens, 9.55x. The next start had one block more."""
    layout = cache_layout(NEMOTRON, ARTICLE)
    assert (layout.block, int(20.01 * GIB) // layout.block_bytes, layout.needed(1048576)) == (8320, 1260, 132)
    assert numbers(layout, 1260, 1048576) == (10_009_134, 9.55)
    assert numbers(layout, 1261, 1048576) == (10_017_078, 9.55)


def test_two_h100_with_mtp_to_the_token():
    """15.29 GiB of cache: block 8432, 845 blocks, 6,110,667 tokens, 5.83x."""
    layout = cache_layout(NEMOTRON, MTP)
    assert (layout.block, int(15.29 * GIB) // layout.block_bytes, layout.needed(1048576)) == (8432, 845, 145)
    assert numbers(layout, 845, 1048576) == (6_110_667, 5.83)


@pytest.mark.parametrize(
    ("asked", "blocks", "tokens", "times"),
    [(ARTICLE, 1222, "9,707,271", "9.26"), (ARTICLE, 1260, "10,009,134", "9.55"), (MTP, 845, "6,110,667", "5.83")],
)
def test_the_table_has_the_tokens_that_vllm_printed(asked, blocks, tokens, times):
    """vLLM cuts the tokens and does not round: 1222 / 132 x 1,048,576 is 9,707,271.76."""
    size = blocks * cache_layout(NEMOTRON, asked).block_bytes
    labels = [label for label, _ in budget_rows(budget(replace(asked, cache=size)))]
    assert f"KV cache: {tokens} tokens, {times} x 1,048,576" in labels


def test_states_in_bytes():
    """2,127,872 bytes a layer, and 2,158,592 with three drafted tokens."""
    assert state_bytes(NEMOTRON.state, ARTICLE) == 2_127_872
    assert state_bytes(NEMOTRON.state, MTP) == 2_158_592


@pytest.mark.parametrize(
    ("length", "gib"),
    [
        (131072, (0.33, 0.30, 0.67, 0.59)),
        (262144, (0.59, 0.55, 1.17, 1.09)),
        (524288, (1.09, 1.05, 2.19, 2.09)),
        (1048576, (2.09, 2.05, 4.19, 4.09)),
    ],
)
def test_cache_of_one_sequence(length, gib):
    """GiB per node at TP=2, with the state in float16, at TP=1, and with the cache in bfloat16."""
    changes = ({}, {"state_dtype": "float16"}, {"tp": 1}, {"cache_dtype": "auto"})
    for change, expected in zip(changes, gib, strict=True):
        assert cache_layout(NEMOTRON, replace(ARTICLE, **change)).least(length) / GIB == pytest.approx(
            expected, abs=0.0051
        )


def test_two_sparks_by_a_public_run():
    """36.5 GiB: 16,295,437 tokens and 62.16x of 262,144, 17.4x of a million, and 3.0x with every state kept."""
    layout = cache_layout(NEMOTRON, ARTICLE)
    blocks = int(36.5 * GIB) // layout.block_bytes
    assert numbers(layout, blocks, 262144) == (16_295_437, 62.16)
    assert round(blocks / layout.needed(1048576), 1) == 17.4
    every = cache_layout(NEMOTRON, replace(ARTICLE, prefix=True))
    assert round(int(36.5 * GIB) // every.block_bytes / every.needed(1048576), 1) == 3.0


def test_a_plain_transformer_has_blocks_of_sixteen_tokens():
    """Qwen3-30B: 48 KiB a token at TP=2, 6.0 GiB for its context."""
    layout = cache_layout(QWEN30, Demand(131072, 0.7, tp=2))
    assert (layout.block, layout.block_bytes, layout.fixed) == (16, 16 * 48 * 1024, 0)
    assert layout.least(131072) == 6 * GIB


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        (NEMOTRON, replace(ARTICLE, prefix=True, mode="align"), (8320, 1260, 9_643_837, 10_400_000)),
        (NEMOTRON, replace(ARTICLE, prefix=True, vllm=(0, 32, 0)), (8320, 1260, 9_643_837, 10_391_680)),
        (QWEN122, Demand(65536, 0.7, tp=2), (2096, 834, 1_561_629, 1_741_776)),
        (QWEN122, Demand(65536, 0.7, tp=4, cache_dtype="fp8", prefix=True), (2096, 1668, 2_876_685, 3_483_552)),
    ],
)
def test_other_layouts_as_vllm_made_them(shape, asked, expected):
    """Block, blocks, tokens and the largest length in 20.01 GiB, by get_kv_cache_configs of 0.21.0 and of 0.32.0."""
    layout, cache = cache_layout(shape, asked), int(20.01 * GIB)
    blocks = cache // layout.block_bytes
    found = (layout.block, blocks, numbers(layout, blocks, asked.length)[0], layout.largest(cache))
    assert found == expected


def test_every_rank_has_one_head_at_least():
    """Two KV heads on four ranks: each rank keeps one, so a token takes as much as on two ranks."""
    assert cache_layout(QWEN122, Demand(65536, 0.8, tp=4)).block_bytes > 0
    with pytest.raises(CannotKnow, match="tensor-parallel-size 3"):
        cache_layout(QWEN122, Demand(65536, 0.8, tp=3))


def modes(asked, versions):
    """The mode that each of these versions takes for Nemotron."""
    return [kept_states(NEMOTRON, replace(asked, vllm=version)) for version in versions]


def test_the_mode_of_each_version():
    """0.20 and 0.21 alone look at the drafter. 0.28 and later take `align`. A mode on the line counts up to 0.31."""
    versions = [(0, 19, 0), (0, 20, 0), (0, 21, 0), (0, 22, 0), (0, 27, 1), (0, 28, 0), (0, 32, 0)]
    cached, drafted = replace(ARTICLE, prefix=True), replace(MTP, prefix=True)
    assert modes(cached, versions) == [*["all"] * 5, "align", "align"]
    assert modes(drafted, versions) == ["all", "align", "align", "all", "all", "align", "align"]
    assert modes(replace(drafted, mode="all"), versions) == [*["all"] * 6, "align"]
    assert modes(replace(cached, mode="align"), versions) == ["align"] * 7 and modes(MTP, versions) == ["none"] * 7


def test_the_block_that_no_sequence_gets():
    """0.29 is the first that counts it, by get_kv_cache_configs of 0.28.0 and 0.29.0."""
    held = [cache_layout(QWEN30, Demand(4096, 0.7, vllm=(0, minor, 0))).held for minor in (21, 28, 29, 32)]
    assert held == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("vllm", "needed"), [((0, 19, 0), 6 * 125), ((0, 21, 0), 125 + 5 * 5), ((0, 27, 1), 6 * 125 + 5 * 3)]
)
def test_prefix_caching_beside_a_drafter(vllm, needed):
    """A million tokens take 150 blocks in 0.21, and 765 in 0.27.1: each of them holds a state, or a drafted token's."""
    assert cache_layout(NEMOTRON, replace(MTP, prefix=True, vllm=vllm)).needed(1048576) == needed


# --- The memory of one node ------------------------------------------------------------------------------------------


def test_the_readings_of_a_real_start():
    """The computed weights and cache are those of a real start (35.1 and 37.87, 20.01 and 15.29 GiB), rounded."""
    plain, drafted = budget(node=H100), budget(MTP, H100)
    assert [one.weights / GIB for one in (plain, drafted)] == pytest.approx([35.1, 37.87], abs=0.01)
    assert [one.cache / GIB for one in (plain, drafted)] == pytest.approx([20.01, 15.29], abs=0.15)


def test_a_gpu_with_its_own_memory():
    """vLLM takes its share of the GPU's memory, and the host loses only what the server's processes take."""
    found = budget(node=H100)
    assert found.reservation / GIB == pytest.approx(0.75 * 79.19) and found.left == 892 * GIB
    assert dict(budget_rows(found))["reserved by vLLM: 0.75 x 79.2"] == "59.4"
    assert rules(node=replace(H100, free=20 * GIB)) == []
    (short,) = findings(node=replace(H100, available=10 * GIB))  # a lower GPU_MEM_UTIL would not help the host
    assert short.rule == "memory-floor" and short.text.endswith("(8). Type on an H100: free -g")


def test_the_article_at_half_a_million_tokens():
    """18.1 of 121.7 GiB left, as the article read it. A million tokens leave the same."""
    half = budget(replace(ARTICLE, length=524288))
    assert half.left / GIB == pytest.approx(18.1, abs=0.1)
    assert budget().left == half.left
    more = half.layout.least(1048576) - half.layout.least(524288)
    assert more / GIB == pytest.approx(1.0, abs=0.01)
    assert rules() == []


def test_the_default_of_max_num_seqs():
    """1024 on a device of 70 GiB or more, otherwise 256: a GB10 tells none. A number on the line is believed."""
    assert (budget(node=H100).sequences, budget(node=H100).batched) == (1024, 8192)
    assert (budget().sequences, budget().batched) == (256, 2048)
    assert budget(node=replace(H100, device=40 * GIB)).sequences == 256
    assert budget(replace(ARTICLE, sequences=7)).sequences == 7
    assert budget(replace(ARTICLE, batched=100)).sequences == 100


def test_more_of_anything_never_leaves_more():
    """Longer contexts, drafted tokens and more batched tokens never take fewer bytes."""
    contexts = [budget().layout.least(length) for length in range(1, 2_000_000, 99_991)]
    assert contexts == sorted(contexts)
    caches = [budget(replace(ARTICLE, batched=batched)).cache for batched in (1, 8192, 8193, 65536)]
    assert caches == sorted(caches, reverse=True)
    assert budget(MTP).layout.largest(budget(MTP).cache) < budget().layout.largest(budget().cache)


def loaded(cache, utilization=0.75, model=35.12, on="2026-11-24"):
    """A load of the same line, as vLLM printed it."""
    return Loaded(on, utilization, int(cache * GIB), int(model * GIB), int(0.43 * GIB))


def test_what_vllm_printed_here_replaces_the_estimates():
    """At the same utilization the cache is what vLLM printed. At another one the rest of the rank is the same."""
    for share in (0.75, 0.7):
        read = as_loaded(budget(replace(ARTICLE, utilization=share), H100), [loaded(20.01)])
        assert read.cache / GIB == pytest.approx(20.01 - (0.75 - share) * 79.19, abs=0.001)
        assert (read.weights, read.graphs) == (int(35.12 * GIB), int(0.43 * GIB)) and read.loaded == "2026-11-24"
    assert read.activations / GIB == pytest.approx(0.75 * 79.19 - 20.01 - 35.12 - 0.43, abs=0.001)


def test_of_several_loads_the_one_that_took_most_counts():
    """Other processes can make a cache smaller. A smaller share with the same cache is a rank that took less."""
    loads = [loaded(20.01), loaded(18, on="2026-11-23"), loaded(17, utilization=0.7)]
    assert as_loaded(budget(), loads).loaded == "2026-11-23" and as_loaded(budget(), []) == budget()
    assert as_loaded(budget(), [*loads, loaded(18, on="2026-11-25")]).loaded == "2026-11-25"


def test_a_cache_that_was_read_decides(monkeypatch):
    """A small cache is refused, with the sizes of the load in the sentence. Without MODEL's size the estimate stays."""
    sizes = Loaded("2026-11-24", 0.75, GIB, 0, 0)
    _, (finding,) = memory_budgets(settings(), [SPARK], "0.21.0", None, [sizes])
    assert finding.rule == "memory-context" and "leaves 1.00 on a Spark, as loaded here on 2026-11-24." in finding.text
    assert as_loaded(budget(), [sizes]).weights == budget().weights


def test_a_cache_without_a_formula_has_the_size_that_was_read():
    """The table has the size of the cache, and sizes that the profile lacks are not missed."""
    (read,), (finding,) = memory_budgets(settings(PP_SIZE="2"), [SPARK], "0.21.0", None, [loaded(20.01)])
    assert (finding.rule, finding.refuses) == ("memory-unknown", False) and read.cache == pytest.approx(20.01 * GIB)
    assert ("KV cache (its tokens are not computed)", "20.0") in budget_rows(read)
    lacking = replace(budget(), layout=None, lacking=("weights",), weights=0)
    assert lacking.cache is None and as_loaded(lacking, [loaded(20.01)]).cache == pytest.approx(20.01 * GIB)


# --- The rules -------------------------------------------------------------------------------------------------------


def test_mtp_on_an_h100_is_refused_before_the_load():
    """vLLM takes 1024 sequences against about 840 blocks. The refusal has the number and the utilization that fit."""
    free = {"MEM_ABORT_GIB": "0", "MEM_FLOOR_GIB": "0", "MEM_WARN_GIB": "0"}
    (finding,) = findings(MTP, H100, **free)
    fits = budget(MTP, H100).cache // budget(MTP, H100).layout.block_bytes
    assert finding.rule == "memory-sequences" and f"MAX_NUM_SEQS={fits} inv launch" in finding.text
    assert rules(replace(MTP, sequences=fits), H100, **free) == []
    assert rules(replace(MTP, sequences=fits + 1), H100, **free) == ["MEMORY-SEQUENCES"]
    assert "GPU_MEM_UTIL=0.80 inv launch" in finding.text
    assert rules(replace(MTP, utilization=0.80), H100, **free) == []
    assert rules(replace(MTP, utilization=0.79), H100, **free) == ["MEMORY-SEQUENCES"]
    assert rules(replace(MTP, eager=True), H100, **free) == []


@pytest.mark.parametrize(
    "asked", [ARTICLE, MTP, replace(ARTICLE, tp=1), replace(ARTICLE, prefix=True, vllm=(0, 32, 0))]
)
def test_the_largest_length_fits_and_one_token_more_does_not(asked):
    """The length in a refusal is the largest that fits, and the utilization is the lowest that is enough."""
    for share in (0.35, 0.4, 0.62, 0.7):
        tried = replace(asked, utilization=share, sequences=1)
        if largest := budget(tried).layout.largest(budget(tried).cache):
            assert rules(replace(tried, length=largest)) == []
        longer = replace(tried, length=largest + 1)
        (finding,) = findings(longer)
        assert finding.rule == "memory-context" and (f"--max-len {largest}." in finding.text) == bool(largest)
        least = float(re.search(r"GPU_MEM_UTIL=(\S+) inv launch", finding.text)[1])
        assert rules(replace(longer, utilization=least)) == []
        assert "MEMORY-CONTEXT" in rules(replace(longer, utilization=round(least - 0.01, 2)))


def test_no_utilization_is_proposed_that_does_harm():
    """A proposal stays below GPU_MEM_UTIL_MAX, leaves the host enough, and holds the context."""
    (finding,) = findings(replace(ARTICLE, length=10**9))
    assert "No GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX (0.85) holds" in finding.text and "free -g" in finding.text
    most = {"GPU_MEM_UTIL": "0.5", "GPU_MEM_UTIL_MAX": "0.6"}
    (finding,) = findings(replace(ARTICLE, utilization=0.35, length=24_000_000), **most)
    assert "No GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX (0.6) holds" in finding.text
    tight = NodeMemory("tight", 100 * GIB, 64 * GIB)
    found = findings(replace(ARTICLE, length=12_000_000, utilization=0.5, sequences=1), tight)
    assert found and not any("GPU_MEM_UTIL=" in one.text for one in found)
    (finding,) = findings(replace(ARTICLE, length=10_000_000), replace(SPARK, available=int(60 * GIB)))
    assert finding.rule == "memory-floor" and "GPU_MEM_UTIL=" not in finding.text


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (117.4, []),
        (111.3, []),
        (111.2, ["memory-low"]),
        (107.3, ["memory-low"]),
        (107.2, ["MEMORY-FLOOR"]),
        (1, ["MEMORY-FLOOR"]),
    ],
)
def test_the_memory_that_the_host_keeps(available, expected):
    """91.3 GiB are reserved and 8.0 taken beside them. Below 12 GiB left there is a warning, below 8 a refusal."""
    assert rules(node=replace(SPARK, available=int(available * GIB))) == expected


def test_the_utilization_that_spares_the_host():
    """The proposal leaves the host enough, and the next hundredth would not."""
    node = replace(SPARK, available=int(100 * GIB))
    (finding,) = findings(node=node)
    assert "GPU_MEM_UTIL=0.65 inv launch" in finding.text
    assert rules(replace(ARTICLE, utilization=0.65), node) == []
    assert rules(replace(ARTICLE, utilization=0.66), node) == ["memory-low"]


@pytest.mark.parametrize(("name", "expected"), [("nemotron", []), ("qwen-30b", []), ("qwen-122b", ["memory-low"])])
def test_the_articles_lines_pass_on_a_spark(name, expected):
    """The article served all three on nodes with 117.4 GiB available. qwen-122b leaves 6 GiB, which is a warning."""
    asked = load_settings(find_model(name), shell={"ENV_FILE": "", "HOME": "/home/operator"})
    _, found = memory_budgets(asked, [SPARK], "0.21.0", None)
    assert [one.rule.upper() if one.refuses else one.rule for one in found] == expected


def test_a_proposal_leaves_the_floor_where_the_warning_cannot_be_kept():
    """A load with a warning beats a refusal. A warning itself proposes only what would silence the warning."""
    tight = replace(SPARK, available=int(61 * GIB))
    (refusal,) = findings(replace(ARTICLE, sequences=1), tight)
    assert refusal.rule == "memory-floor" and "GPU_MEM_UTIL=0.36 inv launch" in refusal.text
    (warning,) = findings(replace(ARTICLE, sequences=1, utilization=0.36), tight)
    assert warning.rule == "memory-low" and "GPU_MEM_UTIL=" not in warning.text


@pytest.mark.parametrize(
    ("shell", "vllm", "expected"),
    [
        ({}, "0.21.0", None),
        ({"MAX_NUM_BATCHED_TOKENS": ""}, "0.21.0", "2048 (vLLM's default on this GPU), and with prefix caching a step"),
        ({"MAX_NUM_BATCHED_TOKENS": "2095"}, "0.26.0", "2095, and with prefix caching a step must hold the 2096"),
        ({"MAX_NUM_BATCHED_TOKENS": "2096"}, "0.26.0", None),
        ({"MAX_NUM_BATCHED_TOKENS": ""}, "0.27.0", None),
        ({"MAX_NUM_BATCHED_TOKENS": "", "ENABLE_PREFIX_CACHING": "0"}, "0.21.0", None),
    ],
)
def test_a_step_that_holds_no_cache_block_is_refused(shell, vllm, expected):
    """vLLM compares them after the load, up to 0.26. The value in the refusal passes."""
    asked = load_settings(find_model("qwen-122b"), shell={"ENV_FILE": "", "HOME": "/home/operator", **shell})
    texts = [one.text for one in memory_budgets(asked, [SPARK] * 2, vllm, None)[1] if one.rule == "memory-batched"]
    assert len(texts) == bool(expected)
    for text in texts:
        assert expected in text and text.endswith(
            "Type: ENV_FILE= MAX_NUM_BATCHED_TOKENS=4096 inv launch --model qwen-122b"
        )


def test_a_drafter_and_prefix_caching_on_a_big_gpu():
    """As a real 0.21.0 died on an H200 after the load: block_size (8432) must be <= max_num_batched_tokens (8192)."""
    asked = replace(MTP, tp=1, sequences=256, prefix=True)
    h200 = NodeMemory("an H200", int(139.8 * GIB), int(139 * GIB), int(139.8 * GIB))
    (finding,) = findings(asked, h200)
    assert finding.rule == "memory-batched" and "hold the 8432 tokens" in finding.text
    assert "MAX_NUM_BATCHED_TOKENS=16384 inv launch" in finding.text
    assert rules(replace(asked, batched=16384), h200) == []


@pytest.mark.parametrize("share", [0.37, 0.40, 0.45])
def test_no_default_is_refused_that_a_spark_does_not_have(share):
    """256 sequences fit where 1024 would not."""
    assert rules(replace(ARTICLE, utilization=share)) == []
    assert rules(replace(ARTICLE, utilization=share), replace(SPARK, device=SPARK.total)) == ["MEMORY-SEQUENCES"]


@pytest.mark.parametrize(("free", "expected"), [(99.3, []), (99.2, ["page-cache"]), (0, ["page-cache"]), (None, [])])
def test_a_load_that_needs_page_cache_back_is_a_warning(free, expected):
    """91.3 GiB are reserved and 8.0 taken beside them. Free pages that are unknown are shown as such in the table."""
    node = replace(SPARK, free=free if free is None else int(free * GIB))
    assert rules(node=node) == expected
    for one in findings(node=node):
        assert "Type on a Spark: sync; echo 1 | sudo tee /proc/sys/vm/drop_caches" in one.text
    full = replace(node, available=int(99 * GIB))
    assert rules(node=full) == ["MEMORY-FLOOR"]  # dropping the cache would not help


@pytest.mark.parametrize("sizes", [(None, 1), (1, None), (None, None), (0, 0)])
def test_unknown_memory_is_refused(sizes):
    """A node that reports no memory does not count as a node with enough memory."""
    node = NodeMemory("x", *sizes)
    assert rules(node=node) == ["MEMORY-UNKNOWN"]
    assert ("left for the host", "unknown") in budget_rows(budget(node=node)) or node.total == 0


def test_a_profiles_figures_are_not_used_for_another_checkpoint():
    """With another MODEL_CKPT the KV cache is unknown, which is a warning. The host's floor is judged as before."""
    (budget,), (warning,) = memory_budgets(settings(MODEL_CKPT="a/b"), [SPARK], "0.21.0", None)
    assert (budget.cache, budget.layout, warning.rule, warning.refuses) == (None, None, "memory-unknown", False)
    assert "nemotron/a--b.json" in warning.text
    same = settings(MODEL_CKPT="nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4")
    assert memory_budgets(same, [SPARK], "0.21.0", None) == memory_budgets(settings(), [SPARK], "0.21.0", None)


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ({}, "1,048,576 tokens are beyond the model's own limit of 262,144 (max_position_embeddings). VLLM_ALLOW"),
        ({"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "0"}, "is not 1, so vLLM may refuse to start. Within it: "),
        ({"MAX_MODEL_LEN": "262144"}, None),
        ({"MODEL_CKPT": "a/b"}, None),
    ],
)
def test_a_context_beyond_the_models_own_limit_is_said(shell, said):
    """vLLM refuses such a context after its start, unless a variable allows it. The line with the limit is offered."""
    told = beyond_limit(settings(**shell))
    assert len(told) == (said is not None) and all(said in one for one in told)
    assert shell or told[0].endswith(" is 1, so vLLM serves them. The answers may be worse.")
    if "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in shell:
        assert told[0].endswith("inv launch --model nemotron --max-len 262144")


def test_pipeline_parallelism_is_warned_of():
    """The cache is not computed for stages, and nothing refuses because of it. The host's share is still held."""
    full = replace(SPARK, available=int(60 * GIB))
    budgets, found = memory_budgets(settings(PP_SIZE="2"), [SPARK, full], "0.21.0", None)
    assert [(finding.rule, finding.refuses) for finding in found] == [("memory-unknown", False), ("memory-floor", True)]
    assert ("KV cache (its tokens are not computed)", budget_rows(budgets[0])[3][1]) == budget_rows(budgets[0])[3]


# --- The line --------------------------------------------------------------------------------------------------------

LINE = shlex.split(
    "vllm serve a/b --tensor-parallel-size 2 --pipeline-parallel-size 1 --data-parallel-size 1 --kv-cache-dtype fp8 "
    "--max-model-len 1048576 --gpu-memory-utilization 0.75 --async-scheduling --cpu-offload-gb 0"
)


def test_a_line_is_read_as_vllm_reads_it():
    """The last of two options counts, underscores are dashes, and MTP's tokens come from its JSON."""
    mtp = ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3, "moe_backend": "triton"}']
    assert read_demand(LINE) == ARTICLE
    assert read_demand([*LINE, *mtp]) == MTP
    assert read_demand([*LINE, "--max_num_seqs=4", "--max-num-seqs", "5"]).sequences == 5
    assert read_demand([*LINE, "-tp", "4", "--enforce-eager"]) == replace(ARTICLE, tp=4, eager=True)
    assert not read_demand([*LINE, "--enable-prefix-caching", "--no-enable-prefix-caching"], (0, 32, 0)).prefix
    assert read_demand(LINE, (0, 28, 0)).prefix and not read_demand(LINE, (0, 27, 1)).prefix


@pytest.mark.parametrize(
    "extra",
    [
        "--max-model-len auto",
        "--max-model-len",
        "--kv-cache-dtype nvfp4",
        "--mamba-ssm-cache-dtype int8",
        "--block-size auto",
        "--data-parallel-size 2",
        "--dtype float32",
        "--speculative-config {}",
        "--speculative-config.method ngram",
        '--speculative-config {"method":"eagle3","num_speculative_tokens":3}',
        '--speculative-config {"method":"mtp","num_speculative_tokens":true}',
        "--hf-overrides {}",
    ],
)
def test_an_option_that_is_not_computed_is_served_with_a_warning(extra):
    """The warning names the option. What vLLM reserves is known all the same, so the host's floor still refuses."""
    assert re.fullmatch(r"--[a-z].+ a value that is not computed\.", read_demand([*LINE, *extra.split()]).unknown)
    asked = settings(SERVE_EXTRA=shlex.join(extra.split()))
    (fits, _), found = memory_budgets(asked, [SPARK, replace(SPARK, available=60 * GIB)], "0.21.0", None)
    assert [(one.rule, one.refuses) for one in found] == [("memory-unknown", False), ("memory-floor", True)]
    assert (fits.cache, fits.left) == (None, budget().left) and "GPU_MEM_UTIL=0.36" in found[1].text


@pytest.mark.parametrize(
    "extra",
    [
        "--tensor-parallel-size 0",
        "--gpu-memory-utilization nan",
        "--gpu-memory-utilization 1.5",
        "--kv-cache-memory-bytes much",
        "--cpu-offload-gb 8",
        "--cpu-offload-gb",
    ],
)
def test_a_line_whose_reservation_is_not_known_is_refused(extra):
    """Without the size that vLLM reserves, nobody knows what the host keeps."""
    with pytest.raises(CannotKnow, match=r"--[a-z]"):
        read_demand([*LINE, *extra.split()])
    budgets, (finding,) = memory_budgets(settings(SERVE_EXTRA=shlex.join(extra.split())), [SPARK], "0.21.0", None)
    assert (budgets, finding.rule, finding.refuses) == ([], "memory-unknown", True)
    assert "invalid" not in finding.text and "choose" not in finding.text


def test_an_option_without_which_the_reservation_is_known_is_named():
    """The refusal names the option and the setting, in no words of argparse. An offload of 0 is none."""
    with pytest.raises(CannotKnow, match=r"^--cpu-offload-gb in .+ is not computed\. Take it out of SERVE_EXTRA"):
        read_demand([*LINE, "--cpu-offload-gb", "4"])
    assert read_demand([*LINE, "--cpu-offload-gb", "0.0"]) == ARTICLE


def test_a_line_without_its_length_is_not_guessed():
    """The model's own maximum is not the length that this project launches with."""
    assert "--max-model-len" in read_demand(["vllm", "serve", "a/b", "--gpu-memory-utilization", "0.7"]).unknown


# --- What a line sets itself -----------------------------------------------------------------------------------------


def test_the_size_of_a_block_on_the_line():
    """A plain transformer gets that block. With states it becomes the next multiple that holds a state."""
    assert cache_layout(QWEN30, Demand(131072, 0.7, tp=2, unit=64)).block_bytes == 64 * 48 * 1024
    blocks = [cache_layout(NEMOTRON, replace(ARTICLE, unit=unit)).block for unit in (16, 64, 256, 16384)]
    assert blocks == [8320, 8320, 8448, 16384]
    assert cache_layout(NEMOTRON, replace(ARTICLE, unit=48, prefix=True)).block == 8448
    assert read_demand([*LINE, "--block-size", "64"]) == replace(ARTICLE, unit=64)


def given(size, **changed):
    """The article's demand with a KV cache of so many GiB on its line, and the findings for one node."""
    asked = replace(ARTICLE, cache=int(size * GIB), sequences=1, **changed)
    return budget(asked), findings(asked)


def test_a_cache_of_a_given_size():
    """vLLM takes the model and those bytes, 39.4 GiB and 8, and a lower GPU_MEM_UTIL takes nothing from the cache."""
    assert read_demand([*LINE, "--kv-cache-memory-bytes", "8G"]) == replace(ARTICLE, cache=8 * GIB)
    found, none = given(8, utilization=0.1)
    assert (found.reservation / GIB, found.left / GIB) == pytest.approx((47.4, 62.0), abs=0.1) and none == []
    assert dict(budget_rows(found))["reserved by vLLM"] == "47.4"
    assert found.blocks == 8 * GIB // found.layout.block_bytes


def test_a_given_cache_that_is_too_large_or_too_small():
    """A size that leaves the host too little, and one that holds no request, are refused with the size that fits."""
    _, (large,) = given(65)
    fits = int(re.search(r"Give --kv-cache-memory-bytes (\d+)\.$", large.text)[1])
    assert large.rule == "memory-floor" and given(fits / GIB)[1] == []
    assert given(fits / GIB + 0.01)[1][0].rule == "memory-low"
    _, (small,) = given(2)
    fits = int(re.search(r"Give --kv-cache-memory-bytes (\d+)\.$", small.text)[1])
    assert small.rule == "memory-context" and "and --kv-cache-memory-bytes gives 2.00" in small.text
    assert given(fits / GIB)[1] == [] and given((fits - 1) / GIB)[1] != []


def test_vllms_own_condition_holds_for_a_given_cache():
    """vLLM starts only where GPU_MEM_UTIL of the memory is free, however little it takes then."""
    found, (finding,) = given(8, utilization=0.97)
    assert finding.rule == "memory-floor" and finding.refuses and found.left == given(8)[0].left
    assert (
        "wants 118.0 GiB free on a Spark, which has 117.4. Type: ENV_FILE= GPU_MEM_UTIL=0.89 inv launch" in finding.text
    )
    assert given(8, utilization=0.96)[1] == given(8, utilization=0.89)[1] == []
    own = replace(H100, available=50 * GIB)  # MemAvailable says nothing of a GPU with its own memory
    assert rules(replace(ARTICLE, utilization=0.97, cache=8 * GIB, sequences=1), own) == []


def test_a_small_given_cache_leaves_the_host_the_rest():
    """qwen-122b with 2 GiB of cache leaves 41 GiB, and no limit that is below them refuses."""
    shell = {"ENV_FILE": "", "HOME": "/home/operator", "SERVE_EXTRA": "--kv-cache-memory-bytes 2G"}
    asked = load_settings(find_model("qwen-122b"), shell={**shell, "MEM_FLOOR_GIB": "7"})
    (known,), found = memory_budgets(asked, [SPARK], "0.21.0", None)
    assert dict(budget_rows(known))["left for the host"] == "41.0" and found == []


# --- A model of which less is known -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["{", '{"config": {"model_type": "deepseek_v9"}}', "{}", None])
def test_a_model_without_a_formula_is_served(tmp_path, kept, monkeypatch):
    """An unknown architecture, and a JSON file that is broken, empty or not there, warn. The host's floor refuses."""
    monkeypatch.setattr("cluster.memory.ROOT", tmp_path)
    (tmp_path / "nemotron").mkdir()
    if kept:
        (tmp_path / "nemotron/120b.json").write_text(kept)
    _, found = memory_budgets(settings(), [SPARK, replace(SPARK, available=100 * GIB)], "0.21.0", None)
    assert [(one.rule, one.refuses) for one in found] == [("memory-unknown", False), ("memory-floor", True)]
    assert found[0].text.startswith("How many tokens the KV cache holds is not computed. ")
    lacks = {
        "{}": "120b.json has no config, and the ",
        None: "120b.json is missing, and the checkpoint here has no config",
    }
    assert lacks.get(kept, "120b.json is not understood: ") in found[0].text
    assert "weights_gib, activations_gib, graphs_gib" in found[0].text


def test_a_given_cache_beside_unknown_weights(tmp_path, monkeypatch):
    """At least the reservation is assumed, because vLLM wants that free. The warning says that it may be more."""
    monkeypatch.setattr("cluster.memory.ROOT", tmp_path)
    asked = settings(SERVE_EXTRA="--kv-cache-memory-bytes 8G")
    (known,), (finding,) = memory_budgets(asked, [SPARK], "0.21.0", None)
    assert known.left == budget().left and "takes more where the weights need more" in finding.text
    (known,), _ = memory_budgets(settings(SERVE_EXTRA="--kv-cache-memory-bytes 100G"), [SPARK], "0.21.0", None)
    assert known.reservation == 100 * GIB


def test_a_step_is_judged_where_only_a_size_is_unknown():
    """The layout of the cache needs no size of the weights."""
    asked = replace(MTP, prefix=True)
    found = node_budget(cache_layout(NEMOTRON, asked), MEASURED | {"activations": None}, asked, SPARK)
    assert [one.rule for one in memory_findings(found, settings())] == ["memory-batched"]
    assert ("activations (allowance)", "unknown") in budget_rows(found)
