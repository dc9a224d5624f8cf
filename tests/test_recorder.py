"""The recorder beside the server: it sees what moves on every node, and ends a server of which a guard killed ranks."""

import ctypes
import http.client
import importlib
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cluster.recorder import LOAD, Recorded
from cluster.repository import ROOT

GIB = 2**30
BOTH = ("10.0.0.1", "10.0.0.2")
SERVER = 77


class Late:
    """An answer that does not come in time."""


def fake_ray(wait=lambda *_, **__: None, nodes=()):
    """Return a Ray in which an actor is its class, and an answer is its value unless it is late."""

    def get(answer, timeout):
        if isinstance(answer, Late):
            raise TimeoutError("Get timed out")
        return answer

    made = ModuleType("ray")
    made.wait, made.get, made.nodes, made.init = wait, get, lambda: nodes, lambda **_: None
    made.remote = lambda **_: (
        lambda actor: SimpleNamespace(
            options=lambda scheduling_strategy: SimpleNamespace(remote=lambda *_: (actor, scheduling_strategy))
        )
    )
    return made


class Psutil(ModuleType):
    """A psutil that shows the processes, memory and links that a test puts in."""

    def __init__(self):
        super().__init__("psutil")
        self.processes, self.links, self.gone = {}, {}, set()

    def add(self, pid, name, spent, parent=1, collected=0):
        """Add a process that took so many seconds, with children that took `collected` and ended."""
        times = (spent * 0.75, spent * 0.25, collected * 0.75, collected * 0.25, 99.0)
        self.processes[pid] = {"name": name, "ppid": parent, "cpu_times": times}

    def process_iter(self, attrs):
        """Return the processes, as psutil does; one that ends meanwhile is left out by psutil itself."""
        assert {"name"} <= {*attrs} <= {"name", "ppid", "cpu_times"}
        return [SimpleNamespace(pid=pid, info=info) for pid, info in self.processes.items()]

    def pid_exists(self, pid):
        """Return whether the process lives, which every process does that is not in `gone`."""
        return pid not in self.gone

    def net_if_stats(self):
        """Return the links by name."""
        return {name: SimpleNamespace(isup=up) for name, up in self.links.items()}


@pytest.fixture(scope="module")
def real():
    """The script itself, imported where neither Ray nor psutil is installed."""
    scheduling = ModuleType("ray.util.scheduling_strategies")
    scheduling.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)
    stubs = {"ray": fake_ray(), "ray.util": ModuleType("ray.util"), scheduling.__name__: scheduling}
    with pytest.MonkeyPatch.context() as now:
        now.syspath_prepend(ROOT / "cluster/inside")
        now.setattr(sys, "dont_write_bytecode", True)
        for name, stub in (stubs | {"psutil": Psutil()}).items():
            now.setitem(sys.modules, name, stub)
        yield importlib.import_module("recorder")
    for name in ("recorder", "every"):
        del sys.modules[name]


class Clock:
    """Both clocks: `sleep` moves them and nothing waits; `step` sets the one that a person reads."""

    def __init__(self):
        self.at, self.stepped = 1000.0, 1_700_000_000.0

    def monotonic(self):
        """Return seconds that only go forward."""
        return self.at

    def time(self):
        """Return seconds since 1970, as the machine believes."""
        return self.at + self.stepped

    def sleep(self, seconds):
        """Go forward."""
        self.at += seconds

    def step(self, seconds):
        """Do what a time server does to a machine whose clock is wrong."""
        self.stepped += seconds


@pytest.fixture
def clock():
    """Time as a test makes it."""
    return Clock()


# What a memory guard has written.
LINE = {"at": 1_700_001_000.0, "available": 2048 * 1024, "free": 1024, "cached": 512, "swap": 0, "lowest": 2048 * 1024}
LINE["killed"] = None


