"""House rules that a reader relies on: the layout, the direction of imports, the one place for each job, the size."""

import ast
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

import cluster

ROOT = Path(__file__).resolve().parent.parent
INDEX = [name for line in re.findall(r"^    (\w.*?)  ", cluster.__doc__ or "", re.M) for name in line.split()]
MODULES = sorted(ROOT.glob("cluster/[!_]*.py"))
INSIDE = sorted((ROOT / "cluster/inside").glob("*.py"))
TEMPLATES = sorted(file for file in ROOT.glob("*/*.j2") if file.parent.name != "tests")
PYTHON = [ROOT / "tasks.py", *ROOT.glob("cluster/**/*.py"), *ROOT.glob("rehearsal/**/*.py")]
LAYOUT = {"tasks.py", "cluster", "templates", "rehearsal", "tests", "docs", ".env.example", "inv"}
USUAL = {
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "requirements.lock"),
    *(".gitignore", ".ci"),
}
# One sitting reads these.
FLOW = {"settings", "models", "command", "node", "guards", "links", "engine", "cleanup", "image", "server"}
# The image has vLLM and Ray, and with vLLM torch and psutil.
IN_THE_IMAGE = {"ray", "vllm", "torch", "psutil", "huggingface_hub"}


# --- The layout ------------------------------------------------------------------------------------------------------


