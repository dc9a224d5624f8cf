"""What `inv` promises before there is an Invoke: on a machine made of stub programs, but for one real first use."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.rehearsal  # dozens of shells each: slow, though they need no Sparks
ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
REAL = ("sh", "cmp", "cp", "env", "flock", "ln", "mkdir", "readlink", "rm", "sleep", "su")
UPDATE = "apt-get update"
INSTALL = "env DEBIAN_FRONTEND=noninteractive apt-get install -y python3-venv"

# A python3 that says its version, makes virtual environments of itself, and plays pip and Invoke in them.
PYTHON = """#!/bin/sh
case "$*" in
    *"import venv, ensurepip; assert"*) [ -e "$MACHINE/venv" ] && [ ! -e "$MACHINE/old" ]; exit ;;
    *"version_info <"*) [ -e "$MACHINE/old" ]; exit ;;
    --version) echo Python 3.9.2; exit ;;
esac
echo "python3 $*" >>"$MACHINE/log"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && ln -s "$MACHINE/bin/python3" "$3/bin/python" ;;
    "-m pip "*)
        echo "pip talks"
        [ ! -e "$MACHINE/slow" ] || sleep 0.1
        [ ! -e "$MACHINE/offline" ] && echo >"${0%/*}/inv"
        ;;
    *) echo "$PWD: $*" ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >>"$MACHINE/log"
