"""The options that an image lacks are named, each with the knob that drops it, or dropped by IMAGE_GATES=auto."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import options
from cluster.models import find_model, known_models
from cluster.options import Known
from cluster.server import serve_words
from cluster.settings import load_settings

DATA = Path(__file__).with_name("data")
FALLBACK = {
    "ENABLE_REASONING_PARSER": "0",
    "ENABLE_ASYNC_SCHEDULING": "0",
    "MOE_BACKEND": "",
    "CUDAGRAPH_CAPTURE_SIZE": "",
}


def known(version):
    """The options of one vLLM that our profiles can render, as cluster/inside/options.py printed them."""
    return Known(**json.loads((DATA / f"options-{version}.json").read_text()))


class Asked:
    """What an image makes of a model's line: the settings to go on with, the sentences, the findings, the line."""

    def __init__(self, name, image, env=None, **shell):
        head = SimpleNamespace(attrs={"Config": {"Env": [f"{name}={value}" for name, value in (env or {}).items()]}})
        before = load_settings(find_model(name), shell={"ENV_FILE": ""} | shell)
        self.settings, self.said, self.findings = options.gated(
            before, head, known(image) if isinstance(image, str) else image
        )
        self.emptied = {knob for knob in before if before[knob] != self.settings[knob]}
        self.words = serve_words(self.settings)


def auto(name, image, env=None, **shell):
    return Asked(name, image, env, IMAGE_GATES="auto", **shell)


def test_the_fallback_to_25_11_comes_out_by_itself():
    """On vLLM 0.11.0 auto drops exactly the options that the article drops by hand."""
    asked, by_hand = auto("nemotron", "0.11.0"), Asked("nemotron", "0.11.0", **FALLBACK)
    assert asked.emptied == FALLBACK.keys() and not asked.findings and not by_hand.findings
    assert asked.words == by_hand.words
    assert sorted(said.partition("auto sets ")[2] for said in asked.said) == sorted(
        f"{name}={value}" for name, value in FALLBACK.items()
    )


def test_by_default_each_is_refused_with_its_knob():
    """Without auto nothing is dropped. The message has a sentence for each option, and the knob to type."""
    asked = Asked("nemotron", "0.11.0")
    texts = [finding.text for finding in asked.findings]
    assert asked.emptied == set() and len(texts) == 5
    assert all("vLLM 0.11.0" in text and "IMAGE_GATES=auto inv launch --model nemotron" in text for text in texts)
    typed = {f"{name}={value}" for name, value in FALLBACK.items()}
    assert {text.partition("Type: ENV_FILE= ")[2].partition(" inv")[0] for text in texts} == typed


@pytest.mark.parametrize("version", ["0.21.0", "0.32.0"])
@pytest.mark.parametrize("name", known_models())
def test_newer_images_take_every_line(version, name):
    """The image that is built by default, and a newer one, know every option of the profiles."""
    asked = auto(name, version)
    assert (asked.emptied, asked.said, asked.findings) == (set(), [], [])


def test_qwen_goes_back_to_25_11_unchanged():
    """The article served Qwen from that image."""
    assert [Asked(name, "0.11.0").findings for name in ("qwen-30b", "qwen-122b")] == [[], []]


def test_a_choice_that_the_image_lacks():
    """float16 for the state is none of 0.11.0's choices: the value is named, and MAMBA_SSM_DTYPE= drops it."""
    image = Known("0.11.0", dict.fromkeys(known("0.21.0").options) | {"--mamba-ssm-cache-dtype": ["auto", "float32"]})
    shell = {"ENABLE_ASYNC_SCHEDULING": "0", "MAMBA_SSM_DTYPE": "float16"}
    (finding,) = Asked("nemotron", image, **shell).findings
    assert "float16 is none of its choices, auto, float32" in finding.text and "MAMBA_SSM_DTYPE= inv" in finding.text
    assert auto("nemotron", image, **shell).emptied == {"MAMBA_SSM_DTYPE"}


def test_the_operators_own_words_are_not_dropped():
    """Auto leaves SERVE_EXTRA alone: its owner is told to take the word out."""
    for ask in (Asked, auto):
        (finding,) = ask("nemotron", "0.21.0", SERVE_EXTRA="--swap-space 0").findings
        assert "--swap-space" in finding.text and "Take it out of SERVE_EXTRA" in finding.text