@pytest.fixture
def recorder(real, clock, monkeypatch, tmp_path):
    """The script in that time, without threads, on a machine without processes, links and nvidia-smi."""
    (tmp_path / "memory").write_text(json.dumps(LINE).ljust(399) + "\n")
    monkeypatch.setattr(real, "GUARD", str(tmp_path / "memory"))
    monkeypatch.setattr(real, "time", clock)
    monkeypatch.setattr(real, "threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=lambda: None)))
    monkeypatch.setattr(real, "psutil", Psutil())
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_IB_HCA"):
        monkeypatch.delenv(name, raising=False)
    return real


@pytest.fixture
def still(recorder):
    """What has moved, at the start of a server."""
    return recorder.Stillness()


# --- What does not move ----------------------------------------------------------------------------------------------


def after(clock, look, values, *least, every=1.0):
    """For how long a thing was still after each of these values, so many seconds apart."""
    found = []
    for value in values:
        look("thing", value, *least)
        found.append(look.__self__.seconds()["thing"])
        clock.sleep(every)
    return found


def test_a_change_that_is_large_enough_is_a_move(clock, recorder):
    """The change may go up or down, in one step or in several. A slow change counts when it is large enough."""
    assert after(clock, recorder.Stillness().see, [100, 101, 109, 110, 119, 90], 10) == [0, 1, 2, 0, 1, 0]
    assert after(clock, recorder.Stillness().see, [0, 0, 1, 1], 1) == [0, 1, 0, 1]


def test_a_thing_that_cannot_be_seen_is_not_still(clock, recorder):
    """A node that does not answer is no sign of a hang. The count starts again when the node answers."""
    looks = [100, 100, None, None, 100, 100, 100]
    assert after(clock, recorder.Stillness().see, looks, 10) == [0, 1, 0, 0, 0, 1, 2]
    assert after(clock, recorder.Stillness().see_cpu, [7.0, 7.0, None, 7.0, 7.0], every=5) == [0, 5, 0, 0, 5]


def test_a_processor_is_busy_by_its_share(clock, recorder):
    """A tenth of one processor over some seconds is work. An idle rank stays below, and one moment is too short."""
    assert (recorder.CPU_S, recorder.BUSY_CPU) == (4, 0.1)
    assert after(clock, recorder.Stillness().see_cpu, [n * 0.09 for n in range(11)])[-1] == 8
    assert after(clock, recorder.Stillness().see_cpu, [n * 0.11 for n in range(11)])[-3:] == [0, 0, 0]
    assert after(clock, recorder.Stillness().see_cpu, [0, *[0.3] * 8])[-1] == 8


def test_a_process_that_ended_has_worked(clock, still):
    """The sum loses the seconds of the ended process, and any such change counts as a move."""
    assert after(clock, still.see_cpu, [50.0, 50.0, 3.0], every=5) == [0, 5, 0]


def test_a_thing_is_still_until_it_moves(clock, still):
    """The count grows without a limit, and the first move resets it."""
    assert after(clock, still.see_cpu, [1.0] * 100 + [9.0], every=5)[99:] == [495, 0]


def test_a_clock_that_is_set_is_no_hang(clock, still):
    """A change of the machine's clock does not count as seconds without a move."""
    after(clock, still.see_cpu, [1.0, 3.0, 5.0, 7.0, 9.0])
    clock.step(3600)
    assert after(clock, still.see_cpu, [11.0])[-1] < 10


# --- What a node does ------------------------------------------------------------------------------------------------


def test_ranks_are_known_by_their_titles(recorder):
    """Both executors of vLLM give a rank such a title. psutil may cut it at 15 letters. No other program has one."""
    names = ("ray::RayWorkerWrapper.execute", "ray::RayWorkerP", "ray::IDLE", "ray::Gauge.look", "raylet", "python3")
    for number, name in enumerate(names):
        recorder.psutil.add(10 + number, name, spent=1.5)
    told = recorder.Gauge().look()
    assert told == LINE | {"ranks": 2, "cpu": 3.0, "compilers": 0, "gpu": None, "down": [], "downloaded": None}


def test_a_download_is_told_with_its_bytes(recorder, tmp_path, monkeypatch):
    """While a file is under way the whole model counts: what has its name, and what has not."""
    monkeypatch.setattr(recorder, "HUB", str(tmp_path))
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    (blobs / "done").write_bytes(b"0" * 70)
    gauge = recorder.Gauge("a/b")
    assert gauge.downloaded() is None
    (blobs / "next.1234.incomplete").write_bytes(b"0" * 7)
    assert gauge.downloaded() == 77


@pytest.mark.parametrize("age", [2.1, -2.1, None])
def test_a_guard_that_does_not_write_makes_the_memory_unknown(age, recorder, clock, monkeypatch):
    """An old line is no answer, because the memory may have changed since. Nobody else reads the memory."""
    if age is None:
        monkeypatch.setattr(recorder, "GUARD", "/nowhere")
    else:
        clock.stepped += age
    for ask in (recorder.Gauge().memory, recorder.Gauge().look):
        with pytest.raises((TimeoutError, FileNotFoundError)):
            ask()


def test_a_rank_that_waits_for_its_compiler_works(recorder):
    """At the first request a rank waits for programs that compile kernels. That wait is no hang."""
    recorder.psutil.add(12, "cicc", parent=11, spent=60)
    recorder.psutil.add(11, "ninja", parent=10, spent=0.5, collected=20)
    recorder.psutil.add(10, "ray::RayWorkerW", spent=1)
    told = recorder.Gauge().look()
    assert (told["ranks"], told["cpu"], told["compilers"]) == (1, 81.5, 80.5)


def test_a_compiler_is_known_by_its_name(recorder):
    """A rank that spins, its other children, and somebody else's compiler do not count. Compilers that ended do."""
    recorder.psutil.add(10, "ray::RayWorkerP", spent=1000, collected=3)
    recorder.psutil.add(11, "python3", parent=10, spent=500)
    recorder.psutil.add(12, "cc1plus", parent=1, spent=50)
    assert recorder.Gauge().look()["compilers"] == 3
    recorder.psutil.add(13, "ptxas", parent=10, spent=2)
    recorder.psutil.add(15, "sh", parent=13, spent=1)
    assert recorder.Gauge().look()["compilers"] == 6


def test_links_that_are_not_up_are_reported(recorder, monkeypatch):
    """Each link that either variable names is reported once. A missing link is not up."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "one,two")
    monkeypatch.setenv("TP_SOCKET_IFNAME", "three,two,")
    recorder.psutil.links = {"one": True, "two": False, "other": False}
    assert recorder.Gauge().look()["down"] == ["three", "two"]


def test_the_other_half_of_a_port_is_reported(recorder, monkeypatch):
    """A RoCE device carries data even if its interface has no address, so its link counts, once."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "one")
    monkeypatch.setenv("NCCL_IB_HCA", "mlx0,mlx1,,mlx2")
    halves = {f"/sys/class/infiniband/mlx{n}/device/net/*": [f"/x/{name}"] for n, name in ((0, "one"), (1, "two"))}
    monkeypatch.setattr(recorder, "glob", SimpleNamespace(glob=lambda pattern: halves.get(pattern, [])))
    recorder.psutil.links = {"one": True}
    gauge = recorder.Gauge()
    assert (gauge.interfaces, gauge.look()["down"]) == (["one", "two"], ["two"])


@pytest.fixture
def smi(recorder, monkeypatch):
    """Runs a made-up nvidia-smi: `plays` is its output, or what is raised; `calls` what it was called with."""
    made = SimpleNamespace(plays="", calls=[], SubprocessError=subprocess.SubprocessError)

    def run(words, **options):
        made.calls.append(options)
        if isinstance(made.plays, Exception):
            raise made.plays
        return SimpleNamespace(stdout=made.plays)

    made.run = run
    monkeypatch.setattr(recorder, "subprocess", made)
    return made


def ended(*_, **__):
    """Ends a loop that has no end."""
    raise StopIteration


@pytest.mark.parametrize(
    ("plays", "percent"),
    [
        *(("7\n", 7), ("97\n3\n", 97), ("", None), ("[N/A]\n", None)),
        *((FileNotFoundError(2, "No such file"), None), (subprocess.TimeoutExpired("nvidia-smi", 3), None)),
    ],
)
def test_a_gpu_without_a_figure_is_unknown(plays, percent, smi, recorder, clock, monkeypatch):
    """An unknown GPU is not an idle GPU. nvidia-smi has 5 s to answer."""
    smi.plays = plays
    monkeypatch.setattr(clock, "sleep", ended)
    gauge = recorder.Gauge()
    gauge.gpu = 50
    with pytest.raises(StopIteration):
        gauge.follow_gpu()
    assert gauge.look()["gpu"] == percent
    assert smi.calls[0]["timeout"] == recorder.GPU_S == 5


def test_the_gpu_is_read_in_a_thread_of_its_own(smi, recorder, clock, monkeypatch):
    """nvidia-smi runs every 5 s, because it is slow, and never during a look at the memory."""
    gauge, smi.plays, looks = recorder.Gauge(), "7\n", [recorder.Gauge().look()["gpu"]]
    monkeypatch.setattr(recorder, "STALE_S", 60)

    def sleep(seconds):
        looks.append(gauge.look()["gpu"])
        clock.at += seconds
        if clock.at > 1010:
            raise StopIteration

    monkeypatch.setattr(clock, "sleep", sleep)
    with pytest.raises(StopIteration):
        gauge.follow_gpu()
    assert looks == [None, 7, 7, 7] and len(smi.calls) == 3


def test_an_old_figure_of_a_gpu_is_unknown(recorder, monkeypatch):
    """While nvidia-smi runs the figure before is not used, because the driver may hang."""
    gauge = recorder.Gauge()
    gauge.gpu = 97
    made = SimpleNamespace(run=ended, SubprocessError=subprocess.SubprocessError)
    monkeypatch.setattr(recorder, "subprocess", made)
    with pytest.raises(StopIteration):
        gauge.follow_gpu()
    assert gauge.look()["gpu"] is None


def test_a_driver_that_hangs_is_no_lost_node(recorder, monkeypatch):
    """A node answers a look even while nvidia-smi hangs. Otherwise its memory would not be guarded."""
    hangs = threading.Event()
    made = SimpleNamespace(SubprocessError=subprocess.SubprocessError)
    made.run = lambda *_, **__: hangs.set() or threading.Event().wait()
    monkeypatch.setattr(recorder, "threading", threading)
    monkeypatch.setattr(recorder, "subprocess", made)
    gauge = recorder.Gauge()
    assert hangs.wait(5) and gauge.look()["gpu"] is None


def test_a_gauge_is_on_each_node_that_is_alive(recorder, monkeypatch):
    """Each gauge is pinned to its node, and its node's address is its key."""
    nodes = [{"NodeManagerAddress": at, "NodeID": at[-1], "Alive": True} for at in BOTH]
    nodes.append({"NodeManagerAddress": "10.0.0.3", "NodeID": "3", "Alive": False})
    for module in (recorder, recorder.every):
        monkeypatch.setattr(module, "ray", fake_ray(nodes=nodes))
    monkeypatch.setattr(recorder, "ask", lambda *_: None)
    assert recorder.start_gauges() == {at: (recorder.Gauge, (at[-1], False)) for at in BOTH}


def test_a_node_that_does_not_answer_is_none(recorder, monkeypatch):
    """All nodes are asked at once and share one time limit. The answers of the other nodes count."""
    waited = []
    monkeypatch.setattr(recorder.every, "ray", fake_ray(wait=lambda asked, **options: waited.append((asked, options))))
    late = Late()
    gauges = {
        at: SimpleNamespace(look=SimpleNamespace(remote=lambda said=said: said))
        for at, said in zip(BOTH, (late, 5), strict=True)
    }
    assert recorder.ask(gauges, "look") == {"10.0.0.1": None, "10.0.0.2": 5}
    assert waited == [([late, 5], {"num_returns": 2, "timeout": 3})]


def cached(file):
    """How many pages of a file are in the page cache, by mincore(2)."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages, place = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))(), ctypes.c_char.from_buffer(mapped)
        mincore = ctypes.CDLL(None).mincore
        mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        assert mincore(ctypes.addressof(place), len(mapped), pages) == 0
        del place
    return sum(page & 1 for page in pages)


@pytest.fixture(params=["a folder", "Hugging Face"])
def shards(request, recorder, tmp_path, monkeypatch):
    """Three shards of the model a/model in the page cache, of 64 pages each; returns the model and the files."""
    hub = tmp_path / "hub/models--a--model/snapshots/abc"
    hub.mkdir(parents=True)
    monkeypatch.setattr(recorder, "HUB", str(tmp_path / "hub"))
    files = [tmp_path / f"model-{number}.safetensors" for number in (1, 2, 3)]
    for file in [*files, tmp_path / "other"]:
        file.write_bytes(os.urandom(64 * mmap.PAGESIZE))
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # only a page that is on the disk can be dropped
            if file.name == "other":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        (hub / file.name).symlink_to(file)
    if cached(tmp_path / "other"):
        pytest.skip("the disk of this folder is the memory")
    return str(tmp_path) if request.param == "a folder" else "a/model", files


def test_shards_that_were_read_leave_the_page_cache(shards, recorder):
    """A shard in use and a shard that is still to be read stay. This process is the rank here."""
    model, files = shards
    recorder.psutil.add(os.getpid(), "ray::RayWorkerP", 0)
    gauge = recorder.Gauge()
    gauge.evict(model)
    assert [cached(file) for file in files] == [64, 64, 64]
    with files[1].open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    gauge.evict(model)
    assert [cached(file) for file in files] == [0, 64, 64]
    mapped.close()
    with files[2].open("rb"):
        gauge.evict(model)
    assert [cached(file) for file in files] == [0, 0, 64]
    gauge.evict(model)
    assert [cached(file) for file in files] == [0, 0, 0]


def test_without_a_view_of_a_ranks_files_nothing_is_evicted(shards, recorder):
    """A shard that cannot be seen to be unused may be in use."""
    model, files = shards
    recorder.psutil.add(10**9, "ray::RayWorkerP", 0)
    gauge = recorder.Gauge()
    gauge.last = 2
    with pytest.raises(FileNotFoundError):
        gauge.evict(model)
    assert [cached(file) for file in files] == [64, 64, 64]


# --- The API's counters ----------------------------------------------------------------------------------------------


@pytest.fixture
def followed(recorder, clock, monkeypatch):
    """Reads a made-up page of metrics as often as there are answers; returns the counters' seconds after each."""

    def follow(*answers):
        left, seen, pauses = list(answers), [], []

        def opened(*_, **__):
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer.encode())

        def sleep(seconds):
            seen.append(counters.seconds())
            pauses.append(seconds)
            clock.at += 15
            if not left:
                raise StopIteration

        opener = SimpleNamespace(ProxyHandler=dict, build_opener=lambda _: SimpleNamespace(open=opened))
        monkeypatch.setattr(recorder, "urllib", SimpleNamespace(request=opener, error=urllib.error))
        monkeypatch.setattr(clock, "sleep", sleep)
        counters = recorder.Counters("http://head")
        assert counters.seconds() == {"counters": 0, "waiting": 0}
        with pytest.raises(StopIteration):
            counters.follow()
        told = {name: [told[name] for told in seen] for name in ("counters", "waiting")}
        return SimpleNamespace(**told, pauses=pauses, running=counters.running, answered=counters.answered)

    return follow