for last; do :; done
case "$*" in venv*) mkdir -p "$last/bin" && ln -s "$MACHINE/python" "$last/bin/python" ;; esac
"""
APT = """#!/bin/sh
echo "apt-get $*" >>"$MACHINE/log"
echo "apt-get talks"
case "$*" in *install*) cp "$MACHINE/python" "$MACHINE/bin/python3" && echo >"$MACHINE/venv" ;; esac
"""
SUDO = '#!/bin/sh\necho "sudo $*" >>"$MACHINE/log"\nexec "$@"\n'


@dataclass
class Machine:
    """A folder that is a PATH, a log of what was started from it, and a checkout."""

    folder: Path
    env: dict[str, str] = field(init=False)

    def __post_init__(self):
        self.env = {"PATH": str(self.folder / "bin"), "MACHINE": str(self.folder)}
        self.checkout = self.folder / "check out"
        self.venv = self.checkout / ".venv"
        for folder in (self.folder / "bin", self.checkout):
            folder.mkdir()
        for name in REAL:
            (self.folder / "bin" / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
        shutil.copy(ROOT / "inv", self.checkout)
        (self.checkout / "requirements.lock").write_text("invoke==3.0.3\n")
        self.program("../python", PYTHON)
        self.program("python3", PYTHON)
        self.says("venv")
        self.user(0)

    def program(self, name: str, text: str) -> None:
        """Puts a program on the PATH."""
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def user(self, uid: int) -> None:
        """Says who types; for root, the checkout is root's."""
        self.program("id", f"#!/bin/sh\necho {uid}\n")
        self.program("stat", "#!/bin/sh\necho root\n")

    def says(self, fact: str) -> None:
        """Makes something true: python3 has `venv` or is `old`, the network is `slow` or `offline`."""
        (self.folder / fact).touch()

    def without(self, *names: str) -> None:
        """Takes programs and facts away."""
        for name in names:
            (self.folder / "bin" / name).unlink(missing_ok=True)
            (self.folder / name).unlink(missing_ok=True)

    def inv(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Types `./inv …`."""
        command = [self.checkout / "inv", *words]
        return subprocess.run(command, env=self.env, cwd=cwd or self.checkout, capture_output=True, text=True)

    def started(self, *programs: str) -> Sequence[str]:
        """The lines of the log that begin with one of these."""
        log = self.folder / "log"
        return [line for line in log.read_text().splitlines() if line.startswith(programs)] if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with a python3 that has venv, typed at by root, and a checkout that nobody has used."""
    return Machine(tmp_path)


def test_first_use_makes_the_environment_and_runs_invoke(machine: Machine):
    """First use installs from the lock file with hashes; standard output has Invoke's words alone."""
    said = machine.inv("--list")
    _, pip, _ = machine.started("python3")
    assert said.returncode == 0
    assert said.stdout.count("\n") == 1 and said.stdout.endswith(
        f"--search-root {machine.checkout} --write-pyc --list\n"
    )
    assert "pip talks" in said.stderr
    assert pip.startswith("python3 -m pip install") and "--require-hashes" in pip
    assert (machine.venv / "stamp").read_text() == (machine.checkout / "requirements.lock").read_text()


def test_a_later_start_installs_nothing_and_says_nothing(machine: Machine):
    """Once made, the environment is used as it is, and python3 is not even asked for its version."""
    machine.inv()
    machine.without("venv")
    said = machine.inv()
    assert len(machine.started("python3 -m")) == 2
    assert said.stderr == ""


def test_it_runs_where_it_was_typed(machine: Machine, tmp_path: Path):
    """From another folder, and through a link, the tasks are found and the person's folder stays theirs."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "inv").symlink_to(machine.checkout / "inv")
    said = subprocess.run([elsewhere / "inv"], env=machine.env, cwd=elsewhere, capture_output=True, text=True)
    assert said.stdout.startswith(f"{elsewhere}: {machine.venv}/bin/inv")
    assert f"--search-root {machine.checkout}" in said.stdout


def test_a_changed_lock_file_is_installed(machine: Machine):
    """A pull that brings another lock file brings its packages at the next start."""
    machine.inv()
    (machine.checkout / "requirements.lock").write_text("invoke==3.0.4\n")
    machine.inv()
    machine.inv()
    assert len(machine.started("python3 -m pip")) == 2


@pytest.mark.parametrize(
    ("python", "stamp"),
    [("python3", ""), ("python3", "invoke=="), ("python3.10", "invoke==3.0.3\n")],
    ids=["without pip", "killed at the end", "python gone"],
)
def test_a_half_made_environment_is_made_anew(machine: Machine, python: str, stamp: str):
    """`python3 -m venv` without ensurepip leaves a python, a kill half a stamp, an upgrade a link to nothing."""
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin/python").symlink_to(machine.folder / "bin" / python)
    (machine.venv / "stamp").write_text(stamp)
    assert machine.inv().returncode == 0
    assert len(machine.started("python3 -m pip")) == 1


def test_a_failed_install_is_a_failure_and_is_tried_again(machine: Machine):
    """Without a network it fails, without an Invoke that cannot run; with one it starts over."""
    machine.says("offline")
    assert machine.inv().returncode != 0
    machine.without("offline")
    assert machine.inv().returncode == 0


def test_two_first_uses_at_once_make_one_environment(machine: Machine):
    """The second waits for the first, says so, and uses what it made."""
    machine.says("slow")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([machine.checkout / "inv"], env=machine.env, **pipes) for _ in range(2)]
    said = [one.communicate(timeout=10)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert len(machine.started("python3 -m pip")) == 1
    assert sorted("waiting for another inv" in err for err in said) == [False, True]


def test_the_link_to_python_has_its_version(machine: Machine):
    """`.venv/bin/python` leads to the program itself: a system's upgrade breaks it visibly, and it is made anew."""
    (machine.folder / "bin/python3").rename(machine.folder / "bin/python3.11")
    (machine.folder / "bin/python3").symlink_to("python3.11")
    machine.inv()
    assert (machine.venv / "bin/python").readlink() == (machine.folder / "bin/python3.11").resolve()


def test_uv_is_preferred(machine: Machine):
    """With uv on the PATH python3 is not asked; bytecode is compiled, which pip does unasked and Invoke prevents."""
    machine.program("uv", UV)
    machine.without("python3")
    assert machine.inv().returncode == 0
    venv, install = machine.started("uv")
    assert venv.startswith("uv venv") and ">=3.11" in venv
    assert "--require-hashes" in install and "--compile-bytecode" in install


@pytest.mark.parametrize(("missing", "uid", "sudo"), [("python3", 0, ""), ("venv", 1000, "sudo ")])
def test_without_venv_it_names_the_line_that_brings_it(machine: Machine, missing: str, uid: int, sudo: str):
    """Where Debian's python3 came without venv, or there is none, one message says what to type; nothing is changed."""
    machine.without(missing)
    machine.user(uid)
    said = machine.inv("--list")
    assert said.returncode == 1
    assert said.stdout == ""
    assert said.stderr.count("\n") == 1 and said.stderr.endswith(f": {sudo}{UPDATE}; {sudo}{INSTALL}\n")
    assert not machine.venv.exists()


@pytest.mark.parametrize(
    ("missing", "uid", "typed"), [("python3", 0, ["apt-get"]), ("venv", 1000, ["sudo", "apt-get"])]
)
def test_install_types_that_line(machine: Machine, missing: str, uid: int, typed: list[str]):
    """`--install` anywhere types it, through sudo for a user and without it for root, and goes on."""
    machine.program("apt-get", APT)
    if uid:
        machine.program("sudo", SUDO)
    machine.without(missing)
    machine.user(uid)
    said = machine.inv("test", "--install", "--fast")
    assert said.returncode == 0
    assert said.stdout.count("\n") == 1 and said.stdout.endswith("test --install --fast\n")
    assert [line.split()[0] for line in machine.started("sudo", "apt-get")] == [*typed, *typed]
    assert machine.started("apt-get")[-1] == "apt-get install -y python3-venv"


def test_an_old_python_is_named(machine: Machine):
    """Before 3.11 nothing is installed: the message names the version and the way on."""
    machine.says("old")
    said = machine.inv("--install")
    assert said.returncode == 1
    assert "Python 3.9.2 is too old, 3.11 or later" in said.stderr and "uv" in said.stderr


@pytest.fixture
def shared() -> Iterator[Machine]:
    """A machine in a folder that every user may enter, which pytest's own are not."""
    folder = Path(mkdtemp())
    folder.chmod(0o755)
    yield Machine(folder)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can type for somebody else")
def test_a_checkout_that_is_somebody_elses_is_said(shared: Machine):
    """Who may not write there cannot make the environment."""
    done = subprocess.run(["setpriv", "--reuid", "65534", "--clear-groups", shared.checkout / "inv", "--list"],
                          env=shared.env | {"PATH": f"{shared.env['PATH']}:{os.environ['PATH']}"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and "must be yours to write .venv into it. Type: sudo chown -R" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can type for somebody else")
def test_under_sudo_the_environment_is_the_users(shared: Machine):
    """Root in another's checkout leaves no file of root's there."""
    for name in ("id", "stat"):
        (shared.folder / "bin" / name).unlink()
        (shared.folder / "bin" / name).symlink_to(shutil.which(name))
    (shared.folder / "log").touch(mode=0o666)
    (shared.folder / "log").chmod(0o666)
    for path in (shared.checkout, *shared.checkout.iterdir()):
        shutil.chown(path, "nobody")
    said = shared.inv("rehearse")
    assert said.returncode == 0
    assert "--write-pyc" not in said.stdout
    assert (shared.venv / "stamp").exists()
    assert {path.owner() for path in (shared.checkout, *shared.checkout.rglob("*")) if not path.is_symlink()} == {
        "nobody"
    }


def test_the_lock_file_holds_what_the_project_asks_for():
    """Each dependency, for work and for development, is pinned in its range, by hash, and by no address of an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK, re.M))
    for wanted in map(Requirement, [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]):
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier
    assert LOCK.count("--hash=sha256:") > 2 * len(pinned)
    assert "://" not in LOCK and "--index" not in LOCK


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_code_is_clean(words: Sequence[str]):
    """ruff has nothing to say, of lint or of format."""
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", *words, "--quiet", "--no-cache", ROOT], capture_output=True, text=True
    )
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck: apt-get install -y shellcheck")
def test_the_scripts_are_clean():
    """shellcheck has nothing to say of what runs before there is a Python."""
    checked = subprocess.run(["shellcheck", ROOT / "inv", ROOT / ".ci/run"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_fresh_copy_lists_its_tasks(tmp_path: Path):
    """On first use the real thing is installed from PyPI by pip, and is quick and silent at the second."""
    shutil.copytree(ROOT, tmp_path / "fresh", ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
    path = os.pathsep.join(folder for folder in os.get_exec_path() if not Path(folder, "uv").exists())
    listed = [
        subprocess.run(
            [tmp_path / "fresh/inv", "--list"], env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert [one.returncode for one in listed] == [0, 0], listed[0].stderr
    assert listed[0].stdout.startswith("Available tasks:")
    assert listed[1].stdout == listed[0].stdout
    assert listed[1].stderr == ""
