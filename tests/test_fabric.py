"""The transport that NCCL chose is read from NCCL's own log. TCP in place of RDMA never passes for fine."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import fabric, options
from cluster.agreement import Node
from cluster.fabric import Rank, fabric_findings, fabric_summary, link_rate, read_log, read_rank

TWO = "rocep1s0f1,roceP2p1s0f1"
RDMA = {"transports": ("IB",), "devices": ("rocep1s0f1", "roceP2p1s0f1")}
TCP = {"transports": ("Socket",), "devices": ("enp1s0f1np1",)}
NONE = {"transports": (), "devices": ()}
HEAD = Rank("10.0.0.1", "spark-1", "", "nccl", True, 2**28, 20, 0.0125, {"NCCL_IB_HCA": TWO}, **RDMA)
WORKER = replace(HEAD, address="10.0.0.2", hostname="spark-2", seconds=0.0128)

# In the form of NCCL's own lines: the built-in RoCE of 2.18, the plugin of NGC's images, devices that 2.24 and later
# combine, the devices of one card that 2.21 combined, and sockets.
BUILT_IN = """
spark-1:812:812 [0] NCCL INFO cudaDriverVersion 13000
spark-1:812:812 [0] NCCL INFO Bootstrap : Using enp1s0f1np1:10.0.0.1<0>
spark-1:812:812 [0] NCCL INFO NET/Plugin : No plugin found, using internal implementation
NCCL version 2.18.5+cuda12.2
spark-1:812:840 [0] NCCL INFO NCCL_IB_HCA set to rocep1s0f1,roceP2p1s0f1
spark-1:812:840 [0] NCCL INFO NET/IB : Using [0]rocep1s0f1:1/RoCE [1]roceP2p1s0f1:1/RoCE [RO]; OOB enp1s0f1np1:10.0.0.1
spark-1:812:840 [0] NCCL INFO Using network IB
spark-1:812:840 [0] NCCL INFO Channel 00/02 :    0   1
spark-1:812:840 [0] NCCL INFO Channel 00/0 : 1[f000000] -> 0[f000000] [receive] via NET/IB/0
spark-1:812:840 [0] NCCL INFO Channel 01/0 : 0[f000000] -> 1[f000000] [send] via NET/IB/1
spark-1:812:840 [0] NCCL INFO Connected all rings
"""
PLUGIN = """
spark-1:29:31 [0] NCCL INFO P2P plugin v10 IBext_v10
spark-1:29:31 [0] NCCL INFO NET/IB : Made virtual device [0] name=rocep1s0f1 speed=200000 ndevs=1
spark-1:29:31 [0] NCCL INFO NET/IB : Made virtual device [1] name=roceP2p1s0f1 speed=200000 ndevs=1
spark-1:29:31 [0] NCCL INFO NET/IB : Using [0]rocep1s0f1:1/RoCE [1]roceP2p1s0f1:1/RoCE [RO]; OOB enp1s0f1np1:10.0.0.1
spark-1:29:31 [0] NCCL INFO NET/IB : GPU Direct RDMA (DMABUF) enabled for HCA 0 'rocep1s0f1
spark-1:29:33 [0] NCCL INFO Channel 09/0 : 1[0] -> 0[0] [send] via NET/IBext_v10/1
spark-1:29:33 [0] NCCL INFO Channel 10/0 : 1[0] -> 0[0] [send] via NET/IBext_v10/0
"""
NAMED_PLUGIN = PLUGIN.replace("IBext_v10/", "NCCL RDMA Plugin v10/")
MADE_ONE = """
[2026-01-05 10:00:00] spark-1:29:31 [0] NCCL INFO NET/IB : No device found.
spark-1:29:31 [0] NCCL INFO NET/IB : Made virtual device [0] name=rocep1s0f1 speed=200000 ndevs=1
spark-1:29:31 [0] NCCL INFO NET/IB : Made virtual device [1] name=roceP2p1s0f1 speed=200000 ndevs=1
spark-1:29:31 [0] NCCL INFO NET/IB : Made virtual device [2] name=rocep1s0f1+roceP2p1s0f1 speed=400000 ndevs=2
spark-1:29:31 [0] NCCL INFO NET/IB : Using [0]rocep1s0f1:1/RoCE [1]roceP2p1s0f1:1/RoCE [RO]; OOB enp1s0f1np1:10.0.0.1
spark-1:29:31 [0] NCCL INFO Initialized NET plugin IB
spark-1:29:31 [0] NCCL INFO Assigned NET plugin IB to comm
spark-1:29:31 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/2/GDRDMA
"""
ONE_CARD = """
a:1:2 [0] NCCL INFO NET/IB : Using [0]={[0] mlx5_0:1/RoCE, [1] mlx5_1:1/RoCE} [1]mlx5_2:1/RoCE [RO]; OOB eth0:10.1.0.1
a:1:2 [0] NCCL INFO Channel 00/0 : 3[1] -> 4[0] [send] via NET/IBext/0(2)/GDRDMA/Shared
"""
SOCKETS = """
spark-1:9:12 [0] NCCL INFO NET/IB : No device found.
spark-1:9:12 [0] NCCL INFO NET/Socket : Using [0]enp1s0f1np1:10.0.0.1<0> [1]enp1s0f0np0:fe80::4ebb%enp1s0f0np0<0>
spark-1:9:12 [0] NCCL INFO Using network Socket
spark-1:9:12 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/1
spark-1:9:12 [0] NCCL INFO Channel 01/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
"""
BROKEN = """
spark-1:9:12 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0
spark-1:9:14 [0] misc/ibvwrap.cc:187 NCCL WARN Call to ibv_modify_qp failed with error Connection timed out errno 110
spark-1:9:14 [0] NCCL INFO transport/net_ib.cc:1432 -> 2
"""


@pytest.mark.parametrize(
    ("log", "names", "devices"),
    [
        (BUILT_IN, ("IB",), ("rocep1s0f1", "roceP2p1s0f1")),
        (PLUGIN, ("IBext_v10",), ("roceP2p1s0f1", "rocep1s0f1")),
        (NAMED_PLUGIN, ("NCCL RDMA Plugin v10",), ("roceP2p1s0f1", "rocep1s0f1")),
        (MADE_ONE, ("IB",), ("rocep1s0f1", "roceP2p1s0f1")),
        (ONE_CARD, ("IBext",), ("device 0",)),
        (SOCKETS, ("Socket",), ("enp1s0f0np0", "enp1s0f1np1")),
        (BROKEN, ("IB",), ("device 0",)),
        ("a:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM", (), ()),
        ("", (), ()),
    ],
    ids=["2.18", "plugin", "named plugin", "2.27", "one card", "sockets", "no offer", "one host", "silence"],
)
def test_the_transport_is_read_from_the_channels(log, names, devices):
    """Only the lines about channels count. An offered transport is not a chosen one."""
    assert read_log(log) == (names, devices)


def test_a_healthy_fabric_has_a_rate_and_no_finding():
    """The slowest rank's time counts. busbw is algbw times 2(n-1)/n, as nccl-tests has it."""
    assert fabric_findings((HEAD, WORKER)) == []
    said = fabric_summary((HEAD, WORKER))
    assert said[0] == "10.0.0.1 (spark-1): NET/IB on rocep1s0f1, roceP2p1s0f1"
    assert "256 MiB between 2 nodes, 20 times: 20.97 GB/s, on the wire 20.97 GB/s or 167.8 Gbit/s" in said[2]
    assert "20.97 GB/s, on the wire 31.46 GB/s" in fabric_summary((HEAD, WORKER, WORKER, WORKER))[4]


