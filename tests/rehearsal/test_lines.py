"""Every model's `vllm serve` line is one that a real vLLM takes, whole and with each gate turned."""

from collections.abc import Iterator

import pytest
from invoke import Exit

from cluster.models import Model, find_model, known_models
from cluster.settings import load_settings
from rehearsal.flow import refused, serve_line

pytestmark = pytest.mark.rehearsal
# The values for knobs that are empty in their profile.
TURNED_ON = {"MAX_NUM_SEQS": "8", "MAX_NUM_BATCHED_TOKENS": "8192", "REASONING_PARSER": "qwen3",
             "TOOL_CALL_PARSER": "hermes"}  # fmt: skip


def turns(model: Model) -> Iterator[dict[str, str]]:
    """Each knob that may be empty or is a gate, turned the other way, one at a time."""
    settings = load_settings(model, shell={"ENV_FILE": ""})
    for name in sorted(model.knobs):
        off = "0" if name.startswith("ENABLE_") else ""
        if settings[name] not in ("", "0") and may_be(model, name, off):
            yield {name: off}
        elif name.startswith("ENABLE_") or name in TURNED_ON:
            yield {name: TURNED_ON.get(name, "1")}


def may_be(model: Model, name: str, value: str) -> bool:
    """Whether a setting takes a value."""
    try:
        load_settings(model, shell={"ENV_FILE": "", name: value})
    except Exit:
        return False
    return True


def test_every_line_is_accepted(rig):
    """All models, each gate dropped and each one enabled, pass the parser of the stand-in image's own vLLM."""
    asked = [serve_line(model, turn) for model in known_models().values() for turn in ({}, *turns(model))]
    assert len(asked) > 3 * len(known_models())
    assert refused(rig.hosts[0], asked) == []


def test_a_wrong_line_is_refused(rig):
    """The same question finds an unknown option and an unknown choice."""
    good = serve_line(find_model("nemotron"))
    wrong = [[*good, "--swap-space", "0"], [*good, "--moe-backend", "nothing"]]
    assert len(refused(rig.hosts[0], [good, *wrong])) == 2
