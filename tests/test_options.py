"""Flags that an image knows: what it lacks is named with the knob that drops it, or dropped by IMAGE_GATES=auto."""

import json
from pathlib import Path

import pytest

from checks import gates, line, options
from checks.gates import Serving
from checks.options import Known
from cluster import node
from settings import models, resolve

DATA = Path(__file__).with_name("data")
FALLBACK = {
    "ENABLE_REASONING_PARSER": "0",
    "ENABLE_ASYNC_SCHEDULING": "0",
    "MOE_BACKEND": "",
    "CUDAGRAPH_CAPTURE_SIZE": "",
}


def known(version):
    """The options of one vLLM that our profiles can render, as `checks/ask_options.py` printed them."""
    return options.known(json.loads((DATA / f"options-{version}.json").read_text()))


@pytest.fixture
def serving(operator):
    """Makes a model's line for an image, with settings as in the shell."""

    def make(name, image, env=None, **shell):
        with pytest.MonkeyPatch.context() as now:
            for setting, value in shell.items():
                now.setenv(setting, value)
            settings = resolve.load(models.find(name))
        values = settings.public() | {"hf_cache": node.HF_CACHE}
        image = known(image) if isinstance(image, str) else image
        return Serving(settings.model, values, image, env or {}, f"inv launch --model {name}")

    return make


def test_the_fallback_to_25_11_comes_out_by_itself(serving):
    """vLLM 0.11.0: auto drops what the article drops by hand, nothing else, and the line is then that image's."""
    auto = gates.gates(serving("nemotron", "0.11.0"))
    by_hand = serving("nemotron", "0.11.0", **FALLBACK)
    assert auto.overrides == dict.fromkeys(FALLBACK, "") and not auto.findings
    assert serving("nemotron", "0.11.0").words(**auto.overrides) == by_hand.words()
    assert by_hand.problems() == []
    assert sorted(said.partition("auto sets ")[2] for said in auto.said) == sorted(
        f"{name}={value}" for name, value in FALLBACK.items()
    )


def test_by_default_each_is_refused_with_its_knob(serving):
    """Without auto nothing is dropped: every problem has a sentence and the knob to type."""
    texts = [finding.text for finding in gates.refusals(serving("nemotron", "0.11.0"))]
    assert len(texts) == 5 and all("vLLM 0.11.0" in text and "IMAGE_GATES=auto" in text for text in texts)
    assert {knob for knob in FALLBACK if any(f"Type: {gates.spelled(knob)} inv" in text for text in texts)} == set(
        FALLBACK
    )


@pytest.mark.parametrize("version", ["0.21.0", "0.32.0"])
@pytest.mark.parametrize("name", models.known())
def test_newer_images_take_every_line(serving, version, name):
    """The image that is built by default, and a newer one, know all that the profiles ask for."""
    assert gates.refusals(serving(name, version)) == []
    assert gates.gates(serving(name, version)) == gates.Gates({}, [], [])


@pytest.mark.parametrize("name", ["qwen-30b", "qwen-122b"])
def test_qwen_goes_back_to_25_11_unchanged(serving, name):
    """The article served Qwen from it."""
    assert gates.refusals(serving(name, "0.11.0")) == []


def test_a_choice_that_the_image_lacks(serving):
    """float16 for the state is none of 0.11.0's choices: the value is named, and MAMBA_SSM_DTYPE= drops it."""
    image = Known("0.11.0", dict.fromkeys(known("0.21.0").options) | {"--mamba-ssm-cache-dtype": ["auto", "float32"]})
    asked = serving("nemotron", image, ENABLE_ASYNC_SCHEDULING="0", MAMBA_SSM_DTYPE="float16")
    (finding,) = gates.refusals(asked)
    assert "float16 is none of its choices, auto, float32" in finding.text and "MAMBA_SSM_DTYPE= inv" in finding.text
    assert gates.gates(asked).overrides == {"MAMBA_SSM_DTYPE": ""}


