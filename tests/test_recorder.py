"""What runs beside the server, in the container: it sees what moves on every node, and ends what runs out of memory."""

import http.client
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from settings.models import ROOT
from vitals.judge import LOAD, WORK
from vitals.recorded import Recorded

GIB = 2**30
BOTH = ("10.0.0.1", "10.0.0.2")
GROUP = 77


class Late:
    """An answer that does not come in time."""


def ray(wait=lambda *_, **__: None, nodes=()):
    """What stands in for Ray: an actor is its class, and an answer is its value, unless that is late."""

    def get(answer, timeout):
        if isinstance(answer, Late):
            raise TimeoutError("Get timed out")
        return answer

    made = ModuleType("ray")
    made.wait, made.get, made.nodes, made.init = wait, get, lambda: nodes, lambda **_: None
    made.cloudpickle = SimpleNamespace(register_pickle_by_value=lambda _: None)
    made.remote = lambda **_: (
        lambda actor: SimpleNamespace(
            options=lambda scheduling_strategy: SimpleNamespace(remote=lambda: (actor, scheduling_strategy))
        )
    )
    return made


@pytest.fixture(scope="module")
def real():
    """The files themselves, imported where there is no Ray."""
    scheduling = ModuleType("ray.util.scheduling_strategies")
    scheduling.NodeAffinitySchedulingStrategy = lambda node, soft: (node, soft)
    stubs = {"ray": ray(), "ray.util": ModuleType("ray.util"), scheduling.__name__: scheduling}
    with pytest.MonkeyPatch.context() as now:
        now.syspath_prepend(ROOT / "recorder")
        for name, stub in stubs.items():
            now.setitem(sys.modules, name, stub)
        made = {name: importlib.import_module(name) for name in ("gauge", "quiet", "guard")}
        yield SimpleNamespace(**made)
    for name in made:
        del sys.modules[name]


class Clock:
    """Both clocks: `sleep` moves them and nothing waits; `step` sets the one that a person reads."""

    def __init__(self):
        self.at, self.stepped = 1000.0, 1_700_000_000.0

    def monotonic(self):
        """Seconds that only go on."""
        return self.at

    def time(self):
        """Seconds since 1970, as the machine believes."""
        return self.at + self.stepped

    def sleep(self, seconds):
        """Go on."""
        self.at += seconds

    def step(self, seconds):
        """What a time server does to a machine that was wrong."""
        self.stepped += seconds


@pytest.fixture
def clock():
    """Time as a test makes it."""
    return Clock()


@pytest.fixture
def recorder(real, clock, monkeypatch):
    """The file, in that time; what it starts a thread for happens only where a test calls it."""
    for module in vars(real).values():
        monkeypatch.setattr(module, "time", clock)
    idle = SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(real.gauge, "threading", idle)
    monkeypatch.setattr(real.quiet, "threading", idle)
    return real


@pytest.fixture
def quiet(recorder):
    """What has moved, at the start of a server."""
    return recorder.quiet.Quiet()


def after(clock, look, values, *least, every=1.0):
    """For how long a thing was quiet after each of these values, so many seconds apart, seen by this look."""
    found = []
    for value in values:
        look("thing", value, *least)
        found.append(look.__self__.seconds()["thing"])
        clock.sleep(every)
    return found


def test_what_goes_far_enough_has_moved(clock, recorder):
    """Up or down, by so much in one step or in several: what creeps is seen when it has come as far."""
    assert after(clock, recorder.quiet.Quiet().see, [100, 101, 109, 110, 119, 90], 10) == [0, 1, 2, 0, 1, 0]
    assert after(clock, recorder.quiet.Quiet().see, [0, 0, 1, 1], 1) == [0, 1, 0, 1]


