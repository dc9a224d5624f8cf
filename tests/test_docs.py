"""The documents cannot lie: tables, names, defaults and examples are held against the code."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from invoke.parser import Parser

import tasks
from settings import models
from settings.names import CORE
from vitals.states import State

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]


def _table(mark: str) -> set[str]:
    """What stands in backticks in the first column of the README's table between these marks."""
    text = re.search(f"<!-- {mark} -->(.*?)<!-- /{mark} -->", README, re.S)[1]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("|")]
    return {name for row in rows for name in re.findall("`([^`]+)`", row)}


def test_the_table_of_tasks_is_the_tasks():
    """The README lists each task that `inv --list` lists; the tasks of the models share a row."""
    launchers = {f"launch-{name}" for name in models.known()}
    assert _table("tasks") - launchers == set(tasks.ns.task_names) - launchers | {"launch-NAME"}


def test_the_table_of_models_is_the_models():
    """The README lists each model by the name that `--model` takes."""
    assert _table("models") == set(models.known())


def test_the_table_of_knobs_is_the_knobs():
    """The README lists each name that a profile sets or a model's templates use, and no other."""
    knobs = frozenset().union(*(model.knobs for model in models.known().values())) - CORE.keys()
    assert _table("knobs") - CORE.keys() == knobs


def _documented() -> dict[str, str]:
    return dict(re.findall(r"^# ([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE, re.M))


def test_env_example_documents_every_setting_and_no_other():
    """Each core setting stands in .env.example, commented out: a copy of it changes nothing."""
    assert set(_documented()) == set(CORE)
    assert re.findall("^[^#\n].*", EXAMPLE, re.M) == []


def test_env_example_shows_the_defaults():
    """What stands behind the # is the default where there is one."""
    defaults = {name: default for name, (default, _) in CORE.items() if default}
    assert {name: _documented()[name] for name in defaults} == defaults


def test_env_example_shows_values_that_would_be_taken():
    """Uncommented, each line of .env.example is a value of the right form."""
    for name, (_, form) in CORE.items():
        assert form.read(_documented()[name]) is not None


def test_env_example_says_what_each_setting_means():
    """Above each setting, or the few that go together, stands a sentence."""
    above, silent = "", set()
    for line in EXAMPLE.splitlines():
        if setting := re.match("# ([A-Z][A-Z0-9_]*)=", line):
            silent |= set() if re.fullmatch("# [^-].*[.:]", above) else {setting[1]}
        else:
            above = line
    assert silent == set()


def _examples() -> list[str]:
    """Each `inv …` in a code block or between backticks of a document, without what stands for something else."""
    text = "\n".join(file.read_text() for file in DOCS)
    blocks = "\n".join(re.findall("^```sh\n(.*?)^```", text, re.M | re.S)).splitlines()
    quoted = re.findall("`([^`\n]+)`", re.sub("^```.*?^```", "", text, flags=re.M | re.S))
    found = {line.split("#")[0].strip() for line in [*blocks, *quoted]}
    return sorted(line for line in found if re.match(r"([A-Z_]+=\S* )*(\./)?inv( |$)", line))


def test_there_are_examples():
    """The test below has something to hold."""
    assert len(_examples()) >= 8


@pytest.mark.parametrize("example", _examples())
def test_every_example_can_be_typed(example):
    """Settings, task and flags of each `inv …` in the documents exist; … stands for whatever follows."""
    before, words = re.fullmatch(r"((?:[A-Z_]+=\S* )*)(?:\./)?inv ?(.*)", example).groups()
    known = set(CORE).union(*(model.names for model in models.known().values()))
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


def test_no_path_of_a_machine_is_in_the_repository():
    """Nothing here knows where it was written: neither this checkout's folder nor anybody's home."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("git cannot list the files of this checkout")
    places = re.compile(re.escape(f"{ROOT}/").encode() + rb"|/(?:home/(?!operator|another)|Users/)\w")
    files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert [str(file) for file in files if places.search(file.read_bytes())] == []


def test_the_table_of_states_is_the_states():
    """docs/operating.md lists each state of `inv health` with its exit status: programs may rely on both."""
    text = re.search("<!-- states -->(.*?)<!-- /states -->", (ROOT / "docs/operating.md").read_text(), re.S)[1]
    told = dict(re.findall(r"^\| `([^`]+)` \| (\d+) \|", text, re.M))
    assert told == {str(state): str(state.code) for state in State}