def test_an_option_without_a_knob():
    """An option that every line has cannot be dropped. What is left is another image."""
    image = Known("0.21.0", {name: None for name in known("0.21.0").options if name != "--gpu-memory-utilization"})
    (finding,) = auto("nemotron", image).findings
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
def test_async_scheduling_needs_rays_newer_executor(version, env, refused):
    """The newer executor is the default from 0.21 on, runs in 0.20 if a variable asks for it, and is absent before."""
    found = auto("nemotron", Known(version, dict.fromkeys(known("0.21.0").options)), env)
    assert found.emptied == ({"ENABLE_ASYNC_SCHEDULING"} if refused else set()) and not found.findings


@pytest.mark.parametrize(
    ("version", "shell", "emptied"),
    [
        ("0.17.0", {"REASONING_PARSER": "nemotron_v3"}, {"ENABLE_REASONING_PARSER"}),
        ("0.17.1", {"REASONING_PARSER": "nemotron_v3"}, set()),
        ("0.18.0", {"ENABLE_MTP": "1"}, {"ENABLE_MTP"}),
        ("0.19.0", {"ENABLE_MTP": "1"}, set()),
    ],
)
def test_an_option_that_only_the_start_refuses(version, shell, emptied):
    """The parser nemotron_v3 came with 0.17.1, the drafter's moe_backend with 0.19.0."""
    image = Known(version, dict.fromkeys(known("0.21.0").options))
    assert auto("nemotron", image, ENABLE_ASYNC_SCHEDULING="0", **shell).emptied == emptied


# --- Asking the image -------------------------------------------------------------------------------------------------


@pytest.fixture
def head(operator, tmp_path):
    """A head's container that answers as it is told, and the settings of a run on it."""
    asked = SimpleNamespace(name="node-ray", image=SimpleNamespace(id="sha256:" + "a" * 64), answers={}, words=[])
    asked.attrs = {"Config": {"Env": ["NODE_RAY_REPOSITORY=0123"]}}

    def answer(_, *words):
        asked.words.append(words)
        for word, text in asked.answers.items():
            if word in words:
                return text
        raise Exit(f"{words[0]} failed")

    operator.setattr(options, "ask_container", answer)
    (tmp_path / "node-ray").mkdir()
    asked.settings = load_settings(find_model("nemotron"), shell={"ENV_FILE": "", "CACHE_DIR": str(tmp_path)})
    return asked


def test_an_image_is_asked_once(head):
    """The image's own file is asked first, then vLLM. The answer is kept on this host."""
    head.answers = {"/opt/inside/options.py": 'noise\n{"vllm": "0.21.0", "options": {"--a": ["b"], "--c": null}}\n'}
    wanted = Known("0.21.0", {"--a": ["b"], "--c": None})
    assert options.known_options(head, head.settings) == options.known_options(head, head.settings) == wanted
    assert [words[-1] for words in head.words] == [options.BUILT_IN, "/opt/inside/options.py"]


@pytest.mark.parametrize("answer", ["", "Killed", "null", "[]", '{"vllm": "0.21.0"}', '{"vllm": "dev", "options": {}}'])
def test_an_answer_that_is_none_is_an_error(head, answer):
    """An image that could not tell its options is no image that knows them all, and is asked again."""
    head.answers = {"/opt/inside/options.py": answer}
    for _ in range(2):
        with pytest.raises(Exit, match=r"options\.py in node-ray gave an unreadable answer"):
            options.known_options(head, head.settings)


def test_a_cluster_of_an_earlier_version_is_called_one(head):
    """Its containers lack our scripts: a sentence says so, with the words to type, instead of a missing file."""
    head.attrs = {"Config": {"Env": []}}
    with pytest.raises(Exit, match=r"earlier version of this repository .*inv down"):
        options.known_options(head, head.settings)


def test_words_are_options_and_values():
    """Dashes, underscores, equals signs, dots, negative numbers and JSON are read as vLLM reads them."""
    words = ["vllm", "serve", "a/b", "--max_num_seqs=4", "--a_b.c_d", "x", "-tp", "2", "--n", "-1", "--j", '{"a": 1}']
    assert options.given_options(words) == [
        ("--max-num-seqs", ["4"]),
        ("--a-b.c_d", ["x"]),
        ("-tp", ["2"]),
        ("--n", ["-1"]),
        ("--j", ['{"a": 1}']),
    ]