def test_what_cannot_be_seen_has_not_been_quiet(clock, recorder):
    """A node that does not answer is no sign of a hang; from when it answers again it is counted anew."""
    looks = [100, 100, None, None, 100, 100, 100]
    assert after(clock, recorder.quiet.Quiet().see, looks, 10) == [0, 1, 0, 0, 0, 1, 2]
    assert after(clock, recorder.quiet.Quiet().rate, [7.0, 7.0, None, 7.0, 7.0], every=5) == [0, 5, 0, 0, 5]


def test_a_processor_is_busy_by_its_share(clock, recorder):
    """A tenth of one, over some seconds: what idles stays below, and a moment's work alone is not enough."""
    assert (recorder.quiet.CPU_S, recorder.quiet.BUSY_CPU) == (4, 0.1)
    assert after(clock, recorder.quiet.Quiet().rate, [n * 0.09 for n in range(11)])[-1] == 8
    assert after(clock, recorder.quiet.Quiet().rate, [n * 0.11 for n in range(11)])[-3:] == [0, 0, 0]
    assert after(clock, recorder.quiet.Quiet().rate, [0, *[0.3] * 8])[-1] == 8


def test_a_process_that_ended_has_worked(clock, quiet):
    """Its seconds are gone from the sum: something happened."""
    assert after(clock, quiet.rate, [50.0, 50.0, 3.0], every=5) == [0, 5, 0]


def test_quiet_is_as_long_as_nothing_moved(clock, quiet):
    """It grows to whatever HANG_S is, and the first move ends it."""
    seen = after(clock, quiet.rate, [1.0] * 100 + [9.0], every=5)
    assert seen[99:] == [495, 0]


def test_a_clock_that_is_set_is_no_hang(clock, quiet):
    """A rank that works all along is not quiet for the hour by which the clock was wrong."""
    after(clock, quiet.rate, [1.0, 3.0, 5.0, 7.0, 9.0])
    clock.step(3600)
    assert after(clock, quiet.rate, [11.0])[-1] < 10


