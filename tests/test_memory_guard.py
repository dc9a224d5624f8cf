"""The memory guard of a node: here it sees a made-up /proc, in which the processes are real children of the test."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.repository import ROOT

GIB = 2**30
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def script():
    """The script itself."""
    with pytest.MonkeyPatch.context() as now:
        now.syspath_prepend(ROOT / "cluster/inside")
        now.setattr(sys, "dont_write_bytecode", True)
        yield importlib.import_module("memory_guard")
    del sys.modules["memory_guard"]


class Machine:
    """A made-up /proc with the memory that a test sets, and the children that a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.proc, self.children = folder, folder / "proc", []
        self.proc.mkdir()
        self.memory(20)

    def memory(self, gib: float) -> None:
        """Set what is available, as /proc/meminfo has it."""
        text = f"MemTotal:  127601920 kB\nMemFree:    1048576 kB\nMemAvailable: {int(gib * 2**20)} kB\nBuffers: 7 kB\n"
        text += "Cached:     3145728 kB\nSwapCached:  77 kB\nSwapTotal:  2097152 kB\nSwapFree:   1048576 kB\n"
        (self.proc / "meminfo").write_text(text)

    def start(self, name: str, program: str = "echo; read line") -> subprocess.Popen:
        """Start a shell under a name, and show it and the children that it prints in the made-up /proc."""
        shell = self.folder / name
        if not shell.exists():
            shell.symlink_to("/bin/sh")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        child = subprocess.Popen([shell, "-c", program], process_group=0, **pipes)
        self.children.append(child)
        for pid in (child.pid, *map(int, child.stdout.readline().split())):
            (self.proc / str(pid)).symlink_to(f"/proc/{pid}")
        return child


@pytest.fixture
def machine(tmp_path):
    """A machine without processes and with 20 GiB."""
    made = Machine(tmp_path)
    yield made
    for child in made.children:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.fixture
def guard(script, machine, tmp_path, monkeypatch):
    """Makes the guard of 10.0.0.2, which kills below so many GiB."""
    for name in ("FILE", "PROC", "SERVER", "ENDED"):
        monkeypatch.setattr(script, name, str(tmp_path / name.lower()))
    return lambda least=4: script.Guard("10.0.0.2", least)


def told(tmp_path):
    """The line that the guard has written."""
    text = (tmp_path / "file").read_text()
    assert len(text) == 400 and text.count("\n") == 1
    return json.loads(text)


def died(pid):
    """Wait up to 5 s until a process is dead, whether or not somebody has reaped it."""
    deadline = time.monotonic() + 5
    with suppress(FileNotFoundError):
        while ") Z " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.001)


PARENT = "/bin/sleep 60 & echo $!; wait"  # a shell with one child


def test_what_a_look_writes(guard, machine, tmp_path):
    """The line has the memory in bytes, and covers a longer line before it."""
    watch = guard()
    for gib in (20, 123.456789, 7):
        machine.memory(gib)
        watch.look()
    line = told(tmp_path)
    assert abs(line.pop("at") - time.time()) < 20
    memory = {"available": 7 * GIB, "free": GIB, "cached": 3 * GIB, "swap": GIB}
    assert line == memory | {"lowest": 7 * GIB, "killed": None}


def test_the_lowest_is_that_of_the_last_five_seconds(guard, machine, tmp_path):
    """The recorder looks each second, and a fall between two of its looks is not lost."""
    watch, lows = guard(), []
    for gib in (20, 9, *[20] * 50):
        machine.memory(gib)
        watch.look()
        lows.append(told(tmp_path)["lowest"] / GIB)
    assert lows == [20, *[9] * 50, 20]


def test_ranks_are_known_by_their_names(script, machine, monkeypatch):
    """Both executors of vLLM give a rank such a name. A compiler counts with its rank, and a dead process does not."""
    names = ("ray::RayWorkerProc", "ray::IDLE", "raylet", "python3")
    rank, *others = [machine.start(name, PARENT) for name in names]
    older = machine.start("ray::RayWorkerWrapper.execute")
    dead = machine.start("ray::RayWorkerP", "echo")
    died(dead.pid)
    compiler = int(Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text())
    monkeypatch.setattr(script, "PROC", str(machine.proc))
    assert script.find_ranks() == {rank.pid, older.pid, compiler} and len(others) == 3


