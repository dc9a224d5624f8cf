"""The memory gate: to the token what a real vLLM printed, and the largest that fits is the largest that fits."""

import shlex
from dataclasses import replace

import pytest

from checks import cache, demand, footprint, groups, limits, memory
from checks.demand import Demand
from checks.fields import CannotKnow
from checks.footprint import GIB
from checks.limits import Limits
from checks.memory import SPARK, Host
from settings.models import ROOT

NEMOTRON, WEIGHTS, _ = footprint.load(ROOT / "nemotron/120b.json", None, "")
QWEN30, _, _ = footprint.load(ROOT / "qwen/30b.json", None, "")
QWEN122, _, _ = footprint.load(ROOT / "qwen/122b.json", None, "")
H100 = Host("an H100", int(79.19 * GIB), int(78.5 * GIB), nvml=True)
ARTICLE = Demand(1048576, 0.75, tp=2, cache_dtype="fp8")
MTP = replace(ARTICLE, speculative=3)
LIMITS = Limits(6, 3, 0.85, "inv launch --model nemotron")


def budget(asked=ARTICLE, host=SPARK, weights=WEIGHTS):
    """Nemotron's memory on a host."""
    return memory.budget(NEMOTRON, weights, asked, host)


def rules(asked=ARTICLE, host=SPARK, **limit):
    """The names of what is found, those that refuse in capitals."""
    found = limits.findings(budget(asked, host), replace(LIMITS, **limit))
    return [finding.rule.upper() if finding.refuses else finding.rule for finding in found]


def test_two_h100_without_mtp_to_the_token():
    """20.01 GiB of cache: block 8320, 1260 blocks, 10,009,134 tokens, 9.55x; the next start had one block more."""
    cut = cache.layout(NEMOTRON, ARTICLE)
    blocks = cut.blocks(int(20.01 * GIB))
    assert (cut.block, blocks, cut.needed(1048576)) == (8320, 1260, 132)
    assert (cut.tokens(blocks, 1048576), round(cut.concurrency(blocks, 1048576), 2)) == (10_009_134, 9.55)
    assert (cut.tokens(1261, 1048576), round(cut.concurrency(1261, 1048576), 2)) == (10_017_078, 9.55)


def test_two_h100_with_mtp_to_the_token():
    """15.29 GiB of cache: block 8432, 845 blocks, 6,110,667 tokens, 5.83x."""
    cut = cache.layout(NEMOTRON, MTP)
    blocks = cut.blocks(int(15.29 * GIB))
    assert (cut.block, blocks, cut.needed(1048576)) == (8432, 845, 145)
    assert (cut.tokens(blocks, 1048576), round(cut.concurrency(blocks, 1048576), 2)) == (6_110_667, 5.83)


def test_states_in_bytes():
    """2,127,872 bytes a layer, and 2,158,592 with three drafted tokens."""
    assert cache.state_bytes(NEMOTRON.state, ARTICLE, "bfloat16") == 2_127_872
    assert cache.state_bytes(NEMOTRON.state, MTP, "bfloat16") == 2_158_592


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
    for asked, expected in zip(
        (
            ARTICLE,
            replace(ARTICLE, state_dtype="float16"),
            replace(ARTICLE, tp=1),
            replace(ARTICLE, cache_dtype="auto"),
        ),
        gib,
        strict=True,
    ):
        assert cache.layout(NEMOTRON, asked).least(length) / GIB == pytest.approx(expected, abs=0.0051)


def test_two_sparks_by_a_public_run():
    """36.5 GiB: 16,295,437 tokens and 62.16x of 262,144; 17.4x of a million; 3.0x with every state kept."""
    cut = cache.layout(NEMOTRON, ARTICLE)
    blocks = cut.blocks(int(36.5 * GIB))
    assert (cut.tokens(blocks, 262144), round(cut.concurrency(blocks, 262144), 2)) == (16_295_437, 62.16)
    assert round(cut.concurrency(blocks, 1048576), 1) == 17.4
    every = cache.layout(NEMOTRON, replace(ARTICLE, prefix=True))
    assert round(every.concurrency(every.blocks(int(36.5 * GIB)), 1048576), 1) == 3.0


