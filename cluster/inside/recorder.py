"""Watch every node from the head's container: recorder.py PID_FILE FOLDER URL GIB DROP.

The recorder looks each second, until the server and its ranks have ended. The memory of a node is what memory_guard.py
there has written. The recorder ends the server when a guard has killed ranks, and when a node that had less than GIB
available falls silent, because a node without memory does not answer. FOLDER gets these files: vitals.json has the last
look, each node's lowest memory, and for how long each thing has not moved; ended.json has why the server was ended;
left.txt has what a server has left on the nodes. If DROP is 1, weights that the ranks have read leave the page cache
while the model loads.

`recorder.py --print SECONDS` only prints what each node's guard has written, a line of JSON every so many seconds.
"""

import contextlib
import glob
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import every
import psutil  # vLLM requires it
import ray

GIB = 2**30
# An idle rank stays below these: a share of one processor, percent of a GPU, bytes of memory.
BUSY_CPU, BUSY_GPU, MOVED_BYTES = 0.1, 5, 64 * 2**20
CPU_S, GPU_S = 4, 5
GUARD, STALE_S, SILENT_S = "/dev/shm/node-memory.json", 2, 10
# The CUDA driver of a GB10 takes free pages. Below so many bytes it failed, or a load slowed down twentyfold, although
# the page cache would have been given back.
FREE_BYTES = 8 * GIB
HUB = os.path.expanduser("~/.cache/huggingface/hub")
# The counters are read every 2 s while they move. The server's log gets a line for each reading, so a server that
# stands still is read less often, down to every 15 s.
METRICS_S, STILL_METRICS_S = 2, 15
RUNNING, WAITING, ANSWERED = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:request_success_total"
MOVING = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:kv_cache_usage", "vllm:gpu_cache_usage", ANSWERED)
# The first letters of the programs that compile kernels for PyTorch, Triton and FlashInfer.
COMPILERS = ("nvcc", "cicc", "cudafe", "ptxas", "fatbinary", "nvlink", "ninja", "cc1", "collect2", "gcc", "g++", "c++")
# A server that ends in order has no process left after its first one. An OOM killer ends the first one alone.
GONE_S = 2
# After the server's end the recorder waits so long for the ranks to be gone and for the memory, but for SPARE_BYTES.
SETTLE_S, SPARE_BYTES = 60, 2 * GIB


# --- What a node does ------------------------------------------------------------------------------------------------


def family(wanted, found=None):
    """Return the wanted processes and their descendants among those found (None: all), by id."""
    if found is None:
        found = {one.pid: one.info for one in psutil.process_iter(["name", "ppid", "cpu_times"])}
    ids = {pid for pid, info in found.items() if wanted(pid, info["name"])}
    while more := {pid for pid, info in found.items() if info["ppid"] in ids} - ids:
        ids |= more
    return {pid: found[pid] for pid in ids}


def processor_time(processes):
    """Return the seconds of processor time that these processes took, and their children that have ended."""
    return sum(sum(info["cpu_times"][:4]) for info in processes.values())


def is_rank(_, name):
    # A rank's class in vLLM is RayWorkerWrapper (the older) or RayWorkerProc, and Ray names the process after it.
    return name.startswith("ray::RayWorker")


def compiler_time(processes):
    """Return the seconds of processor time that the compilers among these processes took, and all ended children.

    Triton's ptxas runs for less than a second, so often only its parent shows that it ran.
    """
    compilers = family(lambda _, name: name.startswith(COMPILERS), processes)
    others = processes.keys() - compilers.keys()
    return processor_time(compilers) + sum(sum(processes[pid]["cpu_times"][2:4]) for pid in others)