def node(address, **devices):
    """A node with these RoCE devices, each with its interface and its speed in Mbit/s."""
    shown = {name: {"netdev": netdev, "speed": speed} for name, (netdev, speed) in devices.items()}
    facts = {"environment": {"NCCL_IB_HCA": TWO}, "devices": shown or {"unknown": "no such folder"}}
    return Node(address, "spark", 1, facts)


def test_a_port_counts_once_in_the_speed_of_the_links():
    """A Spark shows a port as two devices, each with the port's whole speed. The slower node decides."""
    one_port = {"rocep1s0f1": ("enp1s0f1np1", 200000), "roceP2p1s0f1": ("enP2p1s0f1np1", 200000)}
    two_ports = {"rocep1s0f1": ("enp1s0f1np1", 200000), "roceP2p1s0f1": ("enP2p1s0f0np0", 200000)}
    assert link_rate([node("a", **one_port), node("b", **one_port)]) == 25e9
    assert link_rate([node("a", **two_ports), node("b", **two_ports)]) == 50e9
    assert link_rate([node("a", **two_ports), node("b", **one_port)]) == 25e9
    assert link_rate([node("a", **two_ports), node("b")]) == 0 == link_rate([])


def test_less_than_two_fifths_of_the_links_is_a_warning():
    """200 Gbit/s that carry 13 are found. Where the speed is unknown, or gloo moved the bytes, nothing is judged."""
    ranks = (replace(HEAD, seconds=0.165), replace(WORKER, seconds=0.165))
    (slow,) = fabric_findings(ranks, 25e9)
    assert slow.rule == "fabric" and not slow.refuses and "moved 13.0 of the links' 200 Gbit/s" in slow.text
    assert fabric_findings((HEAD, WORKER), 50e9) == [] == fabric_findings(ranks)
    assert fabric_findings([replace(rank, backend="gloo", **NONE) for rank in ranks], 25e9) == []
    assert "speed of the RoCE devices is unknown, so the rate was not judged" in fabric_summary(ranks)[-1]
    assert "unknown" not in fabric_summary(ranks, 25e9)[-1]