def test_a_plain_transformer_has_blocks_of_sixteen_tokens():
    """Qwen3-30B: 48 KiB a token at TP=2, 6.0 GiB for its context."""
    cut = cache.layout(QWEN30, Demand(131072, 0.7, tp=2))
    assert (cut.block, cut.block_bytes, cut.fixed) == (16, 16 * 48 * 1024, 0)
    assert cut.least(131072) == 6 * GIB


@pytest.mark.parametrize(
    ("shape", "asked", "expected"),
    [
        (NEMOTRON, replace(ARTICLE, prefix=True, mode="align"), (8320, 1260, 9_643_837, 10_400_000)),
        (NEMOTRON, replace(ARTICLE, prefix=True, vllm=(0, 32, 0)), (8320, 1260, 9_643_837, 10_391_680)),
        (NEMOTRON, replace(ARTICLE, tp=1, pp=2), (8320, 1260, 10_009_134, 10_441_600)),
        (NEMOTRON, replace(MTP, tp=1, pp=3), (8432, 1658, 11_989_924, 13_811_616)),
        (QWEN30, Demand(131072, 0.7, tp=1, pp=3), (16, 40980, 655_680, 655_680)),
        (QWEN122, Demand(65536, 0.7, tp=2), (2096, 834, 1_561_629, 1_741_776)),
        (QWEN122, Demand(65536, 0.7, pp=2, speculative=3), (2128, 704, 1_072_961, 1_472_576)),
        (QWEN122, Demand(65536, 0.7, tp=4, cache_dtype="fp8", prefix=True), (2096, 1668, 2_876_685, 3_483_552)),
    ],
)
def test_other_cuts_as_vllm_made_them(shape, asked, expected):
    """Block, blocks, tokens and the largest length in 20.01 GiB, by get_kv_cache_configs of 0.21.0, and of 0.32.0."""
    cut = cache.layout(shape, asked)
    blocks = cut.blocks(int(20.01 * GIB))
    assert (cut.block, blocks, cut.tokens(blocks, asked.length), cut.largest(blocks)) == expected


def test_layers_are_dealt_out_as_vllm_deals_them():
    """Groups of the rarer kind, or of the other if that is less than half more; a spare layer goes to the middle."""
    assert groups.size(("attention",) * 10 + ("state",) * 12) == 12
    assert groups.size(("attention",) * 10 + ("state",) * 15) == 10
    assert groups.widest(("other", "other", "attention", "attention", "other"), 0, 2, 4) == 2


def test_ranks_beyond_the_heads_have_one_each():
    """Two KV heads on four ranks: each rank keeps one, so a token takes as much as on two."""
    assert cache.layout(QWEN122, Demand(65536, 0.8, tp=4)).block_bytes > 0
    with pytest.raises(CannotKnow, match="tensor-parallel-size 3"):
        cache.layout(QWEN122, Demand(65536, 0.8, tp=3))


def test_the_readings_of_a_real_start():
    """The H100's own numbers within what weights and allowances are rounded to: 35.1 and 37.87 GiB, 20.01 and 15.29."""
    plain, drafted = budget(host=H100), budget(MTP, H100)
    assert plain.weights / GIB == pytest.approx(35.1, abs=0.01) and drafted.weights / GIB == pytest.approx(
        37.87, abs=0.01
    )
    assert plain.cache / GIB == pytest.approx(20.01, abs=0.1) and drafted.cache / GIB == pytest.approx(15.29, abs=0.15)


def test_the_article_at_half_a_million_tokens():
    """18.1 of 121.7 GiB left, as the article read it; a million tokens leave the same, not 9 to 10 GiB less."""
    assert budget(replace(ARTICLE, length=524288)).left / GIB == pytest.approx(18.1, abs=0.1)
    assert budget().left == budget(replace(ARTICLE, length=262144)).left
    assert (budget().context - budget(replace(ARTICLE, length=524288)).context) / GIB == pytest.approx(1.0, abs=0.01)
    assert rules() == []