def page(tokens=7, running=0, waiting=0, processor=1, answered=0):
    """The metrics of a server with so many requests, on the second of its engines. answered: how many it answered."""
    return f"""vllm:request_success_total{{engine="0",finished_reason="stop",model_name="tiny"}} 0.0
vllm:request_success_total{{engine="1",finished_reason="length",model_name="tiny"}} {answered}.0
vllm:request_success_created{{engine="1",finished_reason="length",model_name="tiny"}} 1.7822e+09
vllm:num_requests_running{{engine="0"}} 0.0
vllm:num_requests_running{{engine="1"}} {running}.0
vllm:num_requests_waiting{{engine="1"}} {waiting}.0
vllm:prompt_tokens_total{{engine="1"}} {tokens}
process_cpu_seconds_total {processor}
"""


REFUSED, LATE = ConnectionRefusedError(111, "Connection refused"), TimeoutError("timed out")


def test_counters_that_change_have_moved(followed):
    """Tokens, answers and the KV cache count. Other samples do not, however many requests wait."""
    pages = [(7, 0, 1), (7, 1, 1), (7, 2, 2), (8, 2, 2), (8, 0, 3)]
    told = followed(*(page(tokens, running, processor=spent) for tokens, running, spent in pages))
    assert told.counters == [0, 15, 30, 0, 15]
    caches = [f"vllm:{name}_cache_usage_perc 0.{part}\n" for name in ("kv", "gpu") for part in (1, 2)]
    assert followed(*(page() + cache for cache in caches)).counters == [0, 0, 0, 0]
    assert followed(*(page(answered=answers) for answers in (3, 4, 4))).counters == [0, 0, 15]


