"""House rules that a reader relies on: who starts processes, what a template may hold, what a start costs."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = sorted(file for file in ROOT.glob("*/*.j2") if file.parent.name != "tests")
ROOMS = ("checks", "cluster", "command", "fleet", "settings", "vitals")
# Not the scripts in cluster/inside, which run in a container: they read no setting and start no command of this project.
MODULES = [file for room in ROOMS for file in (ROOT / room).glob("*.py")]
STARTS = r"\b(subprocess|Popen|os\.(exec\w+|spawn\w+|system|popen|fork)|pty|c\.run|c\.sudo|asyncio)\b"


def test_a_dry_run_imports_neither_docker_nor_rich(real_run):
    """A dry run answers at once: what asks an Engine or draws a table is imported where it is used."""
    imported = {line.rpartition("|")[2].strip() for line in real_run.stderr.splitlines() if "import time:" in line}
    assert {"cluster.server", "jinja2"} <= imported
    assert {"docker", "rich", "requests"}.isdisjoint(imported)


def test_one_module_starts_processes():
    """Whatever this tool does to a machine goes through cluster/command.py, which shows it first."""
    assert _files_with(STARTS, [*MODULES, ROOT / "tasks.py"]) == {"cluster/command.py"}


def test_settings_are_read_in_one_place():
    """Only cluster/settings.py reads the environment for a setting. cluster/engine.py asks for the Engine's address."""
    assert _files_with(r"os\.environ|getenv", MODULES) == {
        "cluster/settings.py",
        "cluster/command.py",
        "cluster/engine.py",
    }


def _files_with(pattern: str, files: list[Path]) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in files if re.search(pattern, file.read_text())}


def _plain(file: Path) -> str:
    """A template without its comments and expressions: the words that are written as they stand."""
    return re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", file.read_text(), flags=re.S)


def test_templates_hold_words_and_no_shell():
    """No backslash, quote, variable or operator of a shell in a template: quoting is done in one place, for all."""
    found = {file.name: re.findall(r"[\\'\"`$|&;<>*?()~!#\[\]{}]", _plain(file)) for file in TEMPLATES}
    assert {name: chars for name, chars in found.items() if chars} == {}


def test_templates_have_one_flag_a_line():
    """One flag per line, with its value, but for short commands that are a line: a diff is a diff of flags."""
    lines = [line for file in TEMPLATES for line in _plain(file).splitlines()]
    several = [line for line in lines if len(re.findall(r"(?:^|\s)--?[a-z]", line)) > 1]
    whole = ("nvidia-smi", "docker image inspect", "docker run --rm --entrypoint")
    assert [line for line in several if not line.startswith(whole)] == []


def test_no_template_knows_a_secret_or_the_role():
    """Secrets go by name, and the wrapper is the same words for head and worker."""
    assert _files_with(r"\b(HF_TOKEN|VLLM_API_KEY|role)\b", TEMPLATES) == set()


def test_there_is_one_docker_run_of_a_node():
    """The wrapper stands once in the repository."""
    assert [file.name for file in TEMPLATES if "--device=/dev/infiniband" in file.read_text()] == ["ray_container.j2"]


# --- Findings of other programs, which are too slow for the fast tests -----------------------------------------------


@pytest.mark.rehearsal
@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(words: Sequence[str]):
    """The code has no finding of lint and no line that the formatter would change."""
    checked = _said(sys.executable, "-m", "ruff", *words, "--quiet", "--no-cache", ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.rehearsal
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck: apt-get install -y shellcheck")
def test_shellcheck_finds_nothing():
    """Every shell script that has a first line of its own is checked."""
    scripts = [file for file in (ROOT / "inv", ROOT / ".ci/run", *ROOT.glob("*/*/*")) if _is_shell(file)]
    checked = _said("shellcheck", *scripts)
    assert checked.returncode == 0, checked.stdout


def _is_shell(file: Path) -> bool:
    return file.is_file() and bool(re.match(rb"#!.*\b(sh|bash)\n", file.read_bytes()[:100]))


def _said(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