class Gauge:
    def __init__(self, model=""):
        self.blobs = f"{HUB}/models--{(model or '').replace('/', '--')}/blobs/*"
        names = ",".join(os.environ.get(name, "") for name in ("NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")).split(",")
        # A RoCE device carries data whether or not its interface has an address.
        for hca in filter(None, os.environ.get("NCCL_IB_HCA", "").split(",")):
            names += [os.path.basename(path) for path in glob.glob(f"/sys/class/infiniband/{hca}/device/net/*")]
        self.interfaces = sorted(set(names) - {""})
        self.gpu, self.last = None, -1  # the last shard that a rank was seen to read
        # A thread, because a driver that hangs must not stop the looks at the memory.
        threading.Thread(target=self.follow_gpu, daemon=True).start()

    def memory(self):
        """Return what this node's memory guard wrote last. Raises if that is old, because it is then unknown."""
        with open(GUARD) as opened:
            told = json.load(opened)
        if abs(time.time() - told["at"]) > STALE_S:
            raise TimeoutError(f"the memory guard has written nothing for {STALE_S} s")
        return told

    def look(self):
        ranks = family(is_rank)  # with the descendants, because a rank that waits for a compiler is at work
        links = psutil.net_if_stats()
        return self.memory() | {
            "ranks": sum(is_rank(pid, info["name"]) for pid, info in ranks.items()),
            "cpu": processor_time(ranks),
            "compilers": compiler_time(ranks),
            "gpu": self.gpu,
            "downloaded": self.downloaded(),
            "down": [name for name in self.interfaces if name not in links or not links[name].isup],
        }

    def downloaded(self):
        """Return the bytes of the model in the cache while vLLM downloads it; None if no file is under way."""
        sizes = {}
        for name in glob.glob(self.blobs):
            with contextlib.suppress(OSError):  # a file that gets its final name at this moment
                sizes[name] = os.path.getsize(name)
        return sum(sizes.values()) if any(name.endswith(".incomplete") for name in sizes) else None

    def evict(self, model):
        """Drop from the page cache the shards of the model that the ranks here have read. vLLM reads them by name.

        Raises OSError if the files of a rank cannot be seen, because a shard that is being read must stay.
        """
        names = glob.glob(f"{model}/*.safetensors")
        names += glob.glob(f"{HUB}/models--{model.replace('/', '--')}/snapshots/*/*.safetensors")
        shards, used = [os.path.realpath(name) for name in sorted(names)], set()
        for one in psutil.process_iter(["name"]):
            if is_rank(one.pid, one.info["name"]):
                with open(f"/proc/{one.pid}/maps") as lines:
                    used |= {"/" + line.rstrip("\n").partition("/")[2] for line in lines}
                used |= {os.path.realpath(name) for name in glob.glob(f"/proc/{one.pid}/fd/*")}
        self.last = max([self.last, *(number for number, shard in enumerate(shards) if shard in used)])
        for shard in {*shards[: self.last + 1]} - used:
            with open(shard, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def follow_gpu(self):
        words = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while True:
            self.gpu = None  # unknown while nvidia-smi runs: a driver that hangs must not leave the figure before
            with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
                self.gpu = int(subprocess.run(words, capture_output=True, text=True, timeout=GPU_S).stdout.split()[0])
            time.sleep(GPU_S)


def start_gauges(model=""):
    """Start a gauge on every node; return the gauges by address. Ray restarts a gauge that has died."""
    # Two threads, because an eviction may take longer than a look.
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=2)(Gauge)
    gauges = {node["NodeManagerAddress"]: actor.options(**every.pinned(node)).remote(model) for node in every.nodes()}
    ask(gauges, "memory", 30)  # the start of their processes takes longer than a look
    return gauges


def ask(gauges, method, seconds=3):
    """Return what each node's gauge answers; None if it does not answer in time."""
    answers = every.gather({address: getattr(gauge, method).remote() for address, gauge in gauges.items()}, seconds)
    return {address: None if isinstance(answer, Exception) else answer for address, answer in answers.items()}


# --- What does not move ----------------------------------------------------------------------------------------------


