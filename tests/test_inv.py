"""Promises of `inv` before there is an Invoke, kept on a machine of stub programs and by one real first use."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.rehearsal  # each test starts dozens of shells, which is slow; none needs a stand-in Spark
ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
REAL = ("sh", "chown", "cmp", "cp", "env", "flock", "ln", "mkdir", "readlink", "rm", "sleep", "stat")
UPDATE = "apt-get update"
INSTALL = "env DEBIAN_FRONTEND=noninteractive apt-get install -y python3-venv"

# A python3 that makes virtual environments of itself, and plays pip and Invoke in them.
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


class Machine:
    """A folder that is the whole PATH, a log of the programs that were started from it, and a checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {"PATH": str(folder / "bin"), "MACHINE": str(folder)}
        self.checkout = folder / "check out"
        self.venv = self.checkout / ".venv"
        for made in (folder / "bin", self.checkout):
            made.mkdir()
        for name in REAL:
            (folder / "bin" / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
        shutil.copy(ROOT / "inv", self.checkout)
        (self.checkout / "requirements.lock").write_text("invoke==3.0.3\n")
        self.program("../python", PYTHON)
        self.program("python3", PYTHON)
        self.switch_on("venv")
        self.user(os.getuid())

    def program(self, name: str, text: str) -> None:
        """Put a program on the PATH."""
        file = self.folder / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def user(self, uid: int) -> None:
        """Let `id -u` answer this."""
        self.program("id", f"#!/bin/sh\necho {uid}\n")

    def switch_on(self, fact: str) -> None:
        """Make a fact true: python3 has `venv` or is `old`, the network is `slow` or `offline`."""
        (self.folder / fact).touch()

    def without(self, *names: str) -> None:
        """Remove programs and facts."""
        for name in names:
            (self.folder / "bin" / name).unlink(missing_ok=True)
            (self.folder / name).unlink(missing_ok=True)

    def inv(self, *words: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
        """Type `./inv …`, if need be as another user."""
        command = [self.checkout / "inv", *words]
        if user is not None:
            self.user(user)
            command = [shutil.which("setpriv") or "setpriv", "--reuid", str(user), "--clear-groups", *command]
        return subprocess.run(command, env=self.env, cwd=self.checkout, capture_output=True, text=True)

    def started(self, *programs: str) -> Sequence[str]:
        """Return the lines of the log that begin with one of these."""
        log = self.folder / "log"
        return [line for line in log.read_text().splitlines() if line.startswith(programs)] if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine whose python3 has venv, with a checkout that nobody has used."""
    return Machine(tmp_path)


def test_first_use_makes_the_environment_and_runs_invoke(machine: Machine):
    """The first use installs the lock file by its hashes. Standard output has the words of Invoke alone."""
    said = machine.inv("--list")
    _, pip, _ = machine.started("python3")
    assert said.returncode == 0
    assert (
        said.stdout
        == f"{machine.checkout}: {machine.venv}/bin/inv --search-root {machine.checkout} --write-pyc --list\n"
    )
    assert "pip talks" in said.stderr
    assert pip.startswith("python3 -m pip install") and "--require-hashes" in pip
    assert (machine.venv / "stamp").read_text() == (machine.checkout / "requirements.lock").read_text()


def test_a_later_start_installs_nothing_and_says_nothing(machine: Machine):
    """A finished environment is used as it is."""
    machine.inv()
    machine.without("venv")
    said = machine.inv()
    assert len(machine.started("python3 -m")) == 2
    assert said.stderr == ""


def test_the_tasks_run_in_the_folder_where_inv_was_typed(machine: Machine, tmp_path: Path):
    """From another folder and through a link the tasks are found, and the working folder does not change."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "inv").symlink_to(machine.checkout / "inv")
    said = subprocess.run([elsewhere / "inv"], env=machine.env, cwd=elsewhere, capture_output=True, text=True)
    assert said.stdout.startswith(f"{elsewhere}: {machine.venv}/bin/inv")
    assert f"--search-root {machine.checkout}" in said.stdout


def test_a_changed_lock_file_is_installed(machine: Machine):
    """A pull that brings another lock file brings its packages at the next start, once."""
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
    """`venv` without ensurepip leaves a python, a kill leaves half a stamp, a system upgrade leaves a dead link."""
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin/python").symlink_to(machine.folder / "bin" / python)
    (machine.venv / "stamp").write_text(stamp)
    assert machine.inv().returncode == 0
    assert len(machine.started("python3 -m pip")) == 1


def test_a_failed_install_is_a_failure_and_is_tried_again(machine: Machine):
    """Without a network `inv` fails. The next start with a network begins again."""
    machine.switch_on("offline")
    assert machine.inv().returncode != 0
    machine.without("offline")
    assert machine.inv().returncode == 0


def test_two_first_uses_at_once_make_one_environment(machine: Machine):
    """The second start waits for the first, says so, and uses its environment."""
    machine.switch_on("slow")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([machine.checkout / "inv"], env=machine.env, **pipes) for _ in range(2)]
    said = [one.communicate(timeout=30)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert len(machine.started("python3 -m pip")) == 1
    assert sorted("waiting for another inv" in err for err in said) == [False, True]


def test_the_link_to_python_has_its_version(machine: Machine):
    """`.venv/bin/python` leads to a versioned program, so that a system upgrade breaks it visibly."""
    (machine.folder / "bin/python3").rename(machine.folder / "bin/python3.11")
    (machine.folder / "bin/python3").symlink_to("python3.11")
    machine.inv()
    assert (machine.venv / "bin/python").readlink() == (machine.folder / "bin/python3.11").resolve()


def test_uv_is_preferred(machine: Machine):
    """With uv on the PATH no python3 is needed. Bytecode is compiled, because Invoke writes none later."""
    machine.program("uv", UV)
    machine.without("python3")
    assert machine.inv().returncode == 0
    venv, install = machine.started("uv")
    assert venv.startswith("uv venv") and ">=3.11" in venv
    assert "--require-hashes" in install and "--compile-bytecode" in install


@pytest.mark.parametrize(("missing", "uid", "sudo"), [("python3", 0, ""), ("venv", 1000, "sudo ")])
def test_without_venv_the_message_is_the_line_that_installs_it(machine: Machine, missing: str, uid: int, sudo: str):
    """Without python3, or with Debian's python3 without venv, one message says what to type. Nothing is changed."""
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
    """`--install` anywhere on the line types it, through sudo for a user and without sudo for root, and goes on."""
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
    """Before Python 3.11 nothing is installed. The message names the version and the way on."""
    machine.switch_on("old")
    said = machine.inv("--install")
    assert said.returncode == 1
    assert "Python 3.9.2 is too old: 3.11 or later" in said.stderr and "uv" in said.stderr


# --- A checkout of another user, tested by root ----------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Machine]:
    """A machine in a folder that every user may enter."""
    if os.getuid():
        pytest.skip("only root can act as two users")
    folder = Path(mkdtemp())
    folder.chmod(0o755)
    machine = Machine(folder)
    (folder / "log").touch()
    (folder / "log").chmod(0o666)
    yield machine
    shutil.rmtree(folder)


def _give_to_nobody(checkout: Path) -> None:
    for path in (checkout, *checkout.iterdir()):
        shutil.chown(path, "nobody")


def test_a_checkout_of_another_user_is_refused_with_the_line_to_type(shared: Machine):
    """A user who may not write to the checkout cannot make the environment."""
    said = shared.inv("--list", user=65534)
    assert said.returncode == 1 and "must be yours" in said.stderr and "Type: sudo chown -R 65534 " in said.stderr


def test_a_read_only_checkout_is_named(shared: Machine):
    """The owner of a read-only checkout is not told to become its owner."""
    _give_to_nobody(shared.checkout)
    shared.checkout.chmod(0o555)
    said = shared.inv("--list", user=65534)
    assert said.returncode == 1 and "is read-only" in said.stderr and "chown" not in said.stderr


def test_a_checkout_on_a_read_only_disk_is_named(shared: Machine):
    """Another user is not told to become its owner, because the disk would refuse that too."""
    (shared.folder / "bin/mkdir").unlink()
    shared.program("mkdir", "#!/bin/sh\necho \"mkdir: cannot create '$1': Read-only file system\" >&2; exit 1\n")
    said = shared.inv("--list", user=65534)
    assert said.returncode == 1 and "is read-only" in said.stderr and "chown" not in said.stderr


def test_under_sudo_the_environment_belongs_to_the_user(shared: Machine):
    """Root in the checkout of another user leaves no file of root there, and the user goes on without sudo."""
    _give_to_nobody(shared.checkout)
    said = shared.inv("rehearse")
    assert said.returncode == 0
    assert "--write-pyc" not in said.stdout
    left = (shared.checkout, *shared.checkout.rglob("*"))
    assert {path.lstat().st_uid for path in left} == {65534}
    (shared.checkout / "requirements.lock").write_text("invoke==3.0.4\n")
    assert shared.inv("rehearse", user=65534).returncode == 0


# --- The real lock file, and a real first use ------------------------------------------------------------------------


def test_the_lock_file_holds_what_the_project_asks_for():
    """Each dependency, for work and for development, is pinned in its range, by hash, and by no address of an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK, re.M))
    for wanted in map(Requirement, [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]):
        assert pinned[canonicalize_name(wanted.name)] in wanted.specifier
    assert LOCK.count("--hash=sha256:") > 2 * len(pinned)
    assert "://" not in LOCK and "--index" not in LOCK


def test_a_fresh_copy_lists_its_tasks(tmp_path: Path):
    """The real first use installs from PyPI by pip. The second start says nothing but the list."""
    shutil.copytree(ROOT, tmp_path / "fresh", ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
    path = os.pathsep.join(folder for folder in os.get_exec_path() if not Path(folder, "uv").exists())
    env = os.environ | {"PATH": path}
    first, second = (
        subprocess.run([tmp_path / "fresh/inv", "--list"], env=env, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Available tasks:")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
