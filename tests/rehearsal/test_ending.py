"""A rehearsal leaves nothing, however it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rehearsal import needs, sandbox
from rehearsal.rig import Rig
from rehearsal.shell import RehearsalError, run, wait

pytestmark = pytest.mark.rehearsal
REPOSITORY = Path(__file__).resolve().parents[2]
# Says how far it is, and stays there: with nothing up yet, with engines, a container, or a command on a host.
# SIGHUP and SIGINT reach it also under `nohup` and behind `&`.
OWNER = """
import signal, sys, time
from rehearsal import image, rig
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
say = lambda line: print(line, flush=True)
if sys.argv[1] == "namespaces":
    rig.Rig.power_on = lambda *_: (say("namespaces"), time.sleep(99))
with rig.Rig(say=say, keep=sys.argv[1] == "kept") as made:
    say("engines")
    if sys.argv[1] == "container":
        made.builder.docker("run", "--detach", "--network", "host", image.make(made.builder, say), "sleep", "99")
        say("container")
    if sys.argv[1] == "command":
        left = made.hosts[0].popen("sh", "-c", "sleep 98 & wait", start_new_session=True)
        say("command")
    if sys.argv[1] != "kept":
        time.sleep(99)
"""


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """Skip if no rehearsal can run here. Remove its remains before and after."""
    if said := needs.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    sandbox.take_down()
    yield
    sandbox.take_down()


@pytest.fixture
def owner() -> Iterator[Callable[[str], subprocess.Popen]]:
    """Starts a process that makes a rehearsal, and waits until the rehearsal is up."""
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
    """Everything that a rehearsal could leave: processes, mounts, networks, control groups, files."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(sandbox.folder()) in line]
    networks = [line for line in run("ip", "netns", "list").splitlines() if line.startswith(("spark-", "switch"))]
    groups = [str(group) for group in sandbox.CGROUPS.glob(f"**/{sandbox.CGROUP}")]
    files = [str(path) for path in (sandbox.folder() / "run", Path("/dev/infiniband")) if path.exists()]
    return [*processes(), *mounts, *networks, *groups, *files]


def processes() -> list[str]:
    """Command lines of a rehearsal: the sandbox, engines, their children, and commands on a host."""
    marks = (f"{sandbox.folder()}/", "/run/netns", "sleep 98", "sleep 99")
    lines = [command_line(file) for file in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in lines if any(mark in line for mark in marks)]


def command_line(file: Path) -> str:
    """Return the command line of a process; empty if the process has ended."""
    with suppress(OSError):
        return file.read_text(errors="replace").replace("\0", " ")
    return ""


@pytest.mark.parametrize(
    ("moment", "number"),
    [("namespaces", signal.SIGINT), ("container", signal.SIGTERM), ("command", signal.SIGHUP)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_takes_everything_down(owner, moment, number):
    """Ctrl-C (twice), SIGTERM and a lost terminal leave nothing, whatever was up."""
    process = owner(moment)
    for _ in range(2):
        os.killpg(process.pid, number)
    assert process.wait(120) != 0
    assert wait(lambda: left() == [], 30), left()


@pytest.mark.parametrize("moment", ["namespaces", "container"])
def test_after_sigkill_only_names_are_left_and_the_next_run_sweeps_them(owner, moment):
    """Engines and containers end with a killed owner. The next rehearsal starts, and leaves nothing."""
    process = owner(moment)
    process.kill()
    assert wait(lambda: not processes(), 30), processes()
    with Rig(say=lambda _: None) as rig:
        assert rig.builder.docker("ps", "--all", "--quiet") == ""
    assert wait(lambda: left() == [], 30), left()


def test_one_rehearsal_at_a_time(owner):
    """A second rehearsal and --down are refused, and the first rehearsal goes on."""
    process = owner("engines")
    for second in (lambda: Rig().__enter__(), sandbox.take_down):
        with pytest.raises(
            RehearsalError, match=f"another rehearsal is running on this machine .process {process.pid}."
        ):
            second()
    assert process.poll() is None
    process.terminate()
    process.wait(120)


def test_a_kept_rehearsal_stays_until_it_is_taken_down(owner):
    """A kept rehearsal outlives its owner and answers. Another rehearsal is refused until --down."""
    assert owner("kept").wait(120) == 0
    with pytest.raises(RehearsalError, match="kept up"):
        Rig().__enter__()
    assert Rig().hosts[1].run("docker", "info", "--format", "{{.Name}}").stdout.strip() == "spark-2"
    assert sandbox.take_down()
    assert wait(lambda: left() == [], 30), left()
    assert not sandbox.take_down()
