"""`inv doctor` on two stand-in Sparks, over a real sshd, with the faults that a stand-in can have of its own."""

import json
import subprocess
from collections.abc import Iterator

import pytest
from operating import inv
from shells import FULL, Shells

from rehearsal.hosts import CABLES, CONTROL, Host
from rehearsal.rig import Rig

pytestmark = pytest.mark.rehearsal
WORKER = {"WORKER_HOSTS": "spark-2"}
# The stand-ins have these of the machine, or have nothing that keeps an address.
SHARED = {"sshd", "clock", "firewall", "addresses"}


def examined(
    head: Host, *flags: str, **env: str
) -> tuple[dict[tuple[str, str], list[dict]], subprocess.CompletedProcess]:
    """Type `inv doctor`, and return the rows that are not fine by check and host."""
    done = inv(head, "doctor", "--model", "rehearsal", "--json", *flags, **WORKER, **env)
    rows = {}
    for row in json.loads(done.stdout)["rows"]:
        if row["verdict"] != "fine":
            rows.setdefault((row["check"], row["host"]), []).append(row)
    return rows, done


@pytest.fixture
def hosts(rig: Rig, shells: Shells, sparks: list[Host]) -> Iterator[list[Host]]:
    """The two hosts, whole before and after the test."""
    shells.start(sparks[1])
    yield sparks
    shells.start(sparks[1])
    for host in sparks:
        for cable in CABLES:
            rig.link_up(host, cable.netdev)
            host.run("ip", "link", "set", cable.netdev, "mtu", "9000")


def test_two_hosts_that_are_ready(hosts):
    """Nothing is wrong but what the machine of the stand-ins lacks. Both stand side by side in 80 columns."""
    rows, done = examined(hosts[0], COLUMNS="80")
    assert {check for check, _ in rows} <= SHARED, rows
    assert "this host" in done.stderr and max(map(len, done.stderr.partition("firewall")[0].splitlines())) <= 80


def test_faults_of_a_host_are_found_at_once(rig, shells, hosts, tmp_path):
    """Each fault is its own row, with the line that mends it. The script is one that a shell understands."""
    head, worker = hosts
    token, data = tmp_path / "token", CABLES[1].netdev
    token.write_text("0123")
    token.chmod(0o644)
    shells.start(worker, CACHE_DIR=FULL, RAY_AUTH_TOKEN_PATH=str(token))
    rig.link_down(worker, data)
    worker.run("ip", "link", "set", CONTROL.netdev, "mtu", "1500")
    taken = head.popen("python3", "-m", "http.server", "8000", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        rows, done = examined(head)
    finally:
        taken.kill()
        taken.wait(10)
    assert done.returncode == 1
    said = {
        place: " ".join(f"{row['verdict']} {row['why']} {row['mend']}" for row in found)
        for place, found in rows.items()
    }
    assert f"{data} is down, but the other half of port f0 is up" in said["links", "spark-2"]
    assert f"sudo ip link set {CONTROL.netdev} mtu 9000" in said["MTU", "spark-2"]
    assert "another program listens on 8000" in said["ports", "this host"]
    assert f"{FULL}" in said["disk", "spark-2"] and f"chmod 600 {token}" in said["secrets", "spark-2"]
    assert {check for check, host in rows if host == "this host"} <= SHARED | {"ports"}
    script = inv(head, "doctor", "--model", "rehearsal", "--script", **WORKER).stdout
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert script.index("on spark-2") < script.index(f"sudo ip link set {CONTROL.netdev} mtu 9000")


def test_a_host_without_docker_and_one_without_ssh(shells, hosts):
    """Neither keeps the other host from being examined. The last line of ssh, or of Docker, is the reason."""
    head, worker = hosts
    shells.start(worker, DOCKER_HOST="unix:///nowhere")
    rows, done = examined(head)
    (row,) = rows["Docker", "spark-2"]
    assert (
        done.returncode == 1 and "unix:///nowhere" in row["why"] and row["mend"] == "sudo systemctl enable --now docker"
    )
    assert ("links", "spark-2") not in rows and ("Docker", "this host") not in rows
    shells.stop(worker)
    rows, done = examined(head)
    (row,) = rows["ssh", "spark-2"]
    assert done.returncode == 1 and "onnection refused" in row["why"] and row["mend"] == "ssh -v spark-2 true"
    assert [place for place in rows if place[1] == "spark-2"] == [("ssh", "spark-2")]
