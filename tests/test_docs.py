"""Documents stay true: their tables, names, defaults, messages and examples are compared with the code."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from invoke.parser import Parser

import tasks
from cluster.health import State
from cluster.models import known_models
from cluster.settings import CORE

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]


# --- Tables ----------------------------------------------------------------------------------------------------------


def _table(mark: str) -> set[str]:
    """Return the names in backticks in the first column of the README's tables between two marks."""
    text = re.search(f"<!-- {mark} -->(.*?)<!-- /{mark} -->", README, re.S)[1]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("|")]
    return {name for row in rows for name in re.findall("`([^`]+)`", row)}


def test_the_readme_lists_every_task():
    """The tables of tasks are `inv --list`. The tasks that launch one model share a row."""
    launchers = {f"launch-{name}" for name in known_models()}
    assert _table("tasks") == set(tasks.ns.task_names) - launchers | {"launch-NAME"}


def test_the_readme_lists_every_model():
    """The table of models has each model that a person with two Sparks launches, and each has its own launch task."""
    assert _table("models") == {model.name for model in tasks.LISTED}
    launchers = {name for name in tasks.ns.task_names if name.startswith("launch-")}
    assert launchers == {f"launch-{name}" for name in _table("models")}


def test_the_readme_lists_every_knob():
    """The table of knobs has each name that a profile sets or a model's template uses, and no other."""
    knobs = frozenset().union(*(model.knobs for model in known_models().values())) - CORE.keys()
    assert _table("knobs") - CORE.keys() == knobs


def test_the_readme_fits():
    """The README is read to its end: at most 170 lines, and at most 96 for the one who changes the code."""
    assert len(README.splitlines()) <= 170
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 96


def test_operating_lists_every_state():
    """docs/operating.md has each state of `inv health` with its exit status. Programs rely on both."""
    text = re.search("<!-- states -->(.*?)<!-- /states -->", (ROOT / "docs/operating.md").read_text(), re.S)[1]
    listed = dict(re.findall(r"^\| `([^`]+)` \| (\d+) \|", text, re.M))
    assert listed == {str(state): str(state.code) for state in State}


# --- .env.example ----------------------------------------------------------------------------------------------------