def test_a_node_without_memory_loses_its_ranks(guard, machine, tmp_path, capsys):
    """The ranks, their compilers and on the head the server are killed; Ray lives on. The reason is said and kept."""
    rank, raylet = machine.start("ray::RayWorkerProc", PARENT), machine.start("raylet")
    compiler = int(Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text())
    server = machine.start("vllm", PARENT)
    (tmp_path / "server").write_text(f"{server.pid}\n")
    watch = guard()
    machine.memory(4)
    watch.look()
    assert rank.poll() is None and told(tmp_path)["killed"] is None
    machine.memory(3.9)
    watch.look()
    assert rank.wait(5) == server.wait(5) == KILLED and raylet.poll() is None
    died(compiler)
    killed = told(tmp_path)["killed"]
    assert killed == {"at": told(tmp_path)["at"], "available": int(3.9 * 2**20) * 1024}
    said = "10.0.0.2 had 3.9 GiB, less than MEM_ABORT_GIB (4): killed 2 of its processes and the server, the first"
    assert f"memory guard: {said} after " in capsys.readouterr().err
    why = {"why": "ended by the memory guard: 10.0.0.2 had 3.9 GiB", "by": "memory guard"}
    assert json.loads((tmp_path / "ended").read_text()) == why | {"at": killed["at"]}


def test_a_worker_has_no_server_to_end(guard, machine, tmp_path):
    """Only the head's recorder knows of the server. Without the pid file nothing is written for it."""
    rank = machine.start("ray::RayWorkerProc")
    watch = guard()
    machine.memory(1)
    watch.look()
    assert rank.wait(5) == KILLED and not (tmp_path / "ended").exists()


def test_the_known_ranks_are_killed_before_processes_are_listed(guard, script, machine, monkeypatch):
    """A list of processes takes long on a starving host, and most of the memory is the ranks'."""
    rank = machine.start("ray::RayWorkerProc")
    watch = guard()
    machine.memory(1)
    monkeypatch.setattr(script, "find_ranks", lambda: rank.wait(5) and set())
    watch.look()
    assert rank.returncode == KILLED


def test_the_guard_goes_on_while_memory_is_short(guard, machine, tmp_path, capsys):
    """A rank that starts meanwhile is killed at the next look. What is dying is killed again, and not said again."""
    first = machine.start("ray::RayWorkerProc")
    watch = guard()
    machine.memory(3)
    watch.look()
    once = told(tmp_path)["killed"]
    watch.look()
    assert told(tmp_path)["killed"] == once and capsys.readouterr().err.count("killed") == 1
    second = machine.start("ray::RayWorkerProc")
    watch.look()
    assert first.wait(5) == second.wait(5) == KILLED
    assert (
        told(tmp_path)["killed"]["at"] > once["at"] and capsys.readouterr().err.count("killed 1 of its processes") == 1
    )


@pytest.mark.parametrize(("least", "gib"), [(0, 0), (4, 0)], ids=["never", "no rank"])
def test_nothing_to_kill_is_no_kill(least, gib, guard, machine, tmp_path):
    """With MEM_ABORT_GIB=0 the guard only looks. A host that is short of memory without a rank is none of its cases."""
    other = machine.start("raylet" if least else "ray::RayWorkerProc")
    watch = guard(least)
    machine.memory(gib)
    watch.look()
    assert other.poll() is None and told(tmp_path)["killed"] is None


@pytest.mark.parametrize(("status", "said"), [(0, ""), (-1, "its own memory is not locked: Operation not permitted")])
def test_memory_that_cannot_be_locked_is_said(status, said, script, monkeypatch, capsys):
    """The guard works without the lock. With the lock no page of it goes to the disk."""
    flags = []
    libc = SimpleNamespace(mlockall=lambda wanted: flags.append(wanted) or status)
    ctypes = SimpleNamespace(CDLL=lambda *_, **__: libc, get_errno=lambda: 1)
    monkeypatch.setattr(script, "ctypes", ctypes)
    script.lock_memory()
    assert flags == [7] and said in capsys.readouterr().err


def test_a_guard_that_dies_is_started_again(tmp_path):
    """start.sh becomes the program that it is given, and keeps a guard beside it."""
    for name, text in {
        "python3": '#!/bin/sh\necho "$@" >>$FOLDER/started\n',
        "sleep": "#!/bin/sh\nexec /bin/sleep 0.005\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    program = "echo $$; until [ $(wc -l <$FOLDER/started) -ge 3 ]; do /bin/sleep 0.005; done; kill -- -$$"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path)}
    (tmp_path / "started").touch()
    words = ["/bin/bash", ROOT / "cluster/inside/start.sh", "/bin/bash", "-c", program]
    child = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, process_group=0)
    assert child.communicate(timeout=20)[0] == f"{child.pid}\n"
    lines = (tmp_path / "started").read_text().splitlines()
    assert len(lines) >= 3 and set(lines) == {f"-IS {ROOT}/cluster/inside/memory_guard.py"}
