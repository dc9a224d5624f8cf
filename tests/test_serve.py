"""serve.sh, which starts, follows and ends the model's server in the head's container: here it runs on this machine."""

import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.command import run
from cluster.served import ask_server, server_runs
from cluster.server import stop_command

# Each test starts real processes and waits for them.
pytestmark = pytest.mark.rehearsal
SCRIPT = Path(__file__).resolve().parent.parent / "cluster/inside/serve.sh"
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs serve.sh with its files in tmp_path, and leaves no process behind.

    fed: through standard input, as `inv stop` does. A process that nobody reaps counts as running, and process 1 of a
    container may reap nothing: so this process adopts what the script leaves running, and reaps it.
    """
    env = {"PATH": os.environ["PATH"], "SERVE_PID": f"{tmp_path}/serve.pid", "SERVE_LOGS": str(tmp_path)}
    groups: list[int] = []
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)

    def run(*words: str, fed: bool = False, **more: str) -> subprocess.CompletedProcess:
        command = ["bash", "-s", *words] if fed else ["bash", str(SCRIPT), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with SCRIPT.open() if fed else open(os.devnull) as given:
            child = subprocess.Popen(command, env=env | more, stdin=given, process_group=0, **pipes)
        groups.append(child.pid)
        out, err = child.communicate(timeout=20)
        if words[0] == "start" and child.returncode == 0:
            groups.append(server(tmp_path))
            threading.Thread(target=_reap, args=(groups[-1],), daemon=True).start()
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    yield run
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        _reap(-group)
    prctl(PR_SET_CHILD_SUBREAPER, 0)


def _reap(which: int) -> None:
    with suppress(ChildProcessError):
        while True:
            os.waitpid(which, 0)


@pytest.fixture
def quick(tmp_path) -> str:
    """A PATH on which a pause takes 5 ms; each is counted in the file `slept`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sleep").write_text("#!/bin/sh\necho >>$SERVE_LOGS/slept\nexec /bin/sleep 0.005\n")
    (tmp_path / "bin/sleep").chmod(0o755)
    return f"{tmp_path}/bin:{os.environ['PATH']}"


def server(folder: Path) -> int:
    """The process id of the server that was started last."""
    return int((folder / "serve.pid").read_text())


def runs(pid: int) -> bool:
    """Whether a process with this id is there."""
    return Path(f"/proc/{pid}").exists()


def until(true: Callable[[], object]) -> bool:
    """Wait up to 10 s until something is true."""
    deadline = time.monotonic() + 10
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(now)


def test_a_server_is_on_its_own(serve, tmp_path):
    """`start` returns at once. The server has a session, a log and a pid file, and reads no standard input."""
    assert serve("start", "bash", "-c", "cat; echo $KEY; exec sleep 60", KEY="by name").returncode == 0
    pid = server(tmp_path)
    assert until(lambda: (tmp_path / "serve.log").read_text() == "by name\n")
    assert os.getsid(pid) == os.getpgid(pid) == pid


def test_a_second_server_is_refused(serve, tmp_path):
    """The server holds a lock while it runs, so two launches at the same time start one server."""
    serve("start", "sleep", "60")
    pid = server(tmp_path)
    refused = serve("start", "sleep", "61")
    assert refused.returncode == 1 and refused.stderr == "a server runs here already\n"
    assert server(tmp_path) == pid and (tmp_path / "serve.words").read_text() == "sleep\n60\n"
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: not runs(pid)) and serve("start", "sleep", "60").returncode == 0


def test_every_ranks_lines_are_in_the_log(serve, tmp_path):
    """Ray hides a rank's line if it differs from another rank's in numbers alone, unless it is told not to."""
    serve("start", "sh", "-c", "echo $RAY_DEDUP_LOGS; sleep 60")
    assert until(lambda: (tmp_path / "serve.log").read_text() == "0\n")


def test_a_new_server_begins_anew(serve, tmp_path):
    """The recorder's files of the last server are removed, and its log is kept as serve.log.1."""
    for name in ("vitals.json", "ended.json", "loading.json", "left.txt", "serve.log"):
        (tmp_path / name).write_text("of the server before")
    serve("start", "sleep", "60")
    assert (tmp_path / "serve.log.1").read_text() == "of the server before"
    assert {file.name for file in tmp_path.iterdir()} == {
        *("serve.log", "serve.log.1", "serve.pid", "serve.pid.lock", "serve.words")
    }


def test_the_log_is_cut_and_its_last_part_kept(serve, tmp_path):
    """The log stays small while the server runs, and serve.log.1 keeps the lines before the cut."""
    log, old = tmp_path / "serve.log", tmp_path / "serve.log.1"
    counts = "for n in {1..300}; do echo $n; done; exec sleep 60"
    serve("start", "bash", "-c", counts, SERVE_LOG_BYTES="500", SERVE_LOG_LOOK_S="0.02")
    assert until(lambda: old.exists() and log.stat().st_size < 500)
    kept = [int(line) for line in old.read_text().split()]
    assert old.stat().st_size >= 500 and kept == [*range(kept[0], kept[-1] + 1)]