class Stillness:
    """The seconds for which each thing was seen not to move. A thing that could not be seen counts as moving."""

    def __init__(self):
        self.marks, self.moved, self.seen = {}, {}, {}

    def see(self, thing, value, least):
        """Note a value. A move is a difference of `least` or more from the value of the last move. None: not seen."""
        now = time.monotonic()
        if value is None or thing not in self.marks or abs(value - self.marks[thing]) >= least:
            self.marks[thing], self.moved[thing] = value or 0, now
        self.seen[thing] = now

    def see_cpu(self, thing, value):
        """Note seconds of processor time. They move if BUSY_CPU of a processor or more was used, over CPU_S or more."""
        now = time.monotonic()
        before, then = self.marks.get(thing, (None, 0))
        if value is None or before is None or value < before:
            self.marks[thing], self.moved[thing], self.seen[thing] = (value, now), now, now
        elif now - then >= CPU_S:
            if (value - before) / (now - then) >= BUSY_CPU:
                self.moved[thing] = now
            self.marks[thing], self.seen[thing] = (value, now), now

    def note(self, nodes, server, log):
        """Compare this look at the nodes, the server's processes and its log with the looks before."""
        for address, node in nodes.items():
            self.see(f"memory {address}", node and node["available"], MOVED_BYTES)
            self.see_cpu(f"cpu {address}", node and node["cpu"])
            self.see(f"download {address}", (node and node.get("downloaded")) or 0, 1)
            compiler = f"compiler {address}"
            # A node that does not answer shows no compiler at work, so here a missing answer counts as standing still.
            self.see_cpu(compiler, node["compilers"] if node else self.marks.get(compiler, (0, 0))[0])
        # A GPU at work moves at every look.
        working = any(node and (node["gpu"] or 0) >= BUSY_GPU for node in nodes.values())
        self.see("gpu", self.marks.get("gpu", 0) + working, 1)
        processes = family(lambda pid, _: pid == server)
        self.see_cpu("server_cpu", processor_time(processes))
        # The engine core spins while it waits for a rank. What remains unpacks prompts and answers clients.
        engine = family(lambda _, name: "EngineCore" in name, processes)
        self.see_cpu("api_cpu", processor_time(processes) - processor_time(engine))
        self.see("log", os.path.getsize(log) if os.path.exists(log) else 0, 1)

    def seconds(self):
        return {thing: self.seen[thing] - moved for thing, moved in self.moved.items()}


class Counters:
    """The seconds for which the API's counters have not moved, and for which requests waited or the API was silent.

    Both are needed to call a server hung, because the counters of an idle server do not move either. `running`: how
    many requests run. `answered`: whether a request was answered since the server's start.
    """

    def __init__(self, url):
        self.url, self.lines, self.running, self.answered = url, None, 0, False
        self.moved = self.idle = self.seen = time.monotonic()
        # A thread, because a server that hangs does not answer.
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(f"{self.url}/metrics", timeout=3) as answer:
                    lines = answer.read().decode().splitlines()
                self.running, waiting, answered = (total(lines, name) for name in (RUNNING, WAITING, ANSWERED))
                self.answered = answered > 0
                self.note([line for line in lines if line.startswith(MOVING)], self.running + waiting > 0)
            except urllib.error.HTTPError:
                self.note(self.lines, False)  # the server answers, but refuses its metrics
            except Exception:
                self.note(self.lines, True)  # not up yet, hung, or half an answer
            time.sleep(min(STILL_METRICS_S, max(METRICS_S, (self.seen - self.moved) / 2)))

    def note(self, lines, waits):
        now = time.monotonic()
        self.moved = now if lines != self.lines else self.moved
        self.idle = self.idle if waits else now
        self.lines, self.seen = lines, now

    def seconds(self):
        return {"counters": max(0, self.seen - self.moved), "waiting": max(0, self.seen - self.idle)}


def total(lines, name):
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


# --- The recorder ----------------------------------------------------------------------------------------------------


def runs(group):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def end(group, folder, by, why):
    """Ask a process group to end, write to ended.json why (`ended by ...`), and force the group after 5 s."""
    told = {"at": time.time(), "why": why, "by": by}
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        keep(f"{folder}/ended.json", told)  # after the signal, because a disk may hang
        deadline = time.monotonic() + patience
        while runs(group) and time.monotonic() < deadline:
            time.sleep(0.2)


def say(text):
    with contextlib.suppress(OSError):  # a full disk must not end the recorder
        print(f"recorder: {text}", flush=True)


def keep(file, value):
    with contextlib.suppress(OSError):  # as in say
        with open(f"{file}.new", "w") as opened:
            json.dump(value, opened)
        os.replace(f"{file}.new", file)


def shortage(nodes, last, floor, age):
    """Return why the server must be ended, because a node lacks memory; None if it need not be.

    last: for each node the time of its last answer, and the bytes that it then had. age: the server's, in seconds. An
    older kill was one of an earlier server.
    """
    for address, node in nodes.items():
        if node and node["killed"] and node["at"] - node["killed"]["at"] < age:
            return f"{address} had {node['killed']['available'] / GIB:.1f} GiB"
        since, available = last.get(address, (0, floor))
        if not node and available < floor and time.monotonic() - since >= SILENT_S:
            return f"{address} had {available / GIB:.1f} GiB, and then did not answer for {SILENT_S} s"