def test_the_first_answer_is_known_by_the_servers_own_count(followed):
    """A recorder that was started again knows it, too. The metrics that say when a count began are not counts."""
    assert not followed(page(running=1)).answered and followed(page(answered=1)).answered
    told = followed(page(running=2, answered=1), LATE)
    assert told.answered and told.running == 2


def test_counters_that_move_are_read_more_often(followed):
    """Each reading is a line in the server's log, which a server that idles or hangs must not fill."""
    told = followed(*(page(tokens, running=1) for tokens in (1, 2, 3, 3, 3, 3)))
    assert told.pauses == [2, 2, 2, 7.5, 15, 15] and told.counters == [0, 0, 0, 15, 30, 45]


def test_no_request_waits_for_an_idle_server(followed):
    """An idle server answers, its counters stand still, and no wait is counted."""
    told = followed(*[page()] * 99)
    assert (told.waiting, told.counters[-1]) == ([0] * 99, 98 * 15)


@pytest.mark.parametrize("asked", [{"running": 1}, {"waiting": 1}, {"running": 1, "waiting": 2}])
def test_a_wait_begins_after_the_last_idle_look(asked, followed):
    """A request that runs or waits starts the count. Time before does not count, and an idle look ends the count."""
    told = followed(*[page()] * 9, *[page(**asked)] * 3, page(), page(**asked))
    assert told.waiting[8:] == [0, 15, 30, 45, 0, 15]