def test_the_latency_and_each_gpu_are_told():
    """Decoding waits for small all-reduces. A rank without CUDA has measured no GPU."""
    said = fabric_summary((replace(HEAD, latency=31e-6, copied=240e9, computed=9.2e13), replace(WORKER, latency=33e-6)))
    assert (
        "One of 16 KiB takes 33 µs." in said[2]
        and said[3] == "10.0.0.1: the GPU copies 240 GB/s and computes 92 TFLOP/s."
    )


@pytest.mark.parametrize(
    ("copied", "computed", "words"),
    [
        (190e9, 80e12, None),
        (80e9, 90e12, "10.0.0.2: the GPU copies 80 GB/s, that of 10.0.0.1 240."),
        (240e9, 30e12, "10.0.0.2: the GPU computes 30 TFLOP/s, that of 10.0.0.1 92."),
    ],
)
def test_gpus_that_differ_by_more_than_a_quarter_are_a_warning(copied, computed, words):
    """A Spark in a low-power state holds the other one up, and nvidia-smi shows nothing."""
    ranks = (replace(HEAD, copied=240e9, computed=92e12), replace(WORKER, copied=copied, computed=computed))
    found = fabric_findings(ranks)
    assert [one.refuses for one in found] == ([False] if words else [])
    assert all(words in one.text and "low-power state" in one.text for one in found)


def test_tcp_where_rdma_was_asked_for_is_refused():
    """For each rank the text names the devices that were set, and the transport that was used."""
    ranks = tuple(replace(each, **TCP) for each in (HEAD, WORKER))
    first, second = fabric_findings(ranks)
    assert first.refuses and first.rule == "fabric"
    assert f"10.0.0.1: RDMA was asked for (NCCL_IB_HCA={TWO}), but NCCL fell back to TCP: NET/Socket on" in first.text
    assert second.text.startswith("10.0.0.2")
    on_purpose = tuple(replace(each, environment={"NCCL_IB_DISABLE": "1"}) for each in ranks)
    assert fabric_findings(on_purpose) == []


def test_a_log_without_a_channel_is_no_proof():
    """RDMA is refused where the log does not say which transport was used."""
    ranks = tuple(replace(each, **NONE) for each in (HEAD, WORKER))
    assert ["opened no channel" in one.text and one.refuses for one in fabric_findings(ranks)] == [True, True]


def test_a_rank_that_differs_is_refused():
    """The rank that fell back to TCP, or whose container lacks a GPU, is named."""
    (fell,) = fabric_findings((HEAD, replace(WORKER, **TCP)))
    assert fell.refuses and fell.text.startswith("10.0.0.2: RDMA was asked for") and "fell back to TCP" in fell.text
    gloo = {"backend": "gloo", **NONE}
    (lacks,) = fabric_findings((replace(HEAD, **gloo), replace(WORKER, cuda=False, **gloo)))
    assert lacks.refuses and "10.0.0.2: torch finds no GPU" in lacks.text


