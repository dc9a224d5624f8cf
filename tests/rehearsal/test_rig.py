"""A stand-in Spark has links, a name and devices of its own, and nothing of this machine's operator."""

from pathlib import Path

import pytest

from rehearsal.flow import IMAGE
from rehearsal.hosts import CABLES
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal


def carrier(host, cable) -> str:
    """Read a carrier in the host's sysfs tree, by way of the RoCE device."""
    file = f"{host.env['SYSFS']}/class/infiniband/{cable.roce}/device/net/{cable.netdev}/carrier"
    return host.run("cat", file).stdout.strip()


@pytest.mark.parametrize("cable", CABLES, ids=lambda cable: cable.netdev)
def test_a_link_that_is_down_at_the_other_end_has_no_carrier(rig, cable):
    """The carrier comes back when the switch's end is up again."""
    host = rig.hosts[0]
    assert carrier(host, cable) == "1"
    rig.link_down(host, cable.netdev)
    assert wait(lambda: carrier(host, cable) == "0", 20)
    rig.link_up(host, cable.netdev)
    assert wait(lambda: carrier(host, cable) == "1", 20)


def test_hosts_have_names_addresses_and_devices_of_their_own(sparks):
    """A container on the host's network sees the host's name, its control link and /dev/infiniband."""
    for host in sparks:
        asked = "hostname; ip -4 -br address show enp1s0f1np1; ls /dev/infiniband"
        line = ("docker", "run", "--rm", "--network", "host", "--device=/dev/infiniband", IMAGE, "sh", "-c", asked)
        said = host.run(*line).stdout.split()
        assert [host.name, f"{host.address}/24", "uverbs0"] == [said[0], said[3], said[4]]
    assert not Path("/dev/infiniband").exists()


def test_nothing_of_the_operator_reaches_a_host(sparks, monkeypatch):
    """The tasks on a host do not see the variables of the shell that started the rehearsal."""
    monkeypatch.setenv("NCCL_IB_HCA", "the operator's")
    assert "NCCL_IB_HCA" not in sparks[0].run("env").stdout