def test_the_top_level_is_the_layout():
    """Nothing else stands at the top, but for the folders of models: adding a model adds no rule."""
    listed = _output("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("git cannot list the files of this checkout")
    files = [Path(name) for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    models = {file.parent.name for file in ROOT.glob("*/serve.j2")}
    assert {file.parts[0] for file in files} - models == LAYOUT - models | USUAL


def test_the_index_lists_every_module():
    """cluster/__init__.py names each module once. cluster/ is flat, but for the scripts of the containers."""
    assert sorted(INDEX) == [file.stem for file in MODULES]
    assert [file.name for file in ROOT.glob("cluster/[!_]*") if file.is_dir()] == ["inside"]
    assert len((cluster.__doc__ or "").splitlines()) <= 30


def test_the_map_of_contributing_is_the_index():
    """CONTRIBUTING.md says what each module holds, in the index's order, and what each script does."""
    text = re.search("<!-- map -->(.*)<!-- /map -->", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[1]
    assert re.findall(r"^\| `(\w+)`", text, re.M) == INDEX
    scripts = {f"inside/{file.name}" for file in ROOT.glob("cluster/inside/*.*")}
    assert set(re.findall(r"^\| `(inside/[\w.]+)`", text, re.M)) == scripts
    assert re.findall(r"^\| `(\w+)` ·", text, re.M) == [name for name in INDEX if name in FLOW]


# --- Imports and names -----------------------------------------------------------------------------------------------


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names that are imported, also in functions and for types alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported(file: Path) -> list[str]:
    return list(_imports(ast.parse(file.read_text())))


def _packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imported(file)}


@pytest.mark.parametrize("module", INDEX)
def test_a_module_imports_only_modules_above_it(module: str):
    """Imports follow the index, so there is no circle, and a reader of the index needs nothing from below."""
    names = _imported(ROOT / f"cluster/{module}.py")
    ours = {name.split(".")[1] for name in names if name.startswith("cluster.")}
    assert ours - {"inside"} <= set(INDEX[: INDEX.index(module)])
    assert {"tasks", "rehearsal", "tests"}.isdisjoint(_packages(ROOT / f"cluster/{module}.py"))


@pytest.mark.parametrize("script", INSIDE, ids=lambda file: file.name)
def test_a_script_of_the_containers_imports_nothing_of_the_host(script: Path):
    """The containers have Python, vLLM, Ray and inside/ alone. A script does not hide a module of Python."""
    beside = {file.stem for file in INSIDE} | {"repository", "weights"}  # these are sent along with doctor.py
    assert _packages(script) <= sys.stdlib_module_names | IN_THE_IMAGE | beside
    assert script.stem not in sys.stdlib_module_names


def test_the_probe_can_run_without_a_container():
    """Each fact about a node is asked with the standard library. Only the fan-out, in functions, needs Ray."""
    tree = ast.parse((ROOT / "cluster/inside/probe.py").read_text())
    at_once = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert {name.partition(".")[0] for name in _imports(at_once)} <= sys.stdlib_module_names


def test_no_two_public_functions_share_a_name():
    """A search for a function's name finds one definition. A name alone says what is read, asked or listed."""
    trees = [ast.parse(file.read_text()) for file in MODULES]
    defined = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    # Signatures of one function stand above each other under @overload.
    overloads = [node.name for tree in trees for node in tree.body if _is_overload(node)]
    public = Counter(name for name in defined if not name.startswith("_"))
    public.subtract(overloads)
    assert [name for name, times in public.items() if times > 1] == []
    assert public.keys().isdisjoint({"read", "ask", "commands"})


def _is_overload(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(one, ast.Name) and one.id == "overload" for one in node.decorator_list
    )


def test_a_dry_run_imports_neither_docker_nor_rich(real_run):
    """A dry run starts fast, because Docker's SDK and tables are imported where they are used."""
    imported = {line.rpartition("|")[2].strip() for line in real_run.stderr.splitlines() if "import time:" in line}
    assert {"cluster.server", "jinja2"} <= imported
    assert {"docker", "rich", "requests"}.isdisjoint(imported)


# --- One place for each job ------------------------------------------------------------------------------------------


def _files_with(pattern: str, files: Iterable[Path]) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in files if re.search(pattern, file.read_text())}


def test_one_module_starts_processes():
    """Every act of this tool on a machine passes cluster/command.py, which shows the act first."""
    starts = r"\b(subprocess|Popen|os\.(exec\w+|spawn\w+|system|popen|fork)|pty|c\.run|c\.sudo|asyncio)\b"
    assert _files_with(starts, [*MODULES, ROOT / "tasks.py"]) == {"cluster/command.py"}


def test_settings_are_read_in_one_place():
    """settings.py reads the shell, and notes.py names what settings.py left. Programs and Docker's SDK get the rest."""
    may = {"cluster/settings.py", "cluster/notes.py", "cluster/command.py", "cluster/engine.py"}
    assert _files_with(r"os\.environ|getenv", [*MODULES, ROOT / "tasks.py"]) <= may


def test_there_is_one_docker_run_of_a_node():
    """The wrapper stands once in the repository."""
    assert [file.name for file in TEMPLATES if "--device=/dev/infiniband" in file.read_text()] == ["ray_container.j2"]


def test_every_exception_has_its_reason():
    """A finding of lint or of types that is passed over says why on the same line."""
    assert _files_with(r"# (noqa: [A-Z0-9, ]+|type: ignore(\[[\w, -]+\])?)\s*\n", PYTHON) == set()


# --- Templates -------------------------------------------------------------------------------------------------------


def _plain(file: Path) -> str:
    """Return the words that a template writes as they stand, without comments and expressions."""
    return re.sub(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", "", file.read_text(), flags=re.S)


def test_templates_hold_words_and_no_shell():
    """A template has no backslash, quote, variable or operator of a shell: `render` alone quotes."""
    found = {file.name: re.findall(r"[\\'\"`$|&;<>*?()~!#\[\]{}]", _plain(file)) for file in TEMPLATES}
    assert {name: chars for name, chars in found.items() if chars} == {}


def test_templates_have_one_flag_a_line():
    """A flag and its value have a line of their own, so that a diff shows flags. Short commands are one line."""
    lines = [line for file in TEMPLATES for line in _plain(file).splitlines()]
    several = [line for line in lines if len(re.findall(r"(?:^|\s)--?[a-z]", line)) > 1]
    whole = ("nvidia-smi", "docker image inspect", "docker info", "docker run --rm --entrypoint")
    assert [line for line in several if not line.startswith(whole)] == []


def test_no_template_knows_a_secret_or_the_role():
    """Secrets travel by name, and the wrapper has the same words for head and worker."""
    assert _files_with(r"\b(HF_TOKEN|VLLM_API_KEY|role)\b", TEMPLATES) == set()


# --- Size ------------------------------------------------------------------------------------------------------------


def _lines(files: Iterable[Path]) -> dict[str, int]:
    return {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}


def test_no_file_is_longer_than_500_lines():
    """A file is as long as its noun needs. A longer one has two nouns."""
    assert {name: lines for name, lines in _lines(PYTHON).items() if lines > 500} == {}


def test_the_flow_of_the_article_is_one_sitting():
    """tasks.py and ten modules have at most 2,075 lines."""
    flow = _lines([ROOT / "tasks.py", *(ROOT / f"cluster/{name}.py" for name in FLOW)])
    assert sum(flow.values()) <= 2075, flow


def test_all_python_is_an_afternoon():
    """The rehearsal counts, the tests do not. A change that adds lines says in its message what they buy."""
    assert sum(_lines(PYTHON).values()) <= 9470


# --- Findings of other programs, which are too slow for the fast tests -----------------------------------------------


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    "words",
    [
        ["ruff", "check", "--quiet", "--no-cache", "."],
        ["ruff", "format", "--check", "--quiet", "--no-cache", "."],
        ["mypy"],
    ],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_code_is_clean(words: Sequence[str]):
    """Lint and types have no finding, and the formatter would change no line."""
    checked = _output(sys.executable, "-m", *words)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.rehearsal
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck: apt-get install -y shellcheck")
def test_shellcheck_finds_nothing():
    """Every shell script of the repository is checked, and none of git's own samples."""
    scripts = [file for file in (ROOT / "inv", ROOT / ".ci/run", *ROOT.glob("[!.]*/*/*")) if _is_shell(file)]
    checked = _output("shellcheck", *scripts)
    assert checked.returncode == 0, checked.stdout


def _is_shell(file: Path) -> bool:
    if not file.is_file():
        return False
    return file.suffix == ".sh" or bool(re.match(rb"#!.*\b(sh|bash)\n", file.read_bytes()[:100]))


def _output(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
