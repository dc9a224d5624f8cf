"""The models' `vllm serve` lines, whole and with every gate turned, put to the real parser of an image."""

import json
from collections.abc import Iterator
from pathlib import Path

from cluster import node
from command import template
from rehearsal.hosts import Host
from rehearsal.shell import RehearsalError
from settings import names, resolve
from settings.models import Model

_PARSER = Path(__file__).with_name("parse_lines.py")
# What a knob that is empty, or off, in its profile is turned to.
_TURNED_ON = {"MAX_NUM_SEQS": "8", "MAX_NUM_BATCHED_TOKENS": "8192", "REASONING_PARSER": "qwen3",
              "TOOL_CALL_PARSER": "hermes"}  # fmt: skip


def words(model: Model, turned: dict[str, str] | None = None) -> list[str]:
    """The words of the model's `vllm serve`, with some knobs turned as the shell would."""
    settings = resolve.load(model, shell={"ENV_FILE": "", **(turned or {})})
    return template.words(template.render(model.serve, hf_cache=node.HF_CACHE, **settings.public()))


def turns(model: Model) -> Iterator[dict[str, str]]:
    """Each knob that may be empty or is a gate, turned the other way, one at a time."""
    settings = resolve.load(model, shell={"ENV_FILE": ""})
    for name in sorted(model.knobs):
        gate, may_be_empty = name.startswith("ENABLE_"), names.form(name).takes.endswith("or nothing")
        if settings[name] and may_be_empty:
            yield {name: ""}
        elif gate or (may_be_empty and name in _TURNED_ON):
            yield {name: "1" if gate else _TURNED_ON[name]}


def refused(host: Host, image: str, lines: list[list[str]]) -> list[str]:
    """What the vLLM in the image refuses of these lines, in its own words; the host's engine runs it."""
    asked = ("docker", "run", "--rm", "-i", "--entrypoint", "python3", image, "-c", _PARSER.read_text())
    done = host.run(*asked, input=json.dumps(lines), stdin=None, timeout=300)
    if done.returncode:
        raise RehearsalError(f"vLLM's parser could not be asked: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