def test_requests_that_are_served_wait_and_move(followed):
    """On a busy server a request always waits. This is no hang, because the counters move."""
    told = followed(*(page(tokens, running=1) for tokens in range(5)))
    assert (told.counters, told.waiting) == ([0] * 5, [0, 15, 30, 45, 60])


def test_a_server_that_does_not_answer_lets_requests_wait(followed):
    """The server may be starting, hung or gone. Its counters stand still, and are read again later."""
    told = followed(REFUSED, REFUSED, REFUSED, page())
    assert (told.counters, told.waiting) == ([0, 15, 30, 0], [0, 15, 30, 0])
    told = followed(page(running=1), LATE, LATE, page(running=1), page(8, running=1))
    assert (told.counters, told.waiting) == ([0, 15, 30, 45, 0], [0, 15, 30, 45, 60])
    told = followed(page(), LATE, LATE, page(), LATE)
    assert (told.counters, told.waiting) == ([0, 15, 30, 45, 60], [0, 15, 30, 0, 15])


def test_a_server_that_refuses_its_metrics_lets_no_request_wait(followed):
    """The server answers, so no wait is counted, and the next request cannot look like a hang."""
    refusal = urllib.error.HTTPError("http://head/metrics", 404, "none here", {}, io.BytesIO())
    assert followed(*[refusal] * 9).waiting == [0] * 9


def test_half_an_answer_does_not_end_the_reading(followed):
    """If the reading ended, the counters would stand still from then on."""
    half, none = http.client.IncompleteRead(b"vllm"), http.client.BadStatusLine("TLS")
    odd = "vllm:num_requests_running many\n"
    told = followed(page(running=1), half, none, odd, page(8))
    assert (told.counters, told.waiting) == ([0, 15, 30, 45, 0], [0, 15, 30, 45, 0])


# --- All nodes together ----------------------------------------------------------------------------------------------


def node(**other):
    """What a node's gauge says while the node idles."""
    memory = LINE | {"available": 20 * GIB, "lowest": other.get("available", 20 * GIB)}
    return memory | {"ranks": 1, "cpu": 5.0, "compilers": 0, "gpu": 0, "down": [], "downloaded": None} | other


def two(**other):
    """A look at two nodes, the second as `other` says."""
    return {BOTH[0]: node(), BOTH[1]: node(**other)}


@pytest.fixture
def noted(still, clock, tmp_path):
    """Notes these looks, 5 s apart; returns for how long each thing was still at the last of them."""

    def note(*looks):
        for told in looks:
            clock.sleep(5)
            still.note(told, SERVER, str(tmp_path / "serve.log"))
        return still.seconds()

    return note


def moved(found):
    """The things that were not still."""
    return {name for name, seconds in found.items() if not seconds}


def work():
    """All things that `health` may look at while requests are answered."""
    return {thing for answered in (False, True) for thing in Recorded({}, {}, answered=answered).work}


def test_a_cluster_on_which_nothing_moves_is_still(noted):
    """Everything that `health` judges is noted. On idle nodes it stands still, even without a log or a server."""
    found = noted(*[two()] * 5)
    nodes = {f"{thing} {address}" for thing in ("cpu", "compiler", "memory", "download") for address in BOTH}
    assert set(found) == {*nodes, "gpu", "log", "server_cpu", "api_cpu"} and set(found.values()) == {20}
    assert {*work(), *LOAD} - {name.partition(" ")[0] for name in found} == {"counters"}


@pytest.mark.parametrize(
    ("things", "last"),
    [
        ({"memory 10.0.0.2"}, two(available=20 * GIB - 64 * 2**20)),
        ({"cpu 10.0.0.2"}, two(cpu=5.5)),
        ({"cpu 10.0.0.2"}, two(cpu=1.0)),
        ({"compiler 10.0.0.2"}, two(compilers=0.5)),
        ({"gpu"}, two(gpu=5)),
        ({"download 10.0.0.2"}, two(downloaded=1)),
        ({"cpu 10.0.0.2", "memory 10.0.0.2"}, {BOTH[0]: node(), BOTH[1]: None}),
    ],
    ids=["memory", "cpu", "rank ended", "compiler", "gpu", "download", "no answer"],
)
def test_one_node_that_moves_is_noted(things, last, noted):
    """A move of one node is enough. A node that does not answer counts as still for its compilers alone."""
    found = noted(*[two()] * 4, last)
    assert moved(found) == things and {found[name] for name in set(found) - things} == {20}
    assert {Recorded(last, found).quiet(name.partition(" ")[0]) for name in things} == {0}


def test_a_node_that_does_not_answer_hides_no_other(noted):
    """Each node is compared with itself, and not with a sum over all nodes."""
    silent = {BOTH[0]: node(cpu=9.0), BOTH[1]: None}
    assert moved(noted(two(), silent)) >= {"cpu 10.0.0.1", "cpu 10.0.0.2"}
    found = noted(silent, silent)
    assert moved(found) == {"cpu 10.0.0.2", "memory 10.0.0.2"} and found["cpu 10.0.0.1"] == 10


