"""What a `vllm serve` line asks of memory. The line is read, not the settings: what counts is what will be run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from checks import line
from checks.fields import CannotKnow
from checks.line import Option

# Bytes of one element. fp8 has several names; the others of vLLM's (nvfp4, turboquant, ...) pack in their own way.
CACHE_BYTES = {"bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MODES = ("none", "align", "all")
DEFAULT_VLLM = (0, 21, 0)

# Each of these changes the arithmetic in a way that is not written down here.
UNKNOWN = (
    "--block-size",
    "--cpu-offload-gb",
    "--decode-context-parallel-size",
    "--hf-overrides",
    "--kv-cache-memory-bytes",
    "--mamba-block-size",
    "--mamba-cache-dtype",
    "--num-gpu-blocks-override",
    "--kv-cache-dtype-skip-layers",
)


@dataclass(frozen=True)
class Demand:
    """What one line asks for: tokens, a share of memory, ranks; None where the line leaves it to vLLM.

    `prefix`: prefix caching, as the line says or as this vLLM does by itself for a model with constant state; `mode`:
    what it then keeps of the states, "" where vLLM chooses; `vllm`: the version that will run.
    """

    length: int
    utilization: float
    tp: int = 1
    pp: int = 1
    cache_dtype: str = "auto"
    state_dtype: str = "auto"
    speculative: int = 0
    sequences: int | None = None
    batched: int | None = None
    prefix: bool = False
    mode: str = ""
    eager: bool = False
    vllm: tuple[int, ...] = DEFAULT_VLLM


def read(words: Sequence[str], vllm: tuple[int, ...] = DEFAULT_VLLM) -> Demand:
    """What the words of a `vllm serve` line ask for; raises CannotKnow where an option is beyond the arithmetic.

    vllm: the version that will run. Prefix caching of models with constant state is off by itself in 0.21.0 and on in
    0.32.0 (config/model.py); between them the one that takes more is assumed, here and below.
    """
    options = line.read(words)
    prefix = line.flag(options, "--enable-prefix-caching")
    mode = _word(options, "none", MODES, "--mamba-cache-mode")
    for option in options:
        if option.name in UNKNOWN and option.values not in ((), ("0",)):
            raise CannotKnow(f"What {option.name} does to memory is not reckoned here.")
    if _one(options, "1", "--data-parallel-size", "-dp") != 1:
        raise CannotKnow("Data parallelism is not reckoned here.")
    _word(options, "auto", ("auto", "bfloat16", "float16", "half"), "--dtype")
    return Demand(
        length=_one(options, None, "--max-model-len"),
        utilization=_share(options),
        tp=_one(options, "1", "--tensor-parallel-size", "-tp"),
        pp=_one(options, "1", "--pipeline-parallel-size", "-pp"),
        cache_dtype=_word(options, "auto", ("auto", *CACHE_BYTES), "--kv-cache-dtype"),
        state_dtype=_word(options, "auto", ("auto", *STATE_BYTES), "--mamba-ssm-cache-dtype"),
        speculative=_speculative(options),
        sequences=_one(options, "0", "--max-num-seqs") or None,
        batched=_one(options, "0", "--max-num-batched-tokens") or None,
        prefix=vllm > DEFAULT_VLLM if prefix is None else prefix,
        mode="" if mode == "none" else mode,
        eager=bool(line.flag(options, "--enforce-eager")),
        vllm=vllm,
    )


def _one(options: Sequence[Option], otherwise: str | None, *names: str) -> int:
    """A whole number; the profiles' forms have brought 1M and 256k to digits already."""
    found = line.value(options, *names)
    found = otherwise if found is None else found
    if found is None or not (found.isascii() and found.isdigit() and len(found) < 16):
        raise CannotKnow(f"{names[0]} is {found!r}; what that comes to is not known here.")
    return int(found)


def _word(options: Sequence[Option], otherwise: str, known: Sequence[str], name: str) -> str:
    found = line.value(options, name)
    if found is not None and found not in known:
        raise CannotKnow(f"{name} is {found!r}, whose size is not known here.")
    return otherwise if found is None else found


def _share(options: Sequence[Option]) -> float:
    found = line.value(options, "--gpu-memory-utilization")
    try:
        share = float(found) if found is not None else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise CannotKnow(f"--gpu-memory-utilization is {found!r}; a share above 0 and at most 1 can be reckoned with.")
    return share


def _speculative(options: Sequence[Option]) -> int:
    """The tokens that MTP drafts; another method brings a model of its own, of unknown size."""
    if any(option.name.startswith("--speculative-config.") for option in options):
        raise CannotKnow("--speculative-config in parts is not read here.")
    found = line.value(options, "--speculative-config")
    if found is None:
        return 0
    try:
        config = json.loads(found)
        method, tokens = config["method"], config["num_speculative_tokens"]
    except (ValueError, KeyError, TypeError, RecursionError):
        method = tokens = None
    if method != "mtp" or type(tokens) is not int or not 0 < tokens < 100:
        raise CannotKnow("--speculative-config is none of MTP with its number of tokens.")
    return tokens