def test_the_log_is_followed_to_the_servers_end(serve, tmp_path):
    """`follow` shows every line from the first, and ends with the server."""
    serve("start", "bash", "-c", "echo first; sleep 0.05; echo last")
    assert serve("follow").stdout == "first\nlast\n"


def test_the_state_tells_a_server_that_runs_from_one_that_ended(serve, tmp_path):
    """`state` prints whether the server runs, its start and its words. A stop deletes the words; a crash does not."""
    assert serve("state").stdout == ""
    serve("start", "sleep", "60", "0")
    runs_now, since, *words = serve("state").stdout.splitlines()
    assert runs_now == "0" and words == ["sleep", "60", "0"] and abs(int(since) - time.time()) < 20
    os.kill(server(tmp_path), signal.SIGKILL)
    assert until(lambda: serve("state").stdout.splitlines()[::2] == ["1", "sleep", "0"])
    serve("stop")
    assert serve("state", fed=True).stdout.splitlines() == ["1", since]


@pytest.mark.parametrize("fed", [False, True], ids=["mounted", "through standard input"])
def test_a_stop_ends_the_server(fed, serve, quick, tmp_path):
    """The server gets SIGTERM first and may clean up. A container without the mount reads the script from its input."""
    serve("start", "bash", "-c", "trap 'echo cleaned up; exit' TERM; echo ready; while :; do sleep 0.01; done")
    assert until(lambda: "ready" in (tmp_path / "serve.log").read_text())
    stopped = serve("stop", fed=fed, PATH=quick)
    assert (stopped.returncode, stopped.stderr) == (0, "") and not runs(server(tmp_path))
    assert "cleaned up" in (tmp_path / "serve.log").read_text() and not (tmp_path / "serve.words").exists()


