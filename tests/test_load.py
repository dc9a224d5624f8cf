"""A load that is followed: its phase by the server's own log, its expected time, and stuck told from slow."""

import json
import pty
import sys
import threading
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import load
from cluster.api import Answer
from cluster.load import EVERY_S, PHASES, Load, Phase, Progress
from cluster.models import find_model
from cluster.recorder import FRESH_S, LOAD
from cluster.settings import load_settings

BOTH = ("10.0.0.1", "10.0.0.2")
STAMP = "(EngineCore pid=7) INFO 01-02 03:04:05"
RANK = "(EngineCore pid=7) (RayWorkerWrapper pid=92, ip=10.0.0.2) INFO 01-02 03:04:05"
SHARDS = "Loading safetensors checkpoint shards: "
# Shapes of vLLM's own lines, V1 engine over Ray; beside each what is shown once it is read.
LINES = [
    ("(APIServer pid=1) INFO 01-02 03:04:05 [api_server.py:1] vLLM API server version 0.21.0", "start"),
    ("(APIServer pid=1) INFO 01-02 03:04:05 [model.py:1] Using max model len 1048576", "start"),
    (f"{STAMP} [core.py:1] Initializing a V1 LLM engine (v0.21.0) with config: model='m', seed=0", "ranks"),
    ("2026-01-02 03:04:05,678\tINFO worker.py:1 -- Connecting to existing Ray cluster at address: 10.0.0.1", "ranks"),
    (f"{RANK} [parallel_state.py:1] world_size=2 rank=1 local_rank=0 backend=nccl", "ranks"),
    (f"{RANK} [gpu_model_runner.py:1] Starting to load model m...", "weights"),
    (f"{RANK} [cuda.py:1] Enforce eager set, disabling torch.compile and CUDAGraphs.", "weights"),
    (f"{SHARDS}  0% Completed | 0/6 [00:00<?, ?it/s]", "weights 0%"),
    (f"{SHARDS} 50% Completed | 3/6 [00:05<00:04,  1.5s/it]", "weights 50%"),
    ("", "weights 50%"),
    (f"{SHARDS}100% Completed | 6/6 [00:09<00:00,  1.6s/it]", "weights 100%"),
    (f"{STAMP} [default_loader.py:1] Loading weights took 61.3 seconds", "weights 100%"),
    (f"{RANK} [gpu_model_runner.py:1] Model loading took 35.1 GiB memory and 62.1 seconds", "profiling"),
    (f"{STAMP} [gpu_model_runner.py:1] Starting to load model drafter...", "profiling"),
    (f"{STAMP} [backends.py:1] Dynamo bytecode transform time: 9.1 s", "compilation"),
    (f"{STAMP} [backends.py:1] Compiling a graph for dynamic shape takes 33.2 s", "compilation"),
    (f"{STAMP} [monitor.py:1] torch.compile takes 43.0 s in total", "compilation"),
    (f"{STAMP} [gpu_worker.py:1] Available KV cache memory: 46.4 GiB", "KV cache"),
    (f"{STAMP} [kv_cache_utils.py:1] GPU KV cache size: 10,009,134 tokens", "KV cache"),
    (f"{STAMP} [kv_cache_utils.py:1] Maximum concurrency for 1,048,576 tokens per request: 9.54x", "KV cache"),
    ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|██████████| 17/17", "graph capture 100%"),
    ("Capturing CUDA graphs (decode, FULL):  35%|███▌      | 6/17", "graph capture 35%"),
    (f"{STAMP} [gpu_model_runner.py:1] Graph capturing finished in 9 secs, took 0.49 GiB", "warm-up"),
    (f"{STAMP} [core.py:1] init engine (profile, create kv cache, warmup model) took 60.1 s", "warm-up"),
    ("(APIServer pid=1) INFO 01-02 03:04:05 [api_server.py:1] Starting vLLM server on http://0.0.0.0:8000", "warm-up"),
    ("(APIServer pid=1) INFO:     Application startup complete.", "API"),
    (f"{STAMP} [loggers.py:1] GPU KV cache usage: 0.0%, Prefix cache hit rate: 0.0%", "API"),
]


# --- Phases ----------------------------------------------------------------------------------------------------------


def test_each_line_shows_the_phase():
    """Each line of a whole load gives its phase, with the percent of the progress bar."""
    phase = Phase()
    assert [(line, phase.read(line), str(phase))[::2] for line, _ in LINES] == LINES


