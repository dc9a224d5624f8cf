"""What vLLM printed while a model was loaded here is kept, and found again for the same line."""

import json
import time
from types import SimpleNamespace

import pytest

from cluster import readings
from cluster.finding import GIB
from cluster.memory import Loaded
from cluster.models import find_model
from cluster.readings import keep_readings, loads_here, note_load, read_printed
from cluster.settings import load_settings

HERE = "(EngineCore pid=7) (RayWorkerProc pid=92) INFO 11-24 03:04:05"
THERE = "(EngineCore pid=7) \x1b[36m(RayWorkerProc pid=93, ip=10.0.0.2)\x1b[0m INFO 11-24 03:04:05"
# The shapes are those of 0.21.0 on two ranks, and the sizes those of a real start on two H100.
CUDA = f"""\
{HERE} [gpu_model_runner.py:4960] Model loading took 35.1 GiB memory and 62.104501 seconds
{THERE} [gpu_model_runner.py:4960] Model loading took 35.12 GiB memory and 63.000000 seconds
{HERE} [gpu_worker.py:463] Available KV cache memory: 20.03 GiB
{THERE} [gpu_worker.py:463] Available KV cache memory: 20.01 GiB
(EngineCore pid=7) INFO 11-24 03:04:05 [kv_cache_utils.py:1710] GPU KV cache size: 10,009,134 tokens
(EngineCore pid=7) INFO 11-24 03:04:05 [kv_cache_utils.py:1711] Maximum concurrency for 1,048,576 tokens: 9.55x
{HERE} [gpu_model_runner.py:6244] Graph capturing finished in 9 secs, took 0.43 GiB
(APIServer pid=1) INFO:     Application startup complete.
"""
CPU = f"""\
{HERE} [cpu_worker.py:260] Auto set (2.93/23.50) GiB for KV cache on node 0, with 4.70 GiB requested memory
{THERE} [cpu_worker.py:260] Explicitly set (1.00/23.50) GiB for KV cache on node 0.
(EngineCore pid=7) INFO 11-24 03:04:05 [kv_cache_utils.py:2328] CPU KV cache size: 2,097,152 tokens, Maximum concurrency
"""
READ = Loaded("2026-11-24", 0.75, int(20.01 * GIB), int(35.12 * GIB), int(0.43 * GIB))


class Site:
    """A head whose log folder is a folder of this test."""

    def __init__(self, folder):
        self.folder = folder / "node-ray"
        self.folder.mkdir()
        self.head = SimpleNamespace(image=SimpleNamespace(id="sha256:a"))
        self.shell = {"ENV_FILE": "", "HOME": "/home/operator", "CACHE_DIR": str(folder)}

    def settings(self, **shell):
        """The settings of Nemotron, as its profile has them."""
        return load_settings(find_model("nemotron"), shell=self.shell | shell)

    def loads(self, log=CUDA, **shell):
        """Launch, let the server write its log, and let a task see it."""
        note_load(self.settings(**shell))
        (self.folder / "serve.log").write_text(log)
        keep_readings(self.settings(**shell))

    def kept(self):
        """What is kept so far."""
        file = self.folder / "readings.json"
        return json.loads(file.read_text()) if file.exists() else []


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A head on a certain day."""
    made = Site(tmp_path)
    monkeypatch.setattr(readings, "node_container", lambda: made.head)
    day = time.strptime("2026-11-24", "%Y-%m-%d")
    monkeypatch.setattr(readings, "time", SimpleNamespace(strftime=lambda form: time.strftime(form, day)))
    return made


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            CUDA,
            [{"model": 35.1, "cache": 20.03, "graphs": 0.43, "tokens": 10_009_134}, {"model": 35.12, "cache": 20.01}],
        ),
        (CPU, [{"cache": 2.93, "tokens": 2_097_152}, {"cache": 1.0}]),
        ("(APIServer pid=1) INFO:     Application startup complete.", []),
    ],
    ids=["CUDA", "CPU", "nothing"],
)
def test_what_each_rank_printed(log, expected):
    """Ray writes the address of another node before its rank's lines. The lines of the head have none."""
    read = read_printed(log.splitlines(), "10.0.0.1")
    assert read == dict(zip(("10.0.0.1", "10.0.0.2"), expected, strict=False))


def test_a_load_is_kept_once_and_found_again(site):
    """The worst node counts. The context, names, parsers and GPU_MEM_UTIL do not change what a rank takes."""
    site.loads()
    keep_readings(site.settings())
    assert len(site.kept()) == 1 and loads_here(site.settings(), site.head) == [READ]
    same = {"MAX_MODEL_LEN": "64K", "GPU_MEM_UTIL": "0.6", "PORT": "1", "SERVED_NAME": "x", "REASONING_PARSER": "y"}
    assert loads_here(site.settings(**same, ENGINE_TIMEOUT_S="7"), site.head) == [READ]


@pytest.mark.parametrize(
    "change",
    [
        *({"MAX_NUM_SEQS": "4"}, {"ENABLE_MTP": "1"}, {"ENABLE_EAGER": "1"}, {"TP_SIZE": "1"}, {"KV_CACHE_DTYPE": ""}),
        *({"MAX_NUM_BATCHED_TOKENS": "16K"}, {"SERVE_EXTRA": "--block-size 32"}, {"MODEL_CKPT": "a/b"}),
        *({"VLLM_NVFP4_GEMM_BACKEND": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_line_has_no_readings(change, site):
    """An option or a variable may change what a rank takes, and so may another image."""
    site.loads()
    assert loads_here(site.settings(**change), site.head) == []
    assert loads_here(site.settings(), SimpleNamespace(image=SimpleNamespace(id="sha256:b"))) == []


def test_a_load_that_did_not_come_up_is_not_kept(site):
    """Its readings may be those of a rank that failed. The next look at its log may find it ready."""
    site.loads(CUDA.replace("Application startup complete", "..."))
    assert site.kept() == []
    (site.folder / "serve.log").write_text(CUDA)
    keep_readings(site.settings())
    assert len(site.kept()) == 1


def test_a_log_without_a_note_is_no_reading(site):
    """serve.sh deletes the note when a server starts. So an unknown server's log is not taken for another's."""
    (site.folder / "serve.log").write_text(CUDA)
    keep_readings(site.settings())
    assert site.kept() == []


LOAD = {"on": "2026-11-24", "utilization": 0.75, "key": None, "nodes": {"10.0.0.1": {"cache": 20.01}}}
DAMAGED = ["{", "7", '{"key": 1}', "[7, null, []]"]
CHANGES = ({"nodes": 7}, {"nodes": {}}, {"nodes": {"a": {"cache": "x"}}}, {"utilization": []})
DAMAGED += [json.dumps([LOAD | change]) for change in CHANGES]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_ignored(text, site, monkeypatch):
    """The allowances count again, and the next load is kept."""
    (site.folder / "readings.json").write_text(text)
    with monkeypatch.context() as same:
        same.setattr(readings, "_load_key", lambda *_: None)
        assert loads_here(site.settings(), site.head) == []
    site.loads()
    assert loads_here(site.settings(), site.head) == [READ]