@pytest.mark.parametrize(
    "last",
    [
        *(two(available=20 * GIB - 63 * 2**20), two(cpu=5.45), dict.fromkeys(BOTH, node(cpu=5.45))),
        *(two(gpu=4), two(gpu=None), two(ranks=2)),
    ],
    ids=["memory", "cpu", "cpu of both", "gpu", "no gpu", "rank"],
)
def test_an_idle_node_is_still(last, noted):
    """Less than 0.1 processor, 5 % of the GPU or 64 MiB is no work. A GPU without a figure is no work either."""
    assert set(noted(*[two()] * 4, last).values()) == {20}


def test_the_servers_own_processes_and_log_are_noted(noted, recorder, tmp_path):
    """The server, its children and each byte of its log count. Other processes of the node do not."""
    recorder.psutil.add(SERVER, "vllm", 10)
    recorder.psutil.add(5, "raylet", 10)
    noted(*[two()] * 4)
    recorder.psutil.add(5, "raylet", 60)
    assert noted(two())["server_cpu"] == 20
    recorder.psutil.add(78, "VLLM::EngineCore", 10, parent=SERVER)
    (tmp_path / "serve.log").write_text(".")
    found = noted(two())
    assert moved(found) == {"server_cpu", "log"} and {found[f"cpu {address}"] for address in BOTH} == {25}
    assert found["api_cpu"] == 25, "an engine core that waits for a rank spins"
    recorder.psutil.add(79, "VLLM::APIServer_1", 10, parent=SERVER)
    assert moved(noted(two())) == {"server_cpu", "api_cpu"}


# --- The recorder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(recorder, clock, monkeypatch, tmp_path, capsys):
    """Records a server that lives as long as there are looks, which take so many seconds; returns what was ended,
    written and said. The server started 100 s ago."""
    (tmp_path / "pid").write_text(f"{SERVER}\n")
    os.utime(tmp_path / "pid", times=(clock.time() - 100,) * 2)
    ended = []

    def record(*looks, floor=5.0, seconds=0, after=(), before=None, drop=False, api=None, gauges=None):
        """`after`: looks after the server's end. `before`: what each node had before the launch."""
        left, told = list(looks), []
        gone, lines = list(after), {at: free and {"available": free} for at, free in (before or {}).items()}

        def ask(_, method):
            clock.sleep(seconds)
            return (left or gone).pop(0) if method == "look" else lines

        monkeypatch.setattr(recorder, "start_gauges", lambda *_: gauges or dict.fromkeys(BOTH))
        monkeypatch.setattr(recorder, "ask", ask)
        quiet = {"counters": 45, "waiting": 30}
        counters = SimpleNamespace(seconds=lambda: quiet, running=3, answered=True, lines=api)
        monkeypatch.setattr(recorder, "Counters", lambda _: counters)
        monkeypatch.setattr(recorder, "runs", lambda group: group == SERVER and bool(left) and not ended)
        monkeypatch.setattr(recorder, "end", lambda group, *why: ended.append(group) or told.extend(why))
        recorder.record(str(tmp_path / "pid"), str(tmp_path), "http://head", floor, drop)
        kept = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
        said = capsys.readouterr().out
        return SimpleNamespace(
            ended=ended, told=told, said=said, looks=len(looks) - len(left), more=len(after) - len(gone), **kept
        )

    return record


RANK, FREE = {"available": 2 * GIB}, {"ranks": 0}
BEFORE = dict.fromkeys(BOTH, 20 * GIB)


def killed(ago, available=3.9 * GIB):
    """What a guard says that killed so many seconds before."""
    return {"killed": {"at": LINE["at"] - ago, "available": available}}


@pytest.mark.parametrize("over", [False, True], ids=["still serving", "ended meanwhile"])
def test_a_server_of_which_a_guard_killed_a_rank_is_ended(over, recorded):
    """The other ranks cannot serve alone. The server may end by itself before the next look; the reason is not lost."""
    look = two(**killed(1) | FREE) | {BOTH[0]: node(ranks=0)}
    found = recorded(two(), *([] if over else [look]), after=[look], before=BEFORE)
    assert found.ended == [SERVER]
    assert found.told[1:] == ["memory guard", "ended by the memory guard: 10.0.0.2 had 3.9 GiB"]
    assert found.said.count("recorder: the server ends, because 10.0.0.2 had 3.9 GiB\n") == 1


def test_a_guard_that_killed_an_earlier_server_ends_nothing(recorded):
    """A guard keeps its last kill. The clocks of the nodes may differ, so only spans of time are compared."""
    assert recorded(*[two(**killed(110))] * 3).ended == []
    slow = {"at": LINE["at"] - 86400}
    assert recorded(*[two(**slow, **killed(86400 + 110))] * 3).ended == []
    assert recorded(*[two(**slow, **killed(86400 + 90))] * 3).ended == [SERVER]


ONE = {BOTH[0]: node(), BOTH[1]: None}


@pytest.mark.parametrize(("before", "ends"), [(4.9, True), (5, False), (20, False)])
def test_a_node_that_falls_silent_after_a_low_reading_ends_the_server(before, ends, recorded):
    """A starving node does not answer. It has 10 s from its last answer on; a node with enough memory has for ever."""
    found = recorded(two(), two(available=before * GIB), *[ONE] * 9, seconds=3)
    assert (found.ended, found.looks) == (([SERVER], 5) if ends else ([], 11))
    why = "ended by the memory guard: 10.0.0.2 had 4.9 GiB, and then did not answer for 10 s"
    assert found.told[1:] == (["memory guard", why] if ends else [])