def test_the_host_stops_a_server_without_the_mount(serve, operator, quick, tmp_path):
    """A container of an earlier version has no serve.sh, so the host's command sends the script along."""
    (tmp_path / "docker").write_text('#!/bin/bash\nuntil [ "$1" = /bin/bash ]; do shift; done; exec "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    operator.setenv("PATH", f"{tmp_path}:{quick}")
    operator.setenv("SERVE_PID", f"{tmp_path}/serve.pid")
    operator.setenv("SERVE_LOGS", str(tmp_path))
    serve("start", "sleep", "60", "0")
    head = SimpleNamespace(name="node-ray")
    assert ask_server(head).alive and ask_server(head).words == ("sleep", "60", "0")
    run(stop_command(), whole=True)
    assert not server_runs(head) and ask_server(head) is None and not runs(server(tmp_path))


def test_a_server_that_ignores_sigterm_is_killed(serve, quick, tmp_path):
    """`stop` kills the server after 30 s, and tells the operator."""
    serve("start", "bash", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done")
    assert until(lambda: "ready" in (tmp_path / "serve.log").read_text())
    stopped = serve("stop", PATH=quick)
    assert stopped.stderr == "still there after 30 s, killed\n" and len((tmp_path / "slept").read_text()) == 30
    assert until(lambda: not runs(server(tmp_path)))


def test_a_server_whose_first_process_is_gone_is_ended(serve, quick, tmp_path):
    """The other processes hold the GPU, so `stop` signals the whole process group."""
    serve("start", "bash", "-c", "sleep 60 & echo $!; kill -KILL $$")
    pid = server(tmp_path)
    assert until(lambda: not runs(pid))
    left = int((tmp_path / "serve.log").read_text())
    threading.Thread(target=_reap, args=(left,), daemon=True).start()
    assert serve("state").stdout.startswith("2\n") and runs(left)
    assert serve("stop", PATH=quick).returncode == 0 and until(lambda: not runs(left))


@pytest.mark.parametrize("recorded", [None, "4194305\n"], ids=["no server", "a server that has ended"])
def test_a_stop_of_nothing_does_not_claim_a_kill(recorded, serve, tmp_path):
    """`stop` reports no kill for a process id that no process has (4194305 is above the kernel's highest id)."""
    if recorded:
        (tmp_path / "serve.pid").write_text(recorded)
    stopped = serve("stop")
    assert stopped.returncode and "killed" not in stopped.stderr


@pytest.fixture
def recording(serve, tmp_path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs serve.sh beside this recorder, a Python script that has the server's process id in `server`."""
    shutil.copy(SCRIPT, tmp_path / "serve.sh")
    pid_file, env = str(tmp_path / "serve.pid"), {"PATH": os.environ["PATH"], "SERVE_LOGS": str(tmp_path)}

    def run(*words: str, script: str = "") -> subprocess.CompletedProcess:
        if script:
            (tmp_path / "recorder.py").write_text(f"import sys, time; print(*sys.argv[1:], flush=True); {script}")
        serve_sh = ["bash", str(tmp_path / "serve.sh"), *words]
        return subprocess.run(serve_sh, env=env | {"SERVE_PID": pid_file}, capture_output=True, text=True, check=True)

    yield run
    for name in ("serve.sh keep_recording", "recorder.py"):
        subprocess.run(["pkill", "-KILL", "-f", f"{tmp_path}/{name} "], check=False)


def recorders(folder: Path) -> list[int]:
    """The process ids of the recorders that run beside the server."""
    found = subprocess.run(
        ["pgrep", "-f", f"^[^ ]*python[^ ]* {folder}/recorder.py {folder}"], stdout=subprocess.PIPE, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def test_there_is_one_recorder(recording, tmp_path):
    """`record` kills an earlier recorder, which may be stuck. `inv memory` runs the same script and goes on."""
    (tmp_path / "serve.pid").write_text(f"{os.getpgid(0)}\n")
    recording("record", "http://before", "2", script="time.sleep(60)")
    assert until(lambda: recorders(tmp_path))
    (stuck,) = recorders(tmp_path)
    printing = subprocess.Popen(["python3", tmp_path / "recorder.py", "--print", "2"], stdout=subprocess.PIPE)
    assert printing.stdout.readline()
    recording("record", "http://head", "2")
    assert until(lambda: (tmp_path / "serve.log").read_text().endswith(f"{tmp_path} http://head 2\n"))
    assert stuck not in recorders(tmp_path) and len(recorders(tmp_path)) == 1
    assert printing.poll() is None
    printing.kill()
    printing.communicate()


def test_a_recorder_that_dies_is_started_again(serve, recording, tmp_path):
    """It is back within 5 s while the server runs. Once the server has ended, nothing starts it again."""
    serve("start", "sleep", "60")
    recording("record", "http://head", "2", script="time.sleep(60)")
    assert until(lambda: recorders(tmp_path))
    (dead,), begun = recorders(tmp_path), time.monotonic()
    os.kill(dead, signal.SIGKILL)
    assert until(lambda: (now := recorders(tmp_path)) and now != [dead]) and time.monotonic() - begun < 5
    os.kill(server(tmp_path), signal.SIGKILL)
    os.kill(*recorders(tmp_path), signal.SIGKILL)
    assert until(lambda: subprocess.run(["pgrep", "-f", f"{tmp_path}/serve.sh keep_recording"], check=False).returncode)
    assert recorders(tmp_path) == [] and recording("settle").stderr == ""


def test_the_wait_ends_with_the_recorder(serve, recording, tmp_path):
    """The recorder outlives the server until its ranks are gone. `settle` waits for it, and prints what is left."""
    assert recording("settle").stderr == ""
    serve("start", "sleep", "60")
    script = f"time.sleep(1); open('{tmp_path}/left.txt', 'w').write('10.0.0.2 still has ranks')"
    recording("record", "http://head", "2", script=script)
    assert until(lambda: recorders(tmp_path))
    os.kill(server(tmp_path), signal.SIGKILL)
    waiting, left = recording("settle").stderr.splitlines()
    assert waiting.startswith("waiting until no rank is left") and left == "10.0.0.2 still has ranks"
    assert recorders(tmp_path) == [] and recording("settle").stderr == ""


def test_a_fetch_happens_once_and_prints_the_commit(serve, tmp_path):
    """`hf download` notes the commit beside a whole file, which then stays as it is. Without the note it is fetched."""
    hf, folder = tmp_path / "hf", tmp_path / "parsers"
    noted = folder / ".cache/huggingface/download/parser.py.metadata"
    hf.write_text(f"""#!/bin/sh
mkdir -p {noted.parent}; echo asked >>{tmp_path}/asked; echo code >{folder}/$3; printf '%s\\n' $COMMIT 17 >{noted}
""")
    hf.chmod(0o755)
    words = ("fetch", str(hf), "download", "a/b", "parser.py", "--revision", "main", "--local-dir", str(folder))
    assert [serve(*words, COMMIT=commit).stdout for commit in ("0123abc", "new")] == ["0123abc\n"] * 2
    (folder / "parser.py").unlink()
    assert serve(*words, COMMIT="new").stdout == "new\n"
    noted.unlink()
    assert serve(*words, COMMIT="newer").stdout == "newer\n"
    assert (tmp_path / "asked").read_text().count("asked") == 3
    noted.unlink()
    hf.write_text("#!/bin/sh\nexit 3\n")
    assert (serve(*words).returncode, serve(*words).stdout) == (3, "")