def test_the_operators_own_words_are_not_dropped(serving):
    """SERVE_EXTRA is taken out by its owner: auto leaves it and refuses."""
    for found in (gates.refusals, lambda asked: gates.gates(asked).findings):
        (finding,) = found(serving("nemotron", "0.21.0", SERVE_EXTRA="--swap-space 0"))
        assert "--swap-space" in finding.text and "Take it out of SERVE_EXTRA" in finding.text


def test_an_option_without_a_knob(serving):
    """What every line has cannot be dropped; another image is what is left."""
    image = Known("0.21.0", {name: None for name in known("0.21.0").options if name != "--gpu-memory-utilization"})
    (finding,) = gates.gates(serving("nemotron", image)).findings
    assert "no knob" in finding.text and "VLLM_IMAGE" in finding.text


@pytest.mark.parametrize(
    ("version", "env", "refused"),
    [
        ("0.17.1", {}, True),
        ("0.19.0", {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}, True),
        ("0.20.1", {}, True),
        ("0.20.1", {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}, False),
        ("0.21.0+2325b6f0.nvinternal.26.5.post1", {}, False),
        ("0.21.0", {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0"}, True),
        ("0.32.0", {}, False),
    ],
)
def test_async_scheduling_needs_rays_newer_executor(serving, version, env, refused):
    """Default from 0.21, asked for by a variable on 0.20, absent before."""
    image = Known(version, dict.fromkeys(known("0.21.0").options))
    found = gates.gates(serving("nemotron", image, env))
    assert found.overrides == ({"ENABLE_ASYNC_SCHEDULING": ""} if refused else {}) and not found.findings


@pytest.mark.parametrize(("version", "refused"), [("0.17.0", True), ("0.17.1", False), ("0.21.0", False)])
def test_a_parser_that_is_not_built_in_yet(serving, version, refused):
    """nemotron_v3 came with 0.17.1: before, the server would die a minute after its start."""
    image = Known(version, dict.fromkeys(known("0.21.0").options))
    found = gates.gates(serving("nemotron", image, ENABLE_ASYNC_SCHEDULING="0", REASONING_PARSER="nemotron_v3"))
    assert found.overrides == ({"ENABLE_REASONING_PARSER": ""} if refused else {})


@pytest.mark.parametrize(("version", "refused"), [("0.18.0", True), ("0.19.0", False)])
def test_a_drafter_with_a_backend_of_its_own(serving, version, refused):
    """The field moe_backend of the speculative configuration came with 0.19.0."""
    image = Known(version, dict.fromkeys(known("0.21.0").options))
    found = gates.gates(serving("nemotron", image, ENABLE_ASYNC_SCHEDULING="0", ENABLE_MTP="1"))
    assert found.overrides == ({"ENABLE_MTP": ""} if refused else {})


@pytest.mark.parametrize(
    "answer",
    [None, [], {}, {"vllm": "0.21.0"}, {"vllm": "0.21.0", "options": {}}, {"vllm": 1, "options": {"--a": None}}]
    + [{"vllm": text, "options": {"--a": None}} for text in ("", "dev", "latest", "1")]
    + [{"vllm": "0.21.0", "options": {"--a": choices}} for choices in ("auto", [1], {}, 0)],
    ids=repr,
)
def test_an_answer_that_is_none(answer):
    """An image that could not say what it knows is an error, not an image that knows everything."""
    with pytest.raises(ValueError, match=r"image's answer|version"):
        options.known(answer)


def test_words_are_options_and_values():
    """Dashes, underscores, equals signs, dots, negative numbers and JSON."""
    words = ["vllm", "serve", "a/b", "--max_num_seqs=4", "--a_b.c_d", "x", "-tp", "2", "--n", "-1", "--j", '{"a": 1}']
    assert [(option.name, *option.values) for option in line.read(words)] == [
        ("--max-num-seqs", "4"),
        ("--a-b.c_d", "x"),
        ("-tp", "2"),
        ("--n", "-1"),
        ("--j", '{"a": 1}'),
    ]
