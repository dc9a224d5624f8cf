"""Every model's `vllm serve` line is one that a real vLLM takes, whole and with each gate turned."""

import pytest

from rehearsal import lines
from rehearsal.flow import IMAGE
from settings import models

pytestmark = pytest.mark.rehearsal


def test_every_line_is_accepted(rig):
    """All models, each gate dropped and each one enabled, through the parser of the stand-in image's own vLLM."""
    asked = [lines.words(model, turn) for model in models.known().values() for turn in ({}, *lines.turns(model))]
    assert len(asked) > 3 * len(models.known())
    assert lines.refused(rig.hosts[0], IMAGE, asked) == []


def test_a_wrong_line_is_not(rig):
    """The same question finds an unknown option and an unknown choice."""
    good = lines.words(models.find("nemotron"))
    wrong = [[*good, "--swap-space", "0"], [*good, "--moe-backend", "nothing"]]
    assert len(lines.refused(rig.hosts[0], IMAGE, [good, *wrong])) == 2