class Proc:
    """/proc with processes as a test makes them; `gone` are listed, and have ended when they are read."""

    def __init__(self):
        self.lines, self.gone, self.files = {}, ["99"], {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2048 kB\n"}
        self.halves = {}

    def add(self, pid, name, spent, parent=1, group=1, collected=0):
        """A process that has spent so many seconds, and children that ended so many; a quarter in the kernel."""
        ticks, theirs = (int(seconds * os.sysconf("SC_CLK_TCK")) for seconds in (spent, collected))
        times = [ticks - ticks // 4, ticks // 4, theirs - theirs // 4, theirs // 4]
        fields = ["S", parent, group, group, *[0] * 7, *times, *[0] * 35]
        self.lines[f"/proc/{pid}/stat"] = f"{pid} ({name}) {' '.join(map(str, fields))}\n"

    def glob(self, pattern):
        """What is there."""
        if pattern.startswith("/sys"):
            return self.halves.get(pattern, [])
        return [*self.lines, *(f"/proc/{pid}/stat" for pid in self.gone)]

    def read(self, path):
        """What it holds."""
        try:
            return (self.lines | self.files)[path]
        except KeyError:
            raise FileNotFoundError(path) from None


@pytest.fixture
def proc(recorder, monkeypatch):
    """Processes, and no nvidia-smi."""
    made = Proc()
    monkeypatch.setattr(recorder.gauge, "glob", made)
    monkeypatch.setattr(recorder.gauge, "read", made.read)
    monkeypatch.setenv("PATH", "/nowhere")
    return made


def test_ranks_are_known_by_their_titles(proc, recorder):
    """Both of vLLM's executors', as the kernel cuts them at 15 letters; other actors and programs are none."""
    names = ("ray::RayWorkerW", "ray::RayWorkerP", "ray::IDLE", "ray::Gauge.look", "raylet", "a (b) c) d", "python3")
    for number, name in enumerate(names):
        proc.add(10 + number, name, spent=1.5)
    told = recorder.gauge.Gauge().look()
    assert (told["ranks"], told["cpu"], told["gpu"], told["available"]) == (2, 3.0, None, 2048 * 1024)


def test_a_rank_that_waits_for_its_compiler_works(proc, recorder):
    """Kernels are compiled at a first request by programs that a rank starts and waits for: that is no hang."""
    proc.add(12, "cicc", parent=11, spent=60)
    proc.add(11, "ninja", parent=10, spent=0.5, collected=20)
    proc.add(10, "ray::RayWorkerW", spent=1)
    told = recorder.gauge.Gauge().look()
    assert (told["ranks"], told["cpu"]) == (1, 81.5)


def test_links_that_are_not_up_are_told(proc, recorder, monkeypatch):
    """Those that the container was told to use, by either variable, each once; one that is missing is not up."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "one,two")
    monkeypatch.setenv("TP_SOCKET_IFNAME", "three,two,")
    proc.files |= {f"/sys/class/net/{name}/operstate": f"{state}\n" for name, state in (("one", "up"), ("two", "down"))}
    assert recorder.gauge.Gauge().look()["down"] == ["three", "two"]


def test_the_other_half_of_a_port_is_told(proc, recorder, monkeypatch):
    """A RoCE device carries data whether or not its netdev has an address: its link counts, each once."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "one")
    monkeypatch.delenv("TP_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_IB_HCA", "mlx0,mlx1,,mlx2")
    proc.halves = {f"{recorder.gauge.ROCE}/mlx{n}/device/net/*": [f"/x/{name}"] for n, name in ((0, "one"), (1, "two"))}
    proc.files["/sys/class/net/one/operstate"] = "up\n"
    gauge = recorder.gauge.Gauge()
    assert (gauge.netdevs, gauge.look()["down"]) == (["one", "two"], ["two"])


def test_a_look_at_this_machine(real, monkeypatch):
    """Every figure has its type here, too: the real /proc, whatever GPU and ranks there are."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuchlink0")
    for name in ("TP_SOCKET_IFNAME", "NCCL_IB_HCA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(real.gauge, "GPU_S", 1e6)  # its thread looks once
    gauge = real.gauge.Gauge()
    told = json.loads(json.dumps(gauge.look()))
    assert told | {"available": 1, "ranks": 0, "cpu": 0} == {
        "available": 1, "ranks": 0, "cpu": 0, "gpu": None, "down": ["nosuchlink0"]
    }  # fmt: skip
    assert 2**20 < told["available"] == pytest.approx(gauge.available(), rel=0.5)
    assert isinstance(told["ranks"], int) and told["cpu"] >= 0
    own = real.gauge.processes(lambda *_: True)[str(os.getpid())]
    assert real.gauge.seconds({"own": own}) == pytest.approx(sum(os.times()[:4]), abs=0.1)


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
    monkeypatch.setattr(recorder.gauge, "subprocess", made)
    return made


@pytest.mark.parametrize(
    ("plays", "percent"),
    [
        *(("7\n", 7), ("97\n3\n", 97), ("", None), ("[N/A]\n", None)),
        *((FileNotFoundError(2, "No such file"), None), (subprocess.TimeoutExpired("nvidia-smi", 3), None)),
    ],
)
def test_what_the_gpu_does_not_tell_is_unknown(plays, percent, smi, recorder):
    """And not idle; whatever nvidia-smi does, it is given up after a time."""
    smi.plays = plays
    assert recorder.gauge.Gauge().utilization() == percent
    assert smi.calls[0]["timeout"] == recorder.gauge.GPU_S == 5


def test_the_gpu_is_asked_beside_the_looks(proc, smi, recorder, clock, monkeypatch):
    """Each 5 s, since asking costs, and by nobody who looks at the memory: a driver may hang for ever."""
    gauge, smi.plays, looks = recorder.gauge.Gauge(), "7\n", [recorder.gauge.Gauge().look()["gpu"]]

    def sleep(seconds):
        looks.append(gauge.look()["gpu"])
        clock.at += seconds
        if clock.at > 1010:
            raise StopIteration

    monkeypatch.setattr(clock, "sleep", sleep)
    with pytest.raises(StopIteration):
        gauge.follow_gpu()
    assert looks == [None, 7, 7, 7] and len(smi.calls) == 3


def ended(*_):
    """Ends a loop that has no end."""
    raise StopIteration


def test_a_gpu_that_was_told_long_ago_is_unknown(proc, smi, recorder, clock, monkeypatch):
    """Its last figure does not stand for a driver that hangs since."""
    gauge, smi.plays = recorder.gauge.Gauge(), "7\n"
    monkeypatch.setattr(clock, "sleep", ended)
    with pytest.raises(StopIteration):
        gauge.follow_gpu()
    looks = []
    for _ in range(17):
        looks.append(gauge.look()["gpu"])
        clock.at += 1
    assert looks == [7] * 15 + [None] * 2


def test_a_gauge_is_on_each_node_that_lives(recorder, monkeypatch):
    """Pinned to it, by its address."""
    nodes = [{"NodeManagerAddress": at, "NodeID": at[-1], "Alive": True} for at in BOTH]
    nodes.append({"NodeManagerAddress": "10.0.0.3", "NodeID": "3", "Alive": False})
    monkeypatch.setattr(recorder.gauge, "ray", ray(nodes=nodes))
    assert recorder.gauge.gauges() == {at: (recorder.gauge.Gauge, (at[-1], False)) for at in BOTH}


def test_a_node_that_does_not_answer_is_none(recorder, monkeypatch):
    """All are asked at once and waited for together; the others' answers count."""
    waited = []
    monkeypatch.setattr(recorder.gauge, "ray", ray(wait=lambda asked, **options: waited.append((asked, options))))
    late = Late()
    asked = {
        at: SimpleNamespace(look=SimpleNamespace(remote=lambda said=said: said))
        for at, said in zip(BOTH, (late, 5), strict=True)
    }
    assert recorder.gauge.sample(asked, "look", 3) == {"10.0.0.1": None, "10.0.0.2": 5}
    assert waited == [([late, 5], {"num_returns": 2, "timeout": 3})]


@pytest.fixture
def followed(recorder, clock, monkeypatch):
    """Reads a made-up page of metrics as often as there are answers; what the counters' seconds were each time."""

    def follow(*answers):
        left, seen = list(answers), []

        def opened(*_, **__):
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer.encode())

        def sleep(seconds):
            seen.append(counters.seconds())
            clock.at += seconds
            if not left:
                raise StopIteration

        opener = SimpleNamespace(ProxyHandler=dict, build_opener=lambda _: SimpleNamespace(open=opened))
        monkeypatch.setattr(recorder.quiet, "urllib", SimpleNamespace(request=opener, error=urllib.error))
        monkeypatch.setattr(clock, "sleep", sleep)
        counters = recorder.quiet.Counters("http://head")
        assert counters.seconds() == {"counters": 0, "waiting": 0}
        with pytest.raises(StopIteration):
            counters.follow()
        assert all(set(told) == {"counters", "waiting"} for told in seen)
        return SimpleNamespace(**{name: [told[name] for told in seen] for name in seen[0]})

    return follow


def page(tokens=7, running=0, waiting=0, processor=1):
    """The metrics of a server with so many requests, on the second of its engines."""
    return f"""vllm:num_requests_running{{engine="0"}} 0.0
vllm:num_requests_running{{engine="1"}} {running}.0
vllm:num_requests_waiting{{engine="1"}} {waiting}.0
vllm:prompt_tokens_total{{engine="1"}} {tokens}
process_cpu_seconds_total {processor}
"""


REFUSED, LATE = ConnectionRefusedError(111, "Connection refused"), TimeoutError("timed out")


def test_counters_that_change_have_moved(followed):
    """Tokens and the KV cache; a page that is as it was, or has other figures alone, is quiet, whoever waits."""
    pages = [(7, 0, 1), (7, 1, 1), (7, 2, 2), (8, 2, 2), (8, 0, 3)]
    told = followed(*(page(tokens, running, processor=spent) for tokens, running, spent in pages))
    assert told.counters == [0, 15, 30, 0, 15]
    caches = [f"vllm:{name}_cache_usage_perc 0.{part}\n" for name in ("kv", "gpu") for part in (1, 2)]
    assert followed(*(page() + cache for cache in caches)).counters == [0, 0, 0, 0]


def test_nobody_waits_for_an_idle_server(followed):
    """It answers and has nothing to do: its counters stand still, and a first request finds no wait behind it."""
    told = followed(*[page()] * 99)
    assert (told.waiting, told.counters[-1]) == ([0] * 99, 98 * 15)


@pytest.mark.parametrize("asked", [{"running": 1}, {"waiting": 1}, {"running": 1, "waiting": 2}])
def test_a_request_waits_since_nobody_did(asked, followed):
    """One that waits or runs, since the last look that found none, however long nobody had asked; idle ends it."""
    told = followed(*[page()] * 9, *[page(**asked)] * 3, page(), page(**asked))
    assert told.waiting[8:] == [0, 15, 30, 45, 0, 15]


def test_requests_that_are_served_wait_and_move(followed):
    """Somebody always waits where there is much to do: the wait alone does not tell a hang, the counters do."""
    told = followed(*(page(tokens, running=1) for tokens in range(5)))
    assert (told.counters, told.waiting) == ([0] * 5, [0, 15, 30, 45, 60])


def test_a_server_that_does_not_answer_keeps_somebody_waiting(followed):
    """Not up yet, hung, or gone: its counters stand from the first time on, and are read on."""
    told = followed(REFUSED, REFUSED, REFUSED, page())
    assert (told.counters, told.waiting) == ([0, 15, 30, 0], [0, 15, 30, 0])
    told = followed(page(running=1), LATE, LATE, page(running=1), page(8, running=1))
    assert (told.counters, told.waiting) == ([0, 15, 30, 45, 0], [0, 15, 30, 45, 60])
    told = followed(page(), LATE, LATE, page(), LATE)
    assert (told.counters, told.waiting) == ([0, 15, 30, 45, 60], [0, 15, 30, 0, 15])


def test_a_server_that_refuses_its_metrics_keeps_nobody_waiting(followed):
    """It answers: whoever asks the next token must not find a hang that nobody has seen."""
    refusal = urllib.error.HTTPError("http://head/metrics", 404, "none here", {}, io.BytesIO())
    assert followed(*[refusal] * 9).waiting == [0] * 9


def test_half_an_answer_does_not_end_the_reading(followed):
    """Else the counters would stand still where they were, whatever the server does from then on."""
    half, none = http.client.IncompleteRead(b"vllm"), http.client.BadStatusLine("TLS")
    odd = "vllm:num_requests_running many\n"
    told = followed(page(running=1), half, none, odd, page(8))
    assert (told.counters, told.waiting) == ([0, 15, 30, 45, 0], [0, 15, 30, 45, 0])


def node(**other):
    """What a node's gauge says while it idles."""
    return {"available": 20 * GIB, "ranks": 1, "cpu": 5.0, "gpu": 0, "down": []} | other


def noted(recorder, quiet, clock, tmp_path, *looks):
    """For how long each thing was quiet when the last of these looks was noted, 5 s after the one before."""
    for told in looks:
        clock.sleep(5)
        recorder.quiet.note(quiet, told, GROUP, str(tmp_path / "serve.log"))
    return quiet.seconds()


def two(**other):
    """A look at two nodes, the second as `other` says."""
    return {BOTH[0]: node(), BOTH[1]: node(**other)}


def moved(found):
    """What was not quiet."""
    return {name for name, seconds in found.items() if not seconds}


def test_nothing_that_moves_is_quiet(proc, recorder, quiet, clock, tmp_path):
    """Everything that a judge asks about is noted, and is quiet on idle nodes, without a log or a server's process."""
    found = noted(recorder, quiet, clock, tmp_path, *[two()] * 5)
    nodes = {f"{thing} {address}" for thing in ("cpu", "memory") for address in BOTH}
    assert set(found) == {*nodes, "gpu", "log", "server_cpu"} and set(found.values()) == {20}
    assert {*WORK, *LOAD} - {name.partition(" ")[0] for name in found} == {"counters"}


@pytest.mark.parametrize(
    ("things", "last"),
    [
        ({"memory 10.0.0.2"}, two(available=20 * GIB - 64 * 2**20)),
        ({"cpu 10.0.0.2"}, two(cpu=5.5)),
        ({"cpu 10.0.0.2"}, two(cpu=1.0)),
        ({"gpu"}, two(gpu=5)),
        ({"cpu 10.0.0.2", "memory 10.0.0.2"}, {BOTH[0]: node(), BOTH[1]: None}),
    ],
    ids=["memory", "cpu", "rank ended", "gpu", "no answer"],
)
def test_one_node_that_moves_is_noted(things, last, proc, recorder, quiet, clock, tmp_path):
    """On whichever node, and of that one alone, which is enough; one that does not answer was not seen to be quiet."""
    found = noted(recorder, quiet, clock, tmp_path, *[two()] * 4, last)
    assert moved(found) == things and {found[name] for name in set(found) - things} == {20}
    assert {Recorded(0, last, found).quiet(name.partition(" ")[0]) for name in things} == {0}


def test_a_node_that_does_not_answer_hides_no_other(proc, recorder, quiet, clock, tmp_path):
    """What the others do is compared with what they did before, not with a sum that lacks a node."""
    silent = {BOTH[0]: node(cpu=9.0), BOTH[1]: None}
    assert moved(noted(recorder, quiet, clock, tmp_path, two(), silent)) >= {"cpu 10.0.0.1", "cpu 10.0.0.2"}
    found = noted(recorder, quiet, clock, tmp_path, silent, silent)
    assert moved(found) == {"cpu 10.0.0.2", "memory 10.0.0.2"} and found["cpu 10.0.0.1"] == 10


@pytest.mark.parametrize(
    "last",
    [
        *(two(available=20 * GIB - 63 * 2**20), two(cpu=5.45), dict.fromkeys(BOTH, node(cpu=5.45))),
        *(two(gpu=4), two(gpu=None), two(ranks=2)),
    ],
    ids=["memory", "cpu", "cpu of both", "gpu", "no gpu", "rank"],
)
def test_what_an_idle_node_does_is_quiet(last, proc, recorder, quiet, clock, tmp_path):
    """Less than a tenth of a processor a node, 5 % of the GPU or 64 MiB is no work; nor is a GPU that is not told."""
    assert set(noted(recorder, quiet, clock, tmp_path, *[two()] * 4, last).values()) == {20}


def test_the_servers_own_processes_and_log_are_noted(proc, recorder, quiet, clock, tmp_path):
    """Its process group alone, and every byte of its log."""
    proc.add(GROUP, "vllm", 10, group=GROUP)
    proc.add(5, "raylet", 10)
    noted(recorder, quiet, clock, tmp_path, *[two()] * 4)
    proc.add(5, "raylet", 60)
    assert noted(recorder, quiet, clock, tmp_path, two())["server_cpu"] == 20
    proc.add(78, "VLLM::EngineCor", 10, group=GROUP)
    (tmp_path / "serve.log").write_text(".")
    found = noted(recorder, quiet, clock, tmp_path, two())
    assert moved(found) == {"server_cpu", "log"} and {found[f"cpu {address}"] for address in BOTH} == {25}


@pytest.fixture
def guarded(proc, recorder, monkeypatch, tmp_path, capsys):
    """Guards a server that lives as long as there are looks; whom it ended, what it wrote and what it said."""
    (tmp_path / "pid").write_text(f"{GROUP}\n")
    ended, waits = [], []

    def guard(*looks, least=2.0):
        left = list(looks)

        def sample(_, method, wait_s):
            waits.append(wait_s)
            return left.pop(0) if method == "look" else {}

        monkeypatch.setattr(recorder.guard, "read", lambda path: Path(path).read_text())
        monkeypatch.setattr(recorder.guard, "gauges", lambda: dict.fromkeys(BOTH))
        monkeypatch.setattr(recorder.guard, "sample", sample)
        counters = SimpleNamespace(seconds=lambda: {"counters": 45, "waiting": 30})
        monkeypatch.setattr(recorder.guard, "Counters", lambda _: counters)
        monkeypatch.setattr(recorder.guard, "runs", lambda group: group == GROUP and bool(left) and not ended)
        monkeypatch.setattr(recorder.guard, "end", ended.append)
        recorder.guard.guard(str(tmp_path / "pid"), str(tmp_path), "http://head", least)
        kept = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
        said = capsys.readouterr().out
        return SimpleNamespace(ended=ended, said=said, looks=len(looks) - len(left), waits=waits, **kept)

    return guard


def test_a_server_without_memory_is_ended(guarded):
    """Its process group, as soon as one node has less than the limit: unified memory that runs out hangs the host."""
    found = guarded(two(), two(available=2 * GIB), two(available=2 * GIB - 1), two())
    assert (found.ended, found.looks) == ([GROUP], 3)
    assert "10.0.0.2 has 2.0 GiB left, less than MEM_ABORT_GIB (2): ending the server" in found.said


def test_a_limit_of_nothing_ends_nothing(guarded):
    """MEM_ABORT_GIB=0 only looks, and says so."""
    found = guarded(two(available=1), two(available=0), two(), least=0.0)
    assert (found.ended, found.looks) == ([], 3) and "MEM_ABORT_GIB is 0: it only looks" in found.said


def test_what_was_seen_is_kept(guarded, clock, tmp_path):
    """The last look and the lowest memory, where the host reads them, each file whole."""
    found = guarded(two(available=9 * GIB), two(available=7 * GIB), two(available=8 * GIB, gpu=None))
    assert vars(found)["memory-low"] == {BOTH[0]: 20 * GIB, BOTH[1]: 7 * GIB}
    assert found.vitals["at"] == clock.time() - 1 and found.vitals["nodes"] == two(available=8 * GIB, gpu=None)
    assert found.vitals["quiet"].items() >= {"log": 2, "counters": 45, "waiting": 30}.items()
    assert {name.partition(" ")[0] for name in found.vitals["quiet"]} == {*WORK, *LOAD, "waiting"}
    assert set(found.vitals) == {"at", "nodes", "quiet", "silent"}
    assert not list(tmp_path.glob("*.new"))


def test_a_node_that_does_not_answer_is_said_once(guarded):
    """Nothing stops, the other node is guarded on, and so is this one when it is back; a second silence is said."""
    silent = {BOTH[0]: node(), BOTH[1]: None}
    found = guarded(silent, silent, two(), silent, {BOTH[0]: node(available=GIB), BOTH[1]: None})
    assert found.said.count("10.0.0.2 does not answer; its memory is not watched") == 2
    assert found.ended == [GROUP] and found.vitals["nodes"][BOTH[1]] is None
    assert found.vitals["silent"] == {BOTH[1]: 1}


def test_what_was_lowest_outlives_a_guard(guarded, tmp_path):
    """One that is started again goes on from there; what the server before had goes when another starts."""
    (tmp_path / "memory-low.json").write_text(json.dumps({BOTH[1]: 3 * GIB}))
    assert vars(guarded(two(available=9 * GIB)))["memory-low"] == {BOTH[0]: 20 * GIB, BOTH[1]: 3 * GIB}
    (tmp_path / "memory-low.json").write_text("{")
    assert vars(guarded(two(available=9 * GIB)))["memory-low"] == {BOTH[0]: 20 * GIB, BOTH[1]: 9 * GIB}


def test_there_is_one_guard(recorder, tmp_path):
    """Another one, which may be stuck, is ended; a disk without room ends nobody."""
    file = tmp_path / "pid.recorder"
    stuck = "import fcntl, os, time; f = open(PATH, 'a'); fcntl.flock(f, fcntl.LOCK_EX); f.write(str(os.getpid()))"
    script = f"{stuck.replace('PATH', repr(str(file)))}; f.flush(); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with recorder.guard.alone(str(file)):
            assert child.wait(5) == -signal.SIGKILL and file.read_text() == str(os.getpid())
    assert recorder.guard.alone(str(tmp_path / "not there/pid.recorder")) is None


def test_no_node_that_answers_ends_nothing(guarded):
    """Nobody knows what is left: it goes on, and what was lowest stays."""
    found = guarded(two(available=5 * GIB), dict.fromkeys(BOTH), dict.fromkeys(BOTH))
    assert (found.ended, found.looks) == ([], 3) and vars(found)["memory-low"][BOTH[1]] == 5 * GIB


def test_a_driver_that_hangs_is_no_lost_node(proc, recorder, monkeypatch):
    """A look has its answer while nvidia-smi has none, or a node without a look would not be guarded."""
    hangs = threading.Event()
    driver = SimpleNamespace(run=lambda *_, **__: hangs.set() or threading.Event().wait())
    monkeypatch.setattr(recorder.gauge, "threading", threading)
    monkeypatch.setattr(recorder.gauge, "subprocess", driver)
    gauge = recorder.gauge.Gauge()
    assert hangs.wait(5) and gauge.look()["gpu"] is None


def full(*_, **__):
    """What a disk without room says."""
    raise OSError(28, "No space left on device")


def test_a_full_disk_does_not_end_the_guard(guarded, recorder, monkeypatch, tmp_path):
    """Memory is guarded whether or not it can be written down: a log fills a disk sooner or later."""
    monkeypatch.setattr(recorder.guard, "open", full, raising=False)
    found = guarded(two(), two(available=GIB))
    assert found.ended == [GROUP] and found.said.endswith("ending the server\n")


def test_a_log_that_is_full_does_not_end_the_guard(guarded, recorder, monkeypatch):
    """Nor does a sentence that finds no room: the server's log, where it goes, is what fills the disk."""
    monkeypatch.setattr(recorder.guard, "open", full, raising=False)
    monkeypatch.setattr(recorder.guard, "print", full, raising=False)
    found = guarded(two(), {BOTH[0]: node(), BOTH[1]: None}, two(available=GIB), two())
    assert (found.ended, found.looks, found.said) == ([GROUP], 3, "")


def test_memory_is_looked_at_before_anything_is_written(guarded, recorder, monkeypatch):
    """A disk that hangs delays nobody's rescue: the server is ended first, and noted then."""
    order = []
    monkeypatch.setattr(recorder.guard, "keep", lambda file, _: order.append(Path(file).stem))
    monkeypatch.setattr(recorder.guard, "too_low", lambda *_: order.append("memory"))
    guarded(two(), two())
    assert order == ["memory", "memory-low", "vitals"] * 2


@pytest.fixture
def grouped(recorder, clock, monkeypatch):
    """Starts a shell script in a process group of its own; each pause of `end` lasts until it is gone, if that ends."""
    started = []

    def start(script, ends):
        child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, process_group=0)
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
        ("echo; exec sleep 60", -signal.SIGTERM),
        ("trap 'exit 3' TERM; echo; while :; do :; done", 3),
        ("trap '' TERM; echo; exec sleep 60", -signal.SIGKILL),
    ],
    ids=["ends", "cleans up", "does not listen"],
)
def test_a_whole_process_group_is_ended(script, status, grouped, recorder):
    """It is asked first, and forced after 5 s; a group that is gone already is no error."""
    child = grouped(script, ends=status != -signal.SIGKILL)
    assert recorder.guard.runs(child.pid)
    recorder.guard.end(child.pid)
    assert child.wait(5) == status and not recorder.guard.runs(child.pid)
    recorder.guard.end(child.pid)
