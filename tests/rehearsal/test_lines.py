"""Every model's `vllm serve` line is one that a real vLLM takes, whole and with each gate turned."""

import pytest

from cluster.models import find_model, known_models
from rehearsal import lines
from rehearsal.flow import IMAGE

pytestmark = pytest.mark.rehearsal


def test_every_line_is_accepted(rig):
    """All models, each gate dropped and each one enabled, through the parser of the stand-in image's own vLLM."""
    asked = [lines.words(model, turn) for model in known_models().values() for turn in ({}, *lines.turns(model))]
    assert len(asked) > 3 * len(known_models())
    assert lines.refused(rig.hosts[0], IMAGE, asked) == []


def test_a_wrong_line_is_not(rig):
    """The same question finds an unknown option and an unknown choice."""
    good = lines.words(find_model("nemotron"))
    wrong = [[*good, "--swap-space", "0"], [*good, "--moe-backend", "nothing"]]
    assert len(lines.refused(rig.hosts[0], IMAGE, [good, *wrong])) == 2
