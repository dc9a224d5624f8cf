"""The fabric proved between two stand-in Sparks, and a cable pulled while it is."""

import threading
import time

import docker
import pytest

from checks import fabric
from checks.fabric import Fabric
from rehearsal.hosts import Host
from rehearsal.links import LINKS
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
DATA = next(link for link in LINKS if link.roce == "rocep1s0f0")


def ask(host: Host) -> Fabric:
    """The fabric as the host's own container sees it."""
    return fabric.ask(docker.DockerClient(base_url=host.engine.env["DOCKER_HOST"]).containers.get("node-ray"))


def left(host: Host) -> str:
    """Processes of a rank in the host's container."""
    return host.run("docker", "exec", "node-ray", "pgrep", "-af", "all_reduce|ask_fabric|ray::rank").stdout


def meeting(host: Host) -> bool:
    """Whether ranks are connected over the data link."""
    filters = ("dst", f"{DATA.subnet}.0/24")
    return bool(host.run("ss", "--no-header", "--tcp", "--numeric", "state", "established", *filters).stdout)


def test_the_fabric_of_stand_ins_is_gloo_with_a_rate(cluster, sparks):
    """Two ranks, a rate, no finding, the note that it proves the network only; and nothing is left."""
    before = [host.run("docker", "diff", "node-ray").stdout for host in sparks]
    found = ask(sparks[0])
    assert fabric.findings(found) == []
    assert [rank.address for rank in found.ranks] == [host.address for host in sparks]
    assert found.bus_bandwidth > 10e6
    said = "\n".join(fabric.summary(found))
    assert f"gloo on {found.ranks[0].environment['GLOO_SOCKET_IFNAME']}" in said and "proves the network only" in said
    for host, known in zip(sparks, before, strict=True):
        assert wait(lambda host=host: not left(host), 10), left(host)
        new = set(host.run("docker", "diff", "node-ray").stdout.splitlines()) - set(known.splitlines())
        assert [line for line in new if " /tmp/ray" not in line and "__pycache__" not in line] == []


def test_a_cable_pulled_in_the_middle_ends_it_in_time(rig, cluster, sparks):
    """No rank waits for ever: each says that it did not finish, and with the cable back the same is well."""
    asked: list[Fabric] = []
    start = time.monotonic()
    asking = threading.Thread(target=lambda: asked.append(ask(sparks[0])))
    asking.start()
    assert wait(lambda: meeting(sparks[0]), 30, pause=0.02)
    rig.link_down(sparks[0], DATA.netdev)
    asking.join(fabric.SECONDS + 10)
    rig.link_up(sparks[0], DATA.netdev)
    assert asked and time.monotonic() - start < fabric.SECONDS + 10
    texts = [one.text for one in fabric.findings(asked[0]) if one.refuses]
    assert texts and all("did not finish" in text for text in texts), texts
    assert all(wait(lambda host=host: not left(host), 10) for host in sparks)
    assert wait(lambda: fabric.findings(ask(sparks[0])) == [], 30)