def _documented() -> dict[str, str]:
    return dict(re.findall(r"^# ([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE, re.M))


def test_env_example_documents_every_setting_and_no_other():
    """Each setting of a site stands in .env.example, commented out: a plain copy changes nothing."""
    assert set(_documented()) == set(CORE)
    assert re.findall("^[^#\n].*", EXAMPLE, re.M) == []


def test_env_example_shows_the_defaults():
    """The value behind the # is the default, where there is one."""
    defaults = {name: default for name, (default, _) in CORE.items() if default}
    assert {name: _documented()[name] for name in defaults} == defaults


def test_env_example_shows_values_that_would_be_taken():
    """Each line of .env.example is valid when it is uncommented."""
    for name, (_, form) in CORE.items():
        assert form.read(_documented()[name]) is not None


def test_env_example_says_what_each_setting_means():
    """A sentence stands above each setting, or above a few that belong together."""
    above, silent = "", set()
    for line in EXAMPLE.splitlines():
        if setting := re.match("# ([A-Z][A-Z0-9_]*)=", line):
            silent |= set() if re.fullmatch("# [^-].*[.:]", above) else {setting[1]}
        else:
            above = line
    assert silent == set()


# --- Examples, links, messages ---------------------------------------------------------------------------------------


def _examples() -> list[str]:
    """Return each `inv …` that a document shows in a block of shell or in backticks."""
    text = "\n".join(file.read_text() for file in DOCS)
    blocks = "\n".join(re.findall("^```sh\n(.*?)^```", text, re.M | re.S)).splitlines()
    quoted = re.findall("`([^`\n]+)`", re.sub("^```.*?^```", "", text, flags=re.M | re.S))
    found = {line.split("#")[0].strip() for line in [*blocks, *quoted]}
    return sorted(line for line in found if re.match(r"([A-Z_]+=\S* )*(\./)?inv( |$)", line))


def test_there_are_examples():
    """The pattern that finds examples has not stopped finding them."""
    assert len(_examples()) >= 30


@pytest.mark.parametrize("example", _examples())
def test_every_example_can_be_typed(example):
    """Settings, task and flags of each `inv …` exist. In an example … stands for any words."""
    before, words = re.fullmatch(r"((?:[A-Z_]+=\S* )*)(?:\./)?inv ?(.*)", example).groups()
    known = set(CORE).union(*(model.knobs | model.keys for model in known_models().values()))
    assert {setting.partition("=")[0] for setting in before.split()} <= known
    words = [word for word in shlex.split(words) if word not in ("--dry", "--list", "--help", "TASK", "…", "...")]
    if len(words) > 1:
        Parser(contexts=tasks.ns.to_contexts()).parse_argv(words)
    assert set(words[:1]) <= set(tasks.ns.task_names)


def test_every_file_that_a_document_links_to_is_there():
    """No link in the documents leads nowhere."""
    for file in DOCS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


def _messages() -> list[str]:
    """Return the parts of the messages in two documents that hold no value of one site."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| ")]
    # What each command of this project prints when all is right.
    text = (ROOT / "docs/first-token.md").read_text().partition("\n## 5. ")[2]
    rows += [row.partition("**Otherwise")[0] for row in text.splitlines() if row.startswith("**Right")]
    quoted = [part for row in rows for part in re.findall("`([^`]+)`", row)]
    parts = [
        part.strip(" ,")
        for each in quoted
        for part in re.split(r"…|node-ray|nemotron|spark-2:?|10.0.0.1:6379|this node|http\S*|local/\S+|f1|2", each)
    ]
    return [part for part in parts if part.count(" ") >= 2]


def test_the_messages_of_the_troubleshooting_are_printed_by_the_code():
    """A reader who searches the page for a message finds it."""
    code = "\n".join(file.read_text() for file in ROOT.glob("cluster/**/*.*") if file.suffix in (".py", ".sh"))
    code = re.sub(r"{[^{}]*}", "", re.sub(r"""["']\n *f?["']""", "", code)) + code
    assert len(_messages()) >= 6
    assert [part for part in _messages() if part not in code] == []


# --- The article -----------------------------------------------------------------------------------------------------

FROM_THE_ARTICLE = (ROOT / "docs/from-the-article.md").read_text()
SCRIPTS = (
    *("cluster/Dockerfile", "cluster/build-image.sh", "cluster/lib.sh", "cluster/head/run_headnode_2.sh"),
    *("cluster/worker/run_workernode_2.sh", "run_cluster.sh", "ray_inference_health.sh", "nemotron/cluster-env.sh"),
    *("nemotron/launch-nemotron-120b.sh", "qwen/launch-qwen-30b.sh", "qwen/launch-qwen-122b.sh"),
    *("nemotron/.env", "qwen/.env", "docker rm -f", "vllm bench serve", "watchdog"),
)


def _ours() -> list[str]:
    """Return what stands in backticks in the second column of the tables: what is here in the article's place."""
    rows = [row.split(" | ") for row in FROM_THE_ARTICLE.splitlines() if row.startswith("| ")]
    return [quoted for row in rows for quoted in re.findall("`([^`]+)`", row[1])]


def test_every_script_of_the_article_has_its_successor():
    """Each script and each habit of the article stands in the first column."""
    rows = [row.split(" | ")[0] for row in FROM_THE_ARTICLE.splitlines() if row.startswith("| ")]
    assert [script for script in SCRIPTS if not any(script in row for row in rows)] == []


def test_the_defaults_beside_the_articles_are_the_codes():
    """Each NAME=value and each flag in the second column is a default, a profile's value, or a word of a command."""
    lines = "\n".join(file.read_text() for file in (ROOT / "tests/golden").glob("*.txt"))
    profile = [file.read_text() for file in (ROOT / "nemotron/120b.env", ROOT / "nemotron/cluster.env")]
    known = {*lines.split(), *"\n".join(profile).split(), *(f"{name}={value[0]}" for name, value in CORE.items())}
    claims = [one for one in _ours() if re.match("[A-Z_]+=|--", one)]
    assert len(claims) >= 15
    assert [one for one in claims if not set(one.split()) <= known] == []


def test_the_settings_and_files_beside_the_articles_are_there():
    """Each setting and each file that the page names exists."""
    names = set(re.findall("`([A-Z][A-Z_]{3,})[`=]", FROM_THE_ARTICLE))
    known = set(CORE).union(*(model.knobs | model.keys for model in known_models().values()))
    words = {"MAX_JOBS", "VLLM_NO_USAGE_STATS"}
    assert names - known == words and "OBJECT_STORE_MEMORY" in names
    files = [one for one in _ours() if re.fullmatch(r"\w+/[\w./]+", one)]
    assert len(files) >= 3 and all((ROOT / file).exists() for file in files)


def test_no_path_of_a_machine_is_in_the_repository():
    """No file names the folder of this checkout or anybody's home."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("git cannot list the files of this checkout")
    places = re.compile(re.escape(f"{ROOT}/").encode() + rb"|/(?:home/(?!operator|another)|Users/)\w")
    files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert [str(file) for file in files if places.search(file.read_bytes())] == []
