"""`check --fabric` between two stand-in Sparks, also while a cable is pulled."""

import threading
import time

import docker
import pytest

from cluster import options
from cluster.fabric import SECONDS, Rank, ask_fabric, fabric_findings, fabric_summary
from rehearsal.hosts import CABLES, Host
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
DATA = next(link for link in CABLES if link.roce == "rocep1s0f0")
# The container's fabric.py with other numbers: the all-reduce outlasts the test's look at it, and the ranks' patience
# with each other is shorter.
LASTS_S, PATIENCE_S = 20, 10
SLOW = "/tmp/slow"
MAKE_SLOW = (
    f"rm -rf {SLOW} && cp -r {options.INSIDE} {SLOW} && sed -i "
    f"-e 's/^MEASURED_S, MOST_TIMES = .*/MEASURED_S, MOST_TIMES = {LASTS_S}, 10**6/' "
    f"-e 's/timedelta(seconds=30)/timedelta(seconds={PATIENCE_S})/' {SLOW}/fabric.py && "
    f"grep -c '= {LASTS_S}, 10\\|seconds={PATIENCE_S})' {SLOW}/fabric.py"
)


def ask(host: Host) -> list[Rank]:
    """Every rank, asked in the host's own container."""
    return ask_fabric(docker.DockerClient(base_url=host.env["DOCKER_HOST"]).containers.get("node-ray"))


def left(host: Host) -> str:
    """The processes of a rank that are left in the host's container."""
    return host.run("docker", "exec", "node-ray", "pgrep", "-af", "/fabric.py|ray::start_rank").stdout


def meeting(host: Host) -> bool:
    """Whether ranks are connected over the data link."""
    filters = ("dst", f"{DATA.subnet}.0/24")
    return bool(host.run("ss", "--no-header", "--tcp", "--numeric", "state", "established", *filters).stdout)


def test_the_fabric_of_stand_ins_is_gloo_with_a_rate(cluster, sparks):
    """Two ranks have a rate, no finding, and a note that gloo proves only the network. No process of them stays."""
    before = [host.run("docker", "diff", "node-ray").stdout for host in sparks]
    ranks = ask(sparks[0])
    assert fabric_findings(ranks) == []
    assert [rank.address for rank in ranks] == [host.address for host in sparks]
    assert all(rank.size / rank.seconds > 10e6 and 0 < rank.latency < 1 for rank in ranks)
    said = "\n".join(fabric_summary(ranks))
    assert f"gloo on {ranks[0].environment['GLOO_SOCKET_IFNAME']}" in said and "proves the network only" in said
    for host, known in zip(sparks, before, strict=True):
        assert wait(lambda host=host: not left(host), 30), left(host)
        new = set(host.run("docker", "diff", "node-ray").stdout.splitlines()) - set(known.splitlines())
        assert [line for line in new if " /tmp/ray" not in line and "__pycache__" not in line] == []


def test_a_cable_pulled_in_the_middle_ends_it_in_time(rig, cluster, sparks, monkeypatch):
    """No rank waits for ever: each reports that it did not finish. With the cable back the proof succeeds."""
    for host in sparks:
        assert host.run("docker", "exec", "node-ray", "sh", "-c", MAKE_SLOW).stdout == "2\n"
    asked: list[list[Rank]] = []
    start = time.monotonic()
    asking = threading.Thread(target=lambda: asked.append(ask(sparks[0])))
    with monkeypatch.context() as now:
        now.setattr(options, "INSIDE", SLOW)
        asking.start()
        assert wait(lambda: meeting(sparks[0]), 60, pause=0.02)
        rig.link_down(sparks[0], DATA.netdev)
        asking.join(SECONDS + 10)
        rig.link_up(sparks[0], DATA.netdev)
    assert asked and time.monotonic() - start < SECONDS + 10
    texts = [one.text for one in fabric_findings(asked[0]) if one.refuses]
    assert texts and all("did not finish" in text for text in texts), texts
    assert all(wait(lambda host=host: not left(host), 30) for host in sparks)
    assert wait(lambda: fabric_findings(ask(sparks[0])) == [], 60)