def test_a_node_that_answers_again_ends_nothing(recorded):
    """Each answer begins the ten seconds anew. A server that has ended by itself was not ended for a silence."""
    low = two(available=4 * GIB)
    assert recorded(low, ONE, ONE, low, ONE, ONE, low, seconds=3).ended == []
    assert recorded(low, *[ONE] * 5, floor=0.0, seconds=3).ended == []
    over = [*[ONE] * 5, two(ranks=0) | {BOTH[0]: node(ranks=0)}]
    assert recorded(low, ONE, ONE, after=over, before=BEFORE, seconds=3).ended == []


def test_every_look_is_kept(recorded, clock, tmp_path):
    """The host can read the last look and the lowest memory. Each file is written whole."""
    found = recorded(two(available=9 * GIB), two(lowest=7 * GIB), two(available=8 * GIB, gpu=None))
    assert found.vitals["lowest"] == {BOTH[0]: 20 * GIB, BOTH[1]: 7 * GIB}
    assert found.vitals["at"] == clock.time() - 1 and found.vitals["nodes"] == two(available=8 * GIB, gpu=None)
    assert found.vitals["quiet"].items() >= {"log": 2, "counters": 45, "waiting": 30}.items()
    assert {name.partition(" ")[0] for name in found.vitals["quiet"]} == {*work(), *LOAD, "waiting"}
    told = {"at", "nodes", "quiet", "silent", "before", "floor", "lowest", "alive", "running", "answered"}
    assert set(found.vitals) == told and found.vitals["floor"] == 5
    assert (found.vitals["running"], found.vitals["answered"]) == (3, True)
    assert not list(tmp_path.glob("*.new"))


def test_a_node_that_does_not_answer_is_said_once(recorded):
    """Each silence of a node is one line, and its length is kept."""
    found = recorded(ONE, ONE, two(), ONE, ONE)
    assert found.said.count("recorder: 10.0.0.2 does not answer; its memory is unknown") == 2
    assert found.ended == [] and found.vitals["nodes"][BOTH[1]] is None
    assert found.vitals["silent"] == {BOTH[1]: 1}


def test_the_lowest_memory_outlives_a_recorder(recorded, tmp_path):
    """A restarted recorder continues the file. If the file is no JSON, the recorder begins it anew."""
    (tmp_path / "vitals.json").write_text(json.dumps({"before": {}, "lowest": {BOTH[1]: 3 * GIB}}))
    assert recorded(two(available=9 * GIB)).vitals["lowest"] == {BOTH[0]: 20 * GIB, BOTH[1]: 3 * GIB}
    (tmp_path / "vitals.json").write_text("{")
    assert recorded(two(available=9 * GIB)).vitals["lowest"] == {BOTH[0]: 20 * GIB, BOTH[1]: 9 * GIB}


def test_nodes_that_do_not_answer_end_nothing(recorded):
    """Unknown memory does not end the server, and the lowest memory stays as it was."""
    found = recorded(two(available=5 * GIB), *[dict.fromkeys(BOTH)] * 9, seconds=3)
    assert (found.ended, found.looks) == ([], 10) and found.vitals["lowest"][BOTH[1]] == 5 * GIB


@pytest.mark.parametrize(("loads", "times"), [({}, 2), ({"api": []}, 0), ({"drop": False}, 0)])
def test_a_node_with_few_free_pages_evicts_while_the_model_loads(
    loads, times, recorded, recorder, monkeypatch, tmp_path
):
    """A node is asked again when it has answered. Nothing is evicted for a server that answers, or without DROP."""
    (tmp_path / "pid.words").write_text("vllm\nserve\na/model\n--port\n8000\n")
    looks = [two(free=free * GIB) | {BOTH[0]: node(free=8 * GIB)} for free in (8, 7, 7, 7)]
    asked, done = [], iter([[], ["answer"]])
    gauge = SimpleNamespace(evict=SimpleNamespace(remote=asked.append))
    monkeypatch.setattr(recorder, "ray", SimpleNamespace(wait=lambda *_, **__: (next(done), [])))
    recorded(*looks, gauges={BOTH[1]: gauge}, **{"drop": True} | loads)
    assert asked == ["a/model"] * times


def full(*_, **__):
    """Fails as a disk without room does."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("saying", [True, False], ids=["the log has room", "the log is full, too"])
def test_a_full_disk_does_not_end_the_recorder(saying, recorded, recorder, monkeypatch):
    """The server is ended even if nothing can be written, because the server's log may fill the disk."""
    monkeypatch.setattr(recorder.os, "replace", full)
    if not saying:
        monkeypatch.setattr(recorder, "print", full, raising=False)
    found = recorded(two(), ONE, two(**killed(1)), two())
    assert (found.ended, found.looks) == ([SERVER], 3)
    assert found.said.endswith("the server ends, because 10.0.0.2 had 3.9 GiB\n") if saying else not found.said


def test_memory_is_judged_before_anything_is_written(recorded, recorder, monkeypatch):
    """The recorder ends the server before it writes, because a write to the disk may hang."""
    order = []
    monkeypatch.setattr(recorder, "keep", lambda file, _: order.append(Path(file).stem))
    monkeypatch.setattr(recorder, "shortage", lambda *_: order.append("memory"))
    recorded(two(), two())
    assert order == ["memory", "vitals", "memory", "vitals", "vitals"]


def test_a_look_after_the_end_is_told_from_one_before(recorded, recorder, monkeypatch):
    """`health` calls no server ended by itself before a look has shown that no guard has killed a rank."""
    told, keep = [], recorder.keep
    monkeypatch.setattr(
        recorder, "keep", lambda file, value: (keep(file, value), "alive" in value and told.append(value["alive"]))
    )
    recorded(two(), after=[two(), two(**FREE) | {BOTH[0]: node(ranks=0)}], before=BEFORE)
    assert told == [True, False, False, False]