def test_a_new_phase_begins_once():
    """Only a line of a later phase begins a phase."""
    phase = Phase()
    told = [shown for line, shown in LINES if phase.read(line)]
    assert [shown.partition(" ")[0] for shown in told] == [name.partition(" ")[0] for name in list(PHASES)[1:]]


def test_a_load_may_lack_phases():
    """--enforce-eager skips compilation and capture. A line that only mentions compilation is no compilation."""
    phase, seen = Phase(), set()
    for line, _ in LINES:
        if "torch.compile takes" not in line and not line.startswith("Capturing") and "backends.py" not in line:
            phase.read(line)
            seen.add(phase.name)
    assert seen == PHASES.keys() - {"compilation", "graph capture"}


def test_phases_only_go_forward():
    """A late line of a slower rank changes neither the phase nor the percent."""
    phase = Phase()
    for line in (LINES[20][0], LINES[8][0], LINES[5][0], LINES[2][0]):
        phase.read(line)
    assert str(phase) == "graph capture 100%"


# --- What the operator sees ------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Two clocks that only a test moves, by `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    both = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1_700_000_000 + clock.now, sleep=lambda _: None)
    monkeypatch.setattr(load, "time", both)
    return clock


def test_off_a_terminal_a_line_every_30_seconds(clock, capsys):
    """Each new phase and every 30 s bring a line, so a log is short, and never silent for long."""
    shown = Progress("tiny", 90)
    for second in range(100):
        clock.now = 1000 + second
        shown.show("weights", new=second in (0, 40))
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"tiny: weights, {second} s, 90 s expected" for second in (0, 30, 40, 70)]
    assert out == "" and EVERY_S == 30


def test_the_time_of_a_load_counts_from_the_servers_start(clock, capsys):
    """Another terminal may have started the server. The first load of a model shows no expected time."""
    shown = Progress("tiny", since=1_700_000_000 + 880.0)
    shown.show("warm-up", new=True)
    assert (shown.seconds, capsys.readouterr().err) == (120, "tiny: warm-up, 120 s\n")


def _gone(*_):
    raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("both", [True, False], ids=["a terminal", "standard output to a file"])
def test_lines_of_the_log_go_above_the_line_that_changes(both, tmp_path, monkeypatch):
    """The line that changes breaks no line of the log, neither on the terminal nor in a file."""
    line = "[bold]100%[/] " + 60 * "long "
    terminal, end = pty.openpty()
    with open(end, "w") as screen, (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen if both else file)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        shown = Progress("tiny", 90)
        shown.show("weights [50%]")
        print(line)
        shown.stop()
    seen = ""
    with suppress(OSError), open(terminal, newline="") as master:  # which comes at the terminal's end
        while read := master.read(1):
            seen += read
    assert "tiny: weights [50%], 0 s, 90 s expected" in seen
    assert (line in seen, (tmp_path / "out").read_text()) == ((True, "") if both else (False, f"{line}\n"))


def test_a_terminal_that_is_lost_ends_no_load(clock):
    """If the terminal is lost, the wait for the load goes on."""
    shown = Progress("tiny")
    shown.live = SimpleNamespace(update=_gone, stop=_gone)
    shown.show("weights")
    shown.stop()


# --- How long a load takes -------------------------------------------------------------------------------------------


@pytest.fixture
def ready(settings, folder, clock, monkeypatch, capsys):
    """Follows a whole load that takes so many seconds; returns what was said."""
    monkeypatch.setattr(load, "stream", lambda _: nullcontext(iter(())))

    def follow(seconds, answered_before=False):
        monkeypatch.setattr(Load, "is_up", lambda _: answered_before)
        monkeypatch.setattr(Load, "wait_until_up", lambda _: setattr(clock, "now", clock.now + seconds))
        monkeypatch.setattr(Load, "warm_up", lambda one: one.progress.show("first request", new=True))
        load.follow_load(settings, BOTH)
        return capsys.readouterr().err

    return follow


def test_the_next_load_is_expected_to_take_as_long(ready, folder):
    """Each model on its nodes has its own time. A server that answered before was not loaded, and sets no time."""
    assert "expected" not in ready(500.04)
    assert "nemotron: first request, 480 s, 500 s expected\nReady after 480 s: API at " in ready(480.26)
    assert "It answers: API at http://10.0.0.1:8000/v1, model " in ready(7, answered_before=True)
    assert json.loads((folder / "ready.json").read_text()) == {"nemotron on 10.0.0.1, 10.0.0.2": {"seconds": 480.3}}