def test_mtp_on_an_h100_is_refused_before_the_load():
    """max_num_seqs 1024 against about 840 blocks: the value that fits and the utilisation that would do are named."""
    (finding,) = limits.findings(budget(MTP, H100), LIMITS)
    fits = budget(MTP, H100).blocks
    assert finding.rule == "memory-sequences" and f"MAX_NUM_SEQS={fits} inv launch" in finding.text
    assert rules(replace(MTP, sequences=fits), H100) == []
    assert rules(replace(MTP, sequences=fits + 1), H100) == ["MEMORY-SEQUENCES"]
    assert "GPU_MEM_UTIL=0.80 inv launch" in finding.text
    assert rules(replace(MTP, utilization=0.80), H100, floor=0, warn=0) == []
    assert rules(replace(MTP, utilization=0.79), H100, floor=0, warn=0) == ["MEMORY-SEQUENCES"]
    assert rules(replace(MTP, eager=True), H100) == []


def test_whose_default_is_assumed():
    """1024 unless NVML is known not to tell, or the device is small; then 256. A number on the line is believed."""
    assert (budget().sequences, budget().assumed) == (1024, True)
    assert budget(host=replace(SPARK, nvml=False)).sequences == 256
    assert budget(host=Host("small", 40 * GIB, 40 * GIB)).sequences == 256
    assert (budget(replace(ARTICLE, sequences=7)).sequences, budget(replace(ARTICLE, sequences=7)).assumed) == (
        7,
        False,
    )
    assert budget(replace(ARTICLE, batched=100)).sequences == 100


@pytest.mark.parametrize(
    "asked", [ARTICLE, MTP, replace(ARTICLE, tp=1), replace(ARTICLE, prefix=True, vllm=(0, 32, 0))]
)
@pytest.mark.parametrize("share", [0.35, 0.4, 0.62, 0.7])
def test_the_largest_length_fits_and_one_token_more_does_not(asked, share):
    """The length that is named is the largest, exactly, and so is the utilisation."""
    asked = replace(asked, utilization=share, sequences=1)
    largest = budget(asked).largest
    if not largest:
        assert "MEMORY-CONTEXT" in rules(replace(asked, length=1))
        return
    assert rules(replace(asked, length=largest)) == []
    (finding,) = limits.findings(budget(replace(asked, length=largest + 1)), LIMITS)
    assert finding.rule == "memory-context" and f"--max-len {largest}." in finding.text
    least = limits.least_utilization(budget(replace(asked, length=largest + 1)), asked_bytes(asked, largest + 1))
    assert budget(replace(asked, length=largest + 1, utilization=least)).largest > largest
    assert budget(replace(asked, length=largest + 1, utilization=round(least - 0.01, 2))).largest <= largest


def asked_bytes(asked, length):
    """The cache that so many tokens need."""
    return cache.layout(NEMOTRON, asked).least(length)


def test_a_context_that_no_utilisation_holds():
    """Where GPU_MEM_UTIL_MAX is in the way that is said, and no higher value is proposed."""
    huge = replace(ARTICLE, length=10**9)
    (finding,) = limits.findings(budget(huge), LIMITS)
    assert "No GPU_MEM_UTIL up to GPU_MEM_UTIL_MAX (0.85) would do." in finding.text
    (finding,) = limits.findings(
        budget(replace(ARTICLE, utilization=0.35, length=24_000_000)), replace(LIMITS, most=0.6)
    )
    assert "up to GPU_MEM_UTIL_MAX (0.6) would do." in finding.text
    (finding,) = limits.findings(budget(replace(ARTICLE, tp=1, utilization=0.5)), LIMITS)
    assert "The largest that fits: none" in finding.text


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (117.4, []),
        (105.3, []),
        (105.2, ["memory-low"]),
        (102.3, ["memory-low"]),
        (102.2, ["MEMORY-FLOOR"]),
        (1, ["MEMORY-FLOOR"]),
    ],
)
def test_what_the_host_keeps(available, expected):
    """91.3 GiB reserved and 8.0 beside it: below 6 left is warned of, below 3 refused."""
    assert rules(host=replace(SPARK, available=int(available * GIB))) == expected


def test_the_utilisation_that_spares_the_host():
    """The proposal leaves the host enough, and the next hundredth would not."""
    host = replace(SPARK, available=int(100 * GIB))
    (finding,) = limits.findings(budget(host=host), LIMITS)
    assert "GPU_MEM_UTIL=0.70 inv launch" in finding.text
    assert rules(replace(ARTICLE, utilization=0.70), host) == []
    assert rules(replace(ARTICLE, utilization=0.71), host) == ["memory-low"]


