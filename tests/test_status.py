"""`inv status`: a row for each node, the server that they run, and one question to Ray."""

import json
import time
from types import SimpleNamespace

import pytest

from cluster import status
from cluster.agreement import Node
from cluster.health import Seen, State, Verdict
from cluster.recorder import GIB
from cluster.served import Served

HEAD, WORKER = "10.0.0.1", "10.0.0.2"
NOW = time.time()
FACTS = {
    "since": NOW - 7200,
    "image": "sha256:0123456789abcdef base",
    "memory": {"MemAvailable": 20 * GIB, "MemFree": 9 * GIB, "Cached": 10 * GIB, "SwapTotal": 2 * GIB, "SwapFree": GIB},
    "links": {"roce0": {"state": "up"}, "roce1": {"state": "down"}},
    "vllm": "0.21.0",
    "ray": "2.55.0",
    "gpus": [{"name": "NVIDIA GB10", "memory": None, "clock_mhz": 2418.0, "power_w": None, "temperature_c": 61.0}],
    "environment": {"NCCL_SOCKET_IFNAME": "roce0,roce1,roce2"},
}
SERVER = Served(True, NOW - 600, ("vllm", "serve", "some/model", "--max-model-len", "131072"))


class Asked(list):
    """The questions, and the environment of the container that is asked."""


@pytest.fixture
def asked(monkeypatch):
    """A head that Ray's nodes are asked of; the list has each question, and the addresses that health was given."""
    asked = Asked()
    env = {"VLLM_HOST_IP": HEAD, "MASTER_ADDR": HEAD}
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(time, "time", lambda: NOW)  # the tests before this one may have taken long
    monkeypatch.setattr(status, "node_container", lambda: SimpleNamespace(status="running"))
    monkeypatch.setattr(status, "is_earlier", lambda _: False)
    monkeypatch.setattr(status, "container_environment", lambda _: env)
    monkeypatch.setattr(status, "container_age", lambda _: "3 h")
    monkeypatch.setattr(status, "ask_nodes", lambda _: (asked.append("Ray"), [Node(HEAD, "spark-1", 1, FACTS)])[1])
    monkeypatch.setattr(status, "read_lows", lambda _: {HEAD: 5 * GIB, WORKER: 4 * GIB})
    seen, verdict = Seen(SERVER), Verdict(State.RANK_LOST, "One is gone.", "inv down")
    monkeypatch.setattr(status, "look", lambda _, nodes: (asked.append(nodes), (verdict, seen))[1])
    asked.env = env
    return asked


def test_the_screen_has_every_node_and_the_server(asked, capsys):
    """A node that Ray has lost since the launch has a row, links that are down are named, and Ray is asked once."""
    status.report_status({}, as_json=True)
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert asked == ["Ray", [HEAD]]
    assert (told["container"], told["head"], told["state"]) == ("running", HEAD, "rank lost")
    assert told["server"].keys() == {"model", "checkpoint", "context", "ranks", "alive", "since"}
    assert told["server"]["context"] == 131072
    head, lost = told["nodes"]
    assert head["links"] == {"roce0": "up", "roce1": "down", "roce2": "missing"} and head["lowest"] == 5 * GIB
    assert [head[name] / GIB for name in ("available", "free", "cached", "swap")] == [20, 9, 10, 1]
    assert "GiB on 10.0.0.1: 20.0 available, 9.0 free, 10.0 cached, 1.0 swap, 5.0 lowest\n" in err
    assert "GiB on 10.0.0.2: unknown available, unknown free, unknown cached, unknown swap, 4.0 lowest" in err
    assert head.keys() == lost.keys() and (head["alive"], lost["alive"], lost["address"]) == (True, False, WORKER)
    assert "some/model (some/model), 131,072 tokens, 1 ranks, launched 10 min ago" in err and "2 h ago" in err
    assert "rank lost: One is gone. Next: inv down" in err and "vLLM 0.21.0, Ray 2.55.0" in err
    assert head["gpus"] == FACTS["gpus"] and "GPU of 10.0.0.1: 2418 MHz, 61 °C\n" in err
    (row,) = (line for line in err.splitlines() if line.startswith("  10.0.0.1"))
    assert len(row) <= 80 and row.split("   ")[-1].strip() == "roce1 down, roce2 missing", "no cell is folded"


def test_a_fact_that_is_unknown_is_not_guessed(asked, capsys, monkeypatch):
    """A node that reports no facts has a row of unknowns."""
    silent = Node(HEAD, "spark-1", 1, {"unknown": "no answer in 15 s"})
    monkeypatch.setattr(status, "ask_nodes", lambda _: [silent])
    status.report_status({}, as_json=True)
    out, err = capsys.readouterr()
    (head, _) = json.loads(out)["nodes"]
    assert {head[name] for name in ("since", "image", "vllm", "available", "links")} == {None} and "unknown" in err


def test_a_cluster_of_an_earlier_version_is_not_asked(asked, capsys, monkeypatch):
    """The screen shows the state and the next command, and no table."""
    monkeypatch.setattr(status, "is_earlier", lambda _: True)
    verdict = Verdict(State.UNKNOWN, "An earlier version.", "inv down")
    monkeypatch.setattr(status, "look", lambda *_: (verdict, Seen()))
    status.report_status({}, as_json=True)
    out, err = capsys.readouterr()
    assert err == "unknown: An earlier version. Next: inv down\n" and asked == []
    assert (json.loads(out)["nodes"], json.loads(out)["server"]) == ([], None)


@pytest.mark.parametrize(
    ("container", "said"),
    [
        (None, "No node-ray runs on this node. Type: inv up --model NAME"),
        (SimpleNamespace(status="exited"), "node-ray is exited. Type: inv cleanup"),
        (SimpleNamespace(status="running"), "This node is a worker of 10.0.0.1, for 3 h. On the head type: inv status"),
    ],
    ids=["none", "exited", "worker"],
)
def test_a_worker_reports_only_itself(container, said, asked, capsys, monkeypatch):
    """Ray is not asked. The message names the node on which to ask."""
    monkeypatch.setattr(status, "node_container", lambda: container)
    asked.env["VLLM_HOST_IP"] = WORKER
    status.report_status({}, as_json=True)
    out, err = capsys.readouterr()
    assert (err.strip(), json.loads(out)["nodes"], asked) == (said, [], [])