def test_a_file_of_times_that_cannot_be_used_fails_no_load(ready, folder):
    """A broken file is begun anew. Without the folder the next load only lacks its expected time."""
    (folder / "ready.json").write_text("{")
    assert "Ready after 7 s" in ready(7) and "7 s expected" in ready(8)
    (folder / "ready.json").unlink()
    folder.rmdir()
    assert "Ready after 9 s" in ready(9)


# --- Following a load ------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(operator, tmp_path):
    """A model's settings, with a folder for logs."""
    (tmp_path / "node-ray").mkdir()
    shell = {"CACHE_DIR": str(tmp_path), "ENV_FILE": "", "STALL_S": "600", "VLLM_API_KEY": "sk"}
    return load_settings(find_model("nemotron"), {}, shell)


@pytest.fixture
def folder(tmp_path, settings):
    """The folder of the server's log."""
    return tmp_path / "node-ray"


@pytest.fixture
def serving(monkeypatch):
    """Whether the server runs, by its container: `serving.now`, which a test may change."""
    found = SimpleNamespace(now=True)
    monkeypatch.setattr(load.guards, "running_node", lambda _: None)
    monkeypatch.setattr(load.served, "server_runs", lambda _: found.now)
    return found


@pytest.fixture
def loading(settings, folder, clock, serving, monkeypatch, capsys):
    """Follows a made-up load: its lines come at once, and the API is up after so many looks; returns what was said.

    over: `docker exec`, which shows the log, has ended.
    """

    def follow(lines=(), looks=3, over=False, stay=True):
        up = iter([False] * looks + [True])
        monkeypatch.setattr(Load, "is_up", lambda _: next(up))
        followed = Load(settings, iter(lines), Progress("nemotron"), stay)
        followed.reader.join()
        followed.reader = SimpleNamespace(is_alive=lambda: not over)
        followed.wait_until_up()
        return capsys.readouterr()

    return follow


def wrote(folder, quiet, age=1.0):
    """Write the recorder's last look, `age` seconds ago, at a load that had then been quiet for so long."""
    told = {"at": time.time() - age, "nodes": {}, "quiet": dict.fromkeys(LOAD, quiet), "silent": {}}
    (folder / "vitals.json").write_text(json.dumps(told))


def test_a_load_is_shown_as_it_goes(loading):
    """Each line of the log is printed unchanged, and each new phase adds a line. Then the API listens."""
    lines = [*(line for line, _ in LINES[:6]), "[bold]100%[/] {x}"]
    out, err = loading(lines)
    assert out.splitlines() == lines and err == "nemotron: weights, 0 s\n"
    assert loading(lines, stay=False).out == ""


def test_a_standard_output_that_nobody_reads_ends_only_the_view(loading, monkeypatch):
    """The server runs on, and the message says so."""
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=_gone, flush=_gone, isatty=lambda: False))
    with pytest.raises(Exit, match="The server runs on"):
        loading(["more"])


def test_a_server_that_ends_is_not_waited_for(loading, serving):
    """The message has the last lines of the log, and the command that shows all lines."""
    serving.now = False
    lines = [f"line {number}" for number in range(30)]
    with pytest.raises(Exit, match="The server has ended") as ended:
        loading(lines, looks=9, over=True)
    assert "  line 18\n" in ended.value.message and "line 17" not in ended.value.message
    assert "  line 29\nType: inv logs" in ended.value.message


GUARDED = {"at": 1.0, "why": "ended by the memory guard: 10.0.0.2 had 3.9 GiB", "by": "memory guard"}
LOW = "The server was ended by the memory guard: 10.0.0.2 had 3.9 GiB."


def test_a_load_that_the_memory_guard_ended_says_so(loading, serving, folder):
    """The message has the node and its memory. The next server needs a lower GPU_MEM_UTIL."""
    serving.now = False
    (folder / "ended.json").write_text(json.dumps(GUARDED))
    with pytest.raises(Exit, match=f"^{LOW} The last lines of its log:\n") as ended:
        loading(["line"], looks=9, over=True)
    assert ended.value.message.endswith("inv up --model NAME, with a lower GPU_MEM_UTIL")