@pytest.mark.parametrize(
    ("hca", "used", "idle"),
    [
        (TWO, "rocep1s0f1", ["roceP2p1s0f1"]),
        ("roce", "rocep1s0f1", []),
        ("rocep1s0f1", "rocep1s0f1", []),
        (TWO, "device 2", []),
    ],
)
def test_a_device_that_was_listed_and_not_used_is_a_warning(hca, used, idle):
    """Half the devices are half the rate: a warning. Prefixes and nameless devices warn of nothing."""
    one = replace(HEAD, environment={"NCCL_IB_HCA": hca}, devices=(used,))
    found = [each for each in fabric_findings((one, WORKER)) if "10.0.0.1" in each.text]
    assert [each.refuses for each in found] == [False] * bool(idle)
    assert all(f"and not {', '.join(idle)}" in each.text for each in found)


def test_gloo_is_named():
    """Without CUDA there is a rate, a note and no failure, even if RDMA was wanted."""
    network = {"GLOO_SOCKET_IFNAME": "enp1s0f1np1", "NCCL_IB_HCA": TWO}
    gloo = {"backend": "gloo", "cuda": False, "size": 2**25, "environment": network, **NONE}
    ranks = (replace(HEAD, **gloo), replace(WORKER, **gloo))
    assert fabric_findings(ranks) == []
    said = fabric_summary(ranks)
    assert said[0].endswith("gloo on enp1s0f1np1") and "All-reduce of 32 MiB" in said[2]
    assert "proves the network only" in said[3]


def test_a_rank_that_hangs_tells_its_transport_and_the_cause():
    """NCCL's first warning is the cause. No rate is told for ranks that did not finish."""
    said = {"told": "", "environment": {}}
    hung = read_rank({"address": "10.0.0.1", "hostname": "spark-1", "status": -9, "log": BROKEN, **said})
    lost = read_rank({"address": "10.0.0.2", "hostname": "spark-2", "error": "no answer within 48 s"})
    texts = [one.text for one in fabric_findings((hung, lost)) if one.refuses]
    assert "did not finish: it hung, over NET/IB on device 0: Call to ibv_modify_qp failed" in texts[0]
    assert "10.0.0.2: the all-reduce did not finish: no answer within 48 s" in texts[1]
    assert fabric_summary((hung, lost)) == []
    failed = read_rank({"address": "a", "hostname": "b", "status": 1, "log": "x\nRuntimeError: refused\n", **said})
    assert failed.error == "status 1: RuntimeError: refused"
    silent = read_rank({"address": "a", "hostname": "b", "status": 1, "log": "", **said})
    assert silent.error == "status 1: it said nothing"


def test_one_node_has_no_fabric():
    """One node proves nothing, so it is refused."""
    (one,) = fabric_findings((HEAD,))
    assert one.refuses and one.text.endswith("Type inv worker")
    (one,) = fabric_findings((HEAD,), 0, "on the other node: PORT=1 inv worker --model nemotron")
    assert one.text.endswith("Type on the other node: PORT=1 inv worker --model nemotron")


def test_the_containers_answer_becomes_ranks(monkeypatch):
    """The last line is JSON, whatever came before it. Anything else is an error, not an empty fabric."""
    told = {"backend": "gloo", "cuda": False, "size": 4, "iterations": 1, "seconds": 0.5}
    answer = {"address": "a", "hostname": "b", "status": 0, "told": f"noise\n{json.dumps(told)}\n", "log": ""}
    answer["environment"] = {"NCCL_IB_HCA": TWO}
    said = iter([f"noise\n{json.dumps([answer])}\n", "Killed"])
    monkeypatch.setattr(options, "ask_container", lambda *_: next(said))
    head = SimpleNamespace(name="node-ray", attrs={"Config": {"Env": ["NODE_RAY_REPOSITORY=0123"]}})
    (one,) = fabric.ask_fabric(head)
    assert one.seconds == 0.5 and one.hcas == TWO
    with pytest.raises(Exit, match=r"unreadable answer .*'Killed'"):
        fabric.ask_fabric(head)
