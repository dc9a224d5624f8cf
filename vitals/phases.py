"""How far a load has come, read from the server's own log: the last sentence that belongs to a phase names it."""

import re
from dataclasses import dataclass

# vLLM 0.11 to 0.32, V1 engine, as public logs and the stand-in's own have them. A phase is on from its first sign;
# those that a model or a line does not need (a CPU compiles nothing, --enforce-eager captures nothing) are passed over.
PHASES = (
    ("start", r""),
    (
        "ranks",
        r"Connecting to existing Ray|Initializing a V1 LLM engine|world_size=",
    ),
    ("weights", r"Starting to load model|Loading \w* ?(?:safetensors|weights|pt)|checkpoint shards"),
    ("profiling", r"Model loading took"),
    ("compilation", r"torch\.compile takes|Dynamo bytecode|Compiling a graph|compiled graph"),
    ("KV cache", r"Available KV cache memory|GPU KV cache size|CPU KV cache size|Maximum concurrency"),
    ("graph capture", r"Capturing (?:CUDA|cuda) ?graph"),
    ("warm-up", r"Graph capturing finished|init engine \(|Warming up|Starting vLLM (?:API )?server|Supported tasks"),
    ("API", r"Application startup complete"),
)
_PERCENT = re.compile(r"(\d{1,3})%(?: Completed)?[ |]")
_SIGNS = [(name, re.compile(sign)) for name, sign in PHASES[1:]]


@dataclass
class Load:
    """One load as its log tells it so far; `percent` is what a progress bar of the phase said last, or nothing."""

    phase: str = PHASES[0][0]
    percent: str = ""

    def read(self, line: str) -> bool:
        """Take one line in; whether it began another phase. Phases only go forward."""
        bar = _PERCENT.search(line)
        found = next((name for name, sign in reversed(_SIGNS) if sign.search(line)), self.phase)
        if found == self.phase or _order(found) < _order(self.phase):
            self.percent = f"{bar[1]}%" if bar and found == self.phase else self.percent
            return False
        self.phase, self.percent = found, f"{bar[1]}%" if bar else ""
        return True

    def __str__(self) -> str:
        return f"{self.phase} {self.percent}".strip()


def _order(phase: str) -> int:
    return [name for name, _ in PHASES].index(phase)