def test_a_server_without_its_api_server_is_ended(recorded, recorder):
    """An OOM killer ends the first process alone. The others hold the memory of every node, and answer nobody."""
    recorder.psutil.gone = {SERVER}
    found = recorded(*[two()] * 9)
    assert (found.ended, found.looks, found.told[1]) == ([SERVER], 3, "recorder")
    assert found.told[2].startswith("ended by the recorder: its API server (process 77) was gone, and other")


def test_a_server_that_ends_in_order_is_left_alone(recorded, recorder, monkeypatch):
    """For a moment other processes may outlive the first one. Nobody ends them, and nobody is blamed."""
    seen = iter([True, True, True, True, False])
    monkeypatch.setattr(recorder.psutil, "pid_exists", lambda _: next(seen))
    found = recorded(*[two()] * 5)
    assert (found.ended, found.looks) == ([], 5)


@pytest.mark.parametrize(
    ("after", "left"),
    [
        ([two(**FREE)], ""),
        ([two(**FREE | {"available": 18 * GIB})], ""),
        ([two(), two(), two(**FREE)], ""),
        ([two()] * 70, "10.0.0.2 still has ranks: 1"),
        ([two(**FREE | {"available": 17.9 * GIB})] * 70, "10.0.0.2 has 2.1 GiB less than before the launch"),
        ([two() | {BOTH[1]: None}] * 70, "10.0.0.2 does not answer"),
    ],
    ids=["all gone", "nearly all", "later", "a rank", "memory", "no answer"],
)
def test_the_recorder_outlives_the_server_until_all_is_free(after, left, recorded, recorder, tmp_path):
    """It looks until no rank is left and the memory is back. After 60 s it writes which node has what, and ends."""
    after = [look | {BOTH[0]: node(ranks=0)} for look in after]
    found = recorded(two(**RANK), after=after, before=BEFORE)
    assert found.ended == [] and found.more == (60 if left else len(after))
    said = (tmp_path / "left.txt").read_text() if left else ""
    assert said == (f"60 s after the server's end {left}. To free every node: inv down\n" if left else "")


def test_memory_is_not_guarded_after_the_end(recorded):
    """The ranks that end may leave a node short for a moment. The server is not ended twice, for another reason."""
    assert recorded(two(), after=[two(available=GIB), two(**FREE)], before={BOTH[1]: 20 * GIB}).ended == []


def test_the_memory_before_the_launch_outlives_a_recorder(recorded, tmp_path):
    """A recorder that is started again finds the model loaded, so it takes over what the one before has noted."""
    (tmp_path / "vitals.json").write_text("{}")  # by a recorder of an earlier version
    assert recorded(
        two(), after=[two(ranks=0) | {BOTH[0]: node(ranks=0)}], before={BOTH[0]: 19 * GIB, BOTH[1]: None}
    ).vitals["before"] == {BOTH[0]: 19 * GIB}
    (tmp_path / "vitals.json").write_text(json.dumps({"before": BEFORE, "lowest": {}}))
    assert recorded(two(), before=dict.fromkeys(BOTH, 3 * GIB), after=[two(ranks=0)] * 70).vitals["before"] == BEFORE


def test_each_line_of_memory_is_json(recorder, monkeypatch, capsys):
    """`inv memory` reads a line for each look. The script ends when its standard input is closed."""
    monkeypatch.setattr(recorder, "start_gauges", lambda *_: dict.fromkeys(BOTH))
    monkeypatch.setattr(recorder, "ask", lambda *_: {BOTH[0]: LINE | {"available": 7}, BOTH[1]: None})
    waits = iter([[], [sys.stdin]])
    monkeypatch.setattr(recorder.select, "select", lambda *_: (next(waits), [], []))
    recorder.print_memory(2.0)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{BOTH[0]: LINE | {"available": 7}, BOTH[1]: None}] * 2


@pytest.fixture
def grouped(recorder, clock, monkeypatch):
    """Starts a shell script in a process group of its own; each pause of `end` lasts until it is gone, if that ends."""
    started = []

    def start(script, ends):
        child = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, process_group=0, env={})
        started.append(child)
        child.stdout.read(1)
        monkeypatch.setattr(clock, "sleep", lambda pause: child.wait(5) if ends else Clock.sleep(clock, pause))
        return child

    yield start
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo; exec /bin/sleep 60", -signal.SIGTERM),
        ("trap 'exit 3' TERM; echo; while :; do /bin/sleep 0.01; done", 3),
        ("trap '' TERM; echo; exec /bin/sleep 60", -signal.SIGKILL),
    ],
    ids=["ends", "cleans up", "does not listen"],
)
def test_a_whole_process_group_is_ended(script, status, grouped, recorder, clock, tmp_path):
    """The group gets SIGTERM, and SIGKILL after 5 s. The reason is kept. A group that has ended already is no error."""
    child = grouped(script, ends=status != -signal.SIGKILL)
    assert recorder.runs(child.pid)
    why = {"by": "recorder", "why": "ended by the recorder: no rank"}
    recorder.end(child.pid, str(tmp_path), **why)
    assert child.wait(5) == status and not recorder.runs(child.pid)
    recorder.end(child.pid, str(tmp_path), **why)
    assert json.loads((tmp_path / "ended.json").read_text()) == why | {"at": clock.time()}