def left_on(nodes, before):
    """Return what a server has left on the nodes, as sentences. before: the bytes that each had before the launch."""
    left = []
    for address, had in before.items():
        node = nodes.get(address)
        if not node:
            left.append(f"{address} does not answer")
        elif node["ranks"]:
            left.append(f"{address} still has ranks: {node['ranks']}")
        elif (lacks := had - node["available"]) > SPARE_BYTES:
            left.append(f"{address} has {lacks / GIB:.1f} GiB less than before the launch")
    return left


def evict(gauges, nodes, model, asked):
    """Ask each node with few free pages to evict. asked: the last question to each node, which may be under way."""
    for address, node in nodes.items():
        under_way = address in asked and not ray.wait([asked[address]], timeout=0)[0]
        if node and node["free"] < FREE_BYTES and not under_way:
            asked[address] = gauges[address].evict.remote(model)


def record(pid_file, folder, url, floor, drop):
    with open(pid_file) as opened:
        server = int(opened.read())  # also the id of its process group
    began = os.path.getmtime(pid_file)
    lows, last, silent, evicting, model = {}, {}, {}, {}, None
    with contextlib.suppress(OSError, IndexError), open(f"{pid_file.removesuffix('.pid')}.words") as opened:
        model = opened.read().splitlines()[2]  # vllm serve MODEL; a server that is being stopped has no words
    still, counters, gauges = Stillness(), Counters(url), start_gauges(model)
    before = {address: told["available"] for address, told in ask(gauges, "memory").items() if told}
    with contextlib.suppress(OSError, ValueError, KeyError), open(f"{folder}/vitals.json") as opened:
        earlier = json.load(opened)  # by an earlier recorder of the same server, when the ranks had no memory yet
        before, lows = before | earlier["before"], earlier["lowest"]
    nodes, told, whole, short, until = {}, {}, time.monotonic(), None, time.monotonic() + SETTLE_S
    say(f"watching {', '.join(sorted(gauges))}")
    while (alive := runs(server)) or ((left := left_on(nodes, before)) and time.monotonic() < until):
        nodes, now = ask(gauges, "look"), time.monotonic()
        # Also after the end, which a guard may have caused; and before anything is written, because a disk may hang.
        if not short and (short := shortage(nodes, last if alive else {}, floor * GIB, time.time() - began)):
            say(f"the server ends, because {short}")
            end(server, folder, "memory guard", f"ended by the memory guard: {short}")
        if not alive or short or psutil.pid_exists(server):
            whole = now
        elif now - whole >= GONE_S:
            gone = f"its API server (process {server}) was gone, and other processes were left"
            end(server, folder, "recorder", f"ended by the recorder: {gone}")
        for address, node in nodes.items():
            if node:
                silent.pop(address, None)
                last[address] = now, node["lowest"]
                lows[address] = min(node["lowest"], lows.get(address, node["lowest"]))
            elif address not in silent:
                silent[address] = now
                say(f"{address} does not answer; its memory is unknown")
        still.note(nodes, server, f"{folder}/serve.log")
        quiet = still.seconds() | counters.seconds()
        silence = {address: now - since for address, since in silent.items()}
        told = {"at": time.time(), "nodes": nodes, "quiet": quiet, "silent": silence, "before": before, "floor": floor}
        told |= {"lowest": lows, "alive": alive, "running": counters.running, "answered": counters.answered}
        keep(f"{folder}/vitals.json", told)
        if drop and model and alive and counters.lines is None:  # the API does not answer yet, so the model loads
            evict(gauges, nodes, model, evicting)
        time.sleep(1)
        if alive:
            until = time.monotonic() + SETTLE_S
    keep(f"{folder}/vitals.json", told | {"alive": False})
    if left:
        text = f"{SETTLE_S} s after the server's end {'; '.join(left)}. To free every node: inv down"
        with contextlib.suppress(OSError), open(f"{folder}/left.txt", "w") as opened:
            print(text, file=opened)


def print_memory(pause):
    gauges = start_gauges()
    while True:
        print(json.dumps(ask(gauges, "memory")), flush=True)
        if select.select([sys.stdin], [], [], pause)[0]:  # standard input was closed
            return


if __name__ == "__main__":
    if sys.argv[1] == "--print":
        print_memory(float(sys.argv[2]))
    else:
        pid_file, folder, url, floor, drop = sys.argv[1:]
        record(pid_file, folder, url, float(floor), drop == "1")