def test_a_server_that_has_just_ended_is_told_with_its_reason(loading, serving, folder, monkeypatch):
    """vLLM may end before the recorder has asked the guard that killed a rank. The follower waits for that look."""
    told = {"at": time.time(), "nodes": {}, "quiet": {}, "silent": {}, "floor": 5}
    (folder / "vitals.json").write_text(json.dumps(told | {"alive": True}))

    def sleep(_):
        (folder / "ended.json").write_text(json.dumps(GUARDED))
        (folder / "vitals.json").write_text(json.dumps(told | {"alive": False}))

    serving.now = False
    monkeypatch.setattr(load.time, "sleep", sleep)
    with pytest.raises(Exit, match=f"^{LOW}"):
        loading(["line"], looks=9, over=True)


def test_the_log_may_end_before_the_server(loading):
    """If `docker exec` has ended and the server runs, the wait for the load goes on."""
    out, err = loading([LINES[5][0]], looks=9, over=True)
    assert out == f"{LINES[5][0]}\n" and "ended" not in err


def test_a_load_in_which_nothing_moves_is_stuck(loading, folder):
    """The message names the phase and the next command. `up` fails; `launch` prints the message once and goes on."""
    wrote(folder, quiet=700)
    with pytest.raises(Exit, match=r"^STUCK in weights: for 600 s \(STALL_S\) .* Look: inv logs$"):
        loading([LINES[5][0]], looks=9, stay=False)
    said = loading([LINES[5][0]], looks=9).err
    assert said.count("STUCK in weights") == 1 and said.count(" To end it: inv stop\n") == 1


@pytest.mark.parametrize(("quiet", "age"), [(599, 1), (9999, FRESH_S + 2), (None, 0)], ids=["slow", "stale", "nothing"])
def test_a_load_without_a_fresh_look_is_not_stuck(quiet, age, loading, folder):
    """A slow load, an old look of the recorder, or no recorder: the wait for the load goes on."""
    if quiet:
        wrote(folder, quiet, age)
    assert "STUCK" not in loading().err


@pytest.mark.parametrize(("age", "said"), [(1, 0), (FRESH_S + 2, 1), (None, 1)], ids=["fresh", "stale", "nothing"])
def test_a_load_without_a_recorder_is_warned_of(age, said, loading, folder, monkeypatch):
    """The warning comes once, after the recorder has had time to reach every node."""
    monkeypatch.setattr(load, "RECORDER_S", -1)
    if age:
        wrote(folder, 0, age)
    assert loading().err.count("so nothing watches the nodes. Look: inv logs") == said


@pytest.fixture
def first_request(settings, serving, monkeypatch, capsys):
    """Sends the first request to a made-up server, which answers after a look at its log."""
    asked, looked = [], threading.Event()

    def send(answer, over=False):
        monkeypatch.setattr(load, "generate_token", lambda *words: (asked.append(words), looked.wait(5), answer)[-1])
        followed = Load(settings, iter(["killed"]), Progress("nemotron"), stay=True)
        followed.reader.join()
        followed.reader = SimpleNamespace(is_alive=lambda: looked.set() or not over)
        followed.warm_up()
        return asked[0], capsys.readouterr().err

    return send


def test_the_first_request_is_part_of_the_load(first_request):
    """The first request compiles kernels. The server counts as ready after the answer to this request."""
    asked, said = first_request(Answer(200, "{}", 49.0))
    assert asked == ("http://127.0.0.1:8000", "sk", 1800) and said == "nemotron: first request, 0 s\n"


def test_a_first_request_that_is_refused_fails(first_request):
    """The message has the answer and the next command."""
    with pytest.raises(Exit, match="answered 500: no kernel image\nType: inv health"):
        first_request(Answer(500, "no kernel image", 0.1))


def test_a_first_request_that_the_memory_guard_cut_off_says_so(first_request, folder):
    """The connection ends with the server, and that is not the cause."""
    (folder / "ended.json").write_text(json.dumps(GUARDED))
    with pytest.raises(Exit, match=f"^{LOW}\nType: inv logs, inv memory; then: inv up --model NAME, with a lower"):
        first_request(Answer(None, "Remote end closed connection", 0.1))


def test_a_first_request_outlives_the_log(first_request):
    """The wait ends with the server, and not with the `docker exec` that shows the log."""
    assert "first request" in first_request(Answer(200, "{}", 49.0), over=True)[1]


def test_a_server_that_ends_at_the_first_request_fails(first_request, serving):
    """The message has the last lines of the log."""
    serving.now = False
    with pytest.raises(Exit, match=r"The server has ended.*\n  killed\n"):
        first_request(Answer(200, "{}", 0.1), over=True)
