"""However a rehearsal ends, nothing of it outlives it; these run before the tests that share one rig: one at a time."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rehearsal import cgroup, needs, place, sweep
from rehearsal.engine import script
from rehearsal.rig import Rig
from rehearsal.shell import RehearsalError, run, wait

pytestmark = pytest.mark.rehearsal
REPOSITORY = Path(__file__).resolve().parents[2]
# Says where it is, and stays there: with nothing up yet, with engines, and with a build under way.
OWNER = """
import sys, time
from rehearsal import rig
say = lambda line: print(line, flush=True)
if sys.argv[1] == "namespaces":
    rig.Rig.power_on = lambda *_: (say("namespaces"), time.sleep(99))
with rig.Rig(say=say, keep=sys.argv[1] == "kept") as made:
    say("engines")
    if sys.argv[1] == "container":
        made.builder.docker("run", "--detach", "--network", "host", made.base_image(), "sleep", "99")
        say("container")
    if sys.argv[1] != "kept":
        time.sleep(99)
"""
# Starts what says "it goes on", with the starter's own PATH.
STARTER = """
import subprocess
from rehearsal import shell
subprocess.run(shell.bound_to_us(*shell.contained("echo", "it goes on")))
"""
# A setpriv that is slow to begin, and an unshare that is gone before its child could ask for its death.
SLOW = {
    "setpriv": (
        "echo asked",
        'while grep -q "^PPid:[[:space:]]*$PPID$" /proc/$$/status; do sleep 0.01; done',
        'PATH=${PATH#*:} exec setpriv "$@"',
    ),
    "unshare": ("echo asked", "shift 5", '(while [ -d /proc/$$ ]; do sleep 0.01; done; exec "$@") &'),
}


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """Skip where rehearsals can't run; sweep before and after."""
    if said := needs.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    sweep.take_down()
    yield
    sweep.take_down()


@pytest.fixture
def owner() -> Iterator[Callable[[str], subprocess.Popen]]:
    """Starts a process that makes a rehearsal, and waits for the moment when it has said so."""
    started = []

    def start(moment: str) -> subprocess.Popen:
        words = [sys.executable, "-c", OWNER, moment]
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        while moment != "kept" and process.stdout.readline().strip() != moment:
            assert process.poll() is None
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def left() -> list[str]:
    """What a rehearsal could leave: processes, mounts, namespaces, control groups, files."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(place.folder()) in line]
    spaces = [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.startswith("rehearsal-")]
    groups = [str(group) for group in cgroup.ROOT.glob(f"**/{cgroup.NAME}")]
    files = [str(path) for path in (place.folder() / "run", Path("/dev/infiniband")) if path.exists()]
    return [*processes(), *mounts, *spaces, *groups, *files]


def processes() -> list[str]:
    """Command lines that name the rehearsal's folder: engines, their children, and who holds them."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    return [line for file in files if f"{place.folder()}/" in (line := command_line(file))]


def command_line(file: Path) -> str:
    """Empty for a process that has ended meanwhile."""
    with suppress(OSError):
        return file.read_text(errors="replace").replace("\0", " ")
    return ""


@pytest.mark.parametrize("moment", ["namespaces", "engines", "container"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_nothing_is_left_by_whoever_can_clean_up(owner, moment, number):
    """Ctrl-C (twice), SIGTERM and a lost terminal take everything down, whatever was up."""
    process = owner(moment)
    for _ in range(2):
        os.killpg(process.pid, number)
    assert process.wait(60) != 0
    assert left() == []


@pytest.mark.parametrize("moment", ["namespaces", "engines", "container"])
def test_after_sigkill_only_names_are_left_and_the_next_run_sweeps_them(owner, moment):
    """No engine and no container outlives a killed owner; the next rehearsal comes up, and leaves nothing."""
    process = owner(moment)
    process.kill()
    assert wait(lambda: not processes() and not cgroup.processes(), 5), processes()
    with Rig(say=lambda _: None) as rig:
        assert rig.builder.docker("ps", "--all", "--quiet") == ""
    assert left() == []


@pytest.mark.parametrize("program", SLOW)
def test_what_is_started_by_a_process_that_is_killed_meanwhile_does_not_go_on(tmp_path, program):
    """The kernel binds a child from its own first step on, which may come after its parent's last."""
    script(tmp_path / program, *SLOW[program])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = [sys.executable, "-c", STARTER]
    starter = subprocess.Popen(words, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True)
    assert starter.stdout.readline() == "asked\n"
    if program == "setpriv":
        starter.kill()
    assert starter.communicate(timeout=10)[0] == ""


def test_one_rehearsal_at_a_time(owner):
    """A second one is refused, and the first is not hurt."""
    process = owner("engines")
    with pytest.raises(RehearsalError, match=f"another rehearsal is running on this machine .process {process.pid}."):
        Rig().start()
    assert process.poll() is None
    process.terminate()
    process.wait(60)


def test_a_kept_rehearsal_stays_until_it_is_taken_down(owner):
    """It outlives its owner, refuses the next, answers, and goes when it is told to."""
    assert owner("kept").wait(60) == 0
    with pytest.raises(RehearsalError, match="kept up"):
        Rig().start()
    assert Rig().hosts[1].run("docker", "info", "--format", "{{.Name}}").stdout.strip() == "spark-2"
    assert sweep.take_down()
    assert left() == []