def test_no_utilisation_that_would_harm():
    """What leaves less than the floor is named with its price, and what holds no context is not proposed."""
    host = Host("tight", 100 * GIB, 64 * GIB)
    long = replace(ARTICLE, length=12_000_000, utilization=0.5, sequences=1)
    texts = {finding.rule: finding.text for finding in limits.findings(budget(long, host), LIMITS)}
    assert "GPU_MEM_UTIL=0.63 would do, but leave the host -7.0 GiB." in texts["memory-context"]
    full = replace(SPARK, available=int(60 * GIB))
    (finding,) = limits.findings(budget(replace(ARTICLE, length=10_000_000), full), LIMITS)
    assert finding.rule == "memory-floor" and "GPU_MEM_UTIL" not in finding.text and "free -g" in finding.text


@pytest.mark.parametrize("host", [Host("x", None, 1), Host("x", 1, None), Host("x", None, None), Host("x", 0, 0)])
def test_unknown_memory_is_refused(host):
    """A node that did not say is not a node with enough."""
    assert rules(host=host) == ["MEMORY-UNKNOWN"]
    assert ("left for the host", "unknown") in memory.rows(budget(host=host)) or host.total == 0


def test_more_of_anything_never_leaves_more():
    """Longer contexts, more drafted tokens, more batched tokens: never fewer bytes; higher utilisation: never less."""
    contexts = [budget(replace(ARTICLE, length=length)).context for length in range(1, 2_000_000, 99_991)]
    assert contexts == sorted(contexts)
    caches = [budget(replace(ARTICLE, batched=batched)).cache for batched in (1, 8192, 8193, 65536)]
    assert caches == sorted(caches, reverse=True)
    lengths = [budget(replace(ARTICLE, utilization=share / 100)).largest for share in range(1, 101)]
    assert lengths == sorted(lengths)
    assert budget(MTP).largest < budget().largest


LINE = shlex.split(
    "vllm serve a/b --tensor-parallel-size 2 --pipeline-parallel-size 1 --data-parallel-size 1 --kv-cache-dtype fp8 "
    "--max-model-len 1048576 --gpu-memory-utilization 0.75"
)


def test_a_line_is_read_as_vllm_reads_it():
    """The last of two counts, underscores are dashes, = is a space, and MTP's tokens come from its JSON."""
    mtp = ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3, "moe_backend": "triton"}']
    assert demand.read(LINE) == ARTICLE
    assert demand.read([*LINE, *mtp]) == MTP
    assert demand.read([*LINE, "--max_num_seqs=4", "--max-num-seqs", "5"]).sequences == 5
    assert demand.read([*LINE, "-tp", "4", "--enforce-eager"]) == replace(ARTICLE, tp=4, eager=True)
    assert demand.read([*LINE, "--enable-prefix-caching", "--no-enable-prefix-caching"], (0, 32, 0)).prefix is False
    assert demand.read(LINE, (0, 32, 0)).prefix


@pytest.mark.parametrize(
    "extra",
    [
        "--max-model-len auto",
        "--max-model-len -1",
        "--max-model-len",
        "--kv-cache-dtype nvfp4",
        "--mamba-ssm-cache-dtype int8",
        "--gpu-memory-utilization nan",
        "--gpu-memory-utilization 0,75",
        "--gpu-memory-utilization 1.5",
        "--kv-cache-memory-bytes 8G",
        "--block-size 32",
        "--data-parallel-size 2",
        "--dtype float32",
        "--speculative-config {}",
        "--speculative-config.method ngram",
        '--speculative-config {"method":"eagle3","num_speculative_tokens":3}',
        '--speculative-config {"method":"mtp","num_speculative_tokens":true}',
    ],
)
def test_what_a_line_asks_beyond_the_arithmetic_is_said(extra):
    """An option or a value whose effect on memory is not known raises."""
    with pytest.raises(CannotKnow):
        demand.read([*LINE, *extra.split()])


def test_a_line_without_its_length_is_not_guessed_at():
    """The model's own maximum is not what this project launches with."""
    with pytest.raises(CannotKnow, match="--max-model-len"):
        demand.read(["vllm", "serve", "a/b"])
