"""`inv doctor`: facts without anything of ours on the host, and the verdicts on recorded facts of two Sparks."""

import json

import pytest

from cluster import doctor, repository
from cluster.command import Command
from cluster.doctor import BROKEN, REBOOT, UNKNOWN
from cluster.models import find_model
from cluster.settings import load_settings

# --- The facts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(operator, tmp_path):
    """Makes the settings of a head whose only worker is this machine too, without ssh in between."""
    operator.setattr(doctor, "ssh_command", lambda settings, host, words, reads: Command((tuple(words),)))
    operator.setenv("HOME", str(tmp_path))
    operator.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def settle(model="nemotron", **shell):
        return load_settings(find_model(model), {}, {"HOME": str(tmp_path), "WORKER_HOSTS": "spark-2", **shell})

    return settle


def test_a_worker_reads_its_own_settings(site, tmp_path, operator):
    """A worker's folders are those of its `.env`. The image is the one of the head's shell. No secret goes along."""
    (tmp_path / "sparks").mkdir()
    (tmp_path / "sparks/.env").write_text("CACHE_DIR='/mnt/my cache' # big\nVLLM_IMAGE=old\nVLLM_API_KEY=sk_marker\n")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    (tmp_path / ".ray/auth_token").chmod(0o644)
    operator.delenv("ENV_FILE")
    settings = site(REPO_DIR="~/sparks", VLLM_IMAGE="new", VLLM_API_KEY="sk_marker", CACHE_DIR="/mine")
    head, worker = doctor.ask_hosts(settings, "repository", "token", "disk")
    own, there = head["settings"], worker["settings"]
    assert (own["CACHE_DIR"], there["CACHE_DIR"], there["VLLM_IMAGE"]) == ("/mine", "/mnt/my cache", "new")
    assert (head["repository"], worker["repository"]) == (repository.repository_digest(), None)
    assert head["token"] == worker["token"] and head["token"]["mode"] == 0o644
    said = json.dumps([head.facts, worker.facts]) + str(doctor.doctor_commands(settings))
    assert not [secret for secret in ("sk_marker", '"secret"') if secret in said]
    assert "/mnt/my cache/huggingface" in worker["disk"]


# What programs of a Spark print. NetworkManager forgets the address of the first interface at a reboot.
LISTED = ('{{"ifname": "{}", "ifindex": 9999, "operstate": "UP", "mtu": 9000, "addr_info": '
          '[{{"family": "inet", "local": "10.0.0.1", "prefixlen": 24}}]}}')  # fmt: skip
PRINTED = {
    "docker": '{"ServerVersion": "28", "CgroupDriver": "cgroupfs", "Runtimes": {"nvidia": 0}, "HttpProxy": "sk_mark"}',
    "ip": f'[{LISTED.format("enp1s0f0np0")}, {LISTED.format("enp1s0f1np1")}, {{"ifname": "docker0"}}]',
    "nmcli": "wlan0:1:/etc/x\nenp1s0f0np0:3:/run/NetworkManager/system-connections/a.nmconnection\n"
             "enp1s0f1np1:2:/run/NetworkManager/system-connections/netplan-enp1s0f1np1.nmconnection",
    "ps": "   77 sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups\n  88 /usr/bin/earlyoom -r 3600 -m 4,2",
    "ss": "LISTEN 0 128 0.0.0.0:22 0.0.0.0:*\nLISTEN 0 128 [::]:8000 [::]:*",
    "timedatectl": "yes",
}  # fmt: skip


def test_what_programs_print_becomes_facts(site, tmp_path, operator):
    """NetworkManager keeps what netplan writes at each boot, and forgets what else it has in /run. No proxy is told."""
    for name, text in PRINTED.items():
        mtu = 'case "$*" in *mtu*) echo 9000; exit;; esac\n' if name == "nmcli" else ""
        (tmp_path / name).write_text(f"#!/bin/sh\n{mtu}cat <<'END'\n{text}\nEND\n")
        (tmp_path / name).chmod(0o755)
    roce = tmp_path / "sys/class/infiniband/rocep1s0f0"
    for folder in ("device/net/enp1s0f0np0", "ports/1/gids", "ports/1/gid_attrs/types"):
        (roce / folder).mkdir(parents=True)
    (roce / "ports/1/gids/3").write_text("0000:0000:0000:0000:0000:ffff:0a00:0001\n")
    (roce / "ports/1/gid_attrs/types/3").write_text("RoCE v2\n")
    operator.setenv("PATH", str(tmp_path), prepend=":")
    head, _ = doctor.ask_hosts(
        site(SYSFS=f"{tmp_path}/sys"), "links", "earlyoom", "ports", "synchronized", "nvidia", "swap"
    )
    data, control = head["links"].values()
    assert (data["device"], data["gid"], data["kept"]) == ("rocep1s0f0", True, [])
    assert (control["device"], control["addresses"], control["kept"]) == (None, ["10.0.0.1/24"], ["9000"])
    assert head["earlyoom"] == "/usr/bin/earlyoom -r 3600 -m 4,2" and head["ports"] == ["22", "8000"]
    assert head["synchronized"] and head["nvidia"] and head["docker"]["CgroupDriver"] == "cgroupfs"
    assert "sk_mark" not in json.dumps(head.facts)


def test_a_host_that_does_not_answer_keeps_no_other_from_it(site, operator):
    """ssh's own last line is the error of that host."""
    operator.setattr(doctor, "ssh_command", lambda *_, **__: Command((("sh", "-c", "echo no route >&2; exit 255"),)))
    head, worker = doctor.ask_hosts(site(), "kernel")
    assert head["kernel"] and not head.error
    assert not worker.facts and "255: no route" in worker.error


# --- The verdicts -----------------------------------------------------------------------------------------------------

LINK = {"device": "rocep1s0f1", "up": True, "mtu": 9000, "addresses": ["10.0.0.1/24"], "network": "10.0.0.0/24",
        "gbits": 200, "gid": True, "kept": ["9000"]}  # fmt: skip
TWIN = LINK | {"device": "roceP2p1s0f1", "addresses": [], "network": None, "gid": False}
ENGINE = {"ServerVersion": "28.3.3", "CgroupDriver": "cgroupfs", "DiscoveredDevices": None, "DockerRootDir": "/d"}
GPU = {"name": "NVIDIA GB10", "clock_mhz": 208.0, "power_w": 4.5, "temperature_c": 40.0}
SWAP = {"total": 16e9, "swappiness": 60, "kept": True}
DISK = {"free": 9e11, "disk": 1, "may": True}
# What a Spark would tell that lacks nothing.
FACTS = {
    "docker": ENGINE, "image": "sha256:1", "base": "sha256:0", "node": None, "nvidia": True, "gpus": [GPU],
    "driver": "580", "kernel": "6.14.0-1013-nvidia", "repository": "ab" * 32,
    "sshd": -1000, "swap": SWAP, "earlyoom": None, "synchronized": True, "time": 100.5, "expected": 76e9, "hosts": 2,
    "links": {"enp1s0f1np1": LINK, "enP2p1s0f1np1": TWIN},
    "asked": [100.0, 101.0], "root": DISK, "disk": {"/c/huggingface": DISK, "/c/node-ray": DISK}, "ports": ["22"],
    "env": {"mode": 0o600, "hash": "1"}, "token": {"mode": 0o600, "hash": "2"}, "weights": None, "folder": "/r",
    "settings": {"PRIMARY_IF": "enp1s0f1np1", "HEAD_NODE_IP": "10.0.0.1", "VLLM_HOST_IP": None, "PORT": "8000",
                 "RDMA_HCAS": None, "RAY_AUTH_TOKEN_PATH": "/t"},
    "hostname": "spark-2",
}  # fmt: skip


def link(**changed):
    """The links of a host whose control link differs."""
    return {"links": FACTS["links"] | {"enp1s0f1np1": LINK | changed}}


def rows(host="spark-2", error="", **changed):
    """The rows that are not fine, the firewall's apart, where one of two hosts tells other facts."""
    hosts = [doctor.Told(name, FACTS | changed if name == host else FACTS) for name in (doctor.HERE, "spark-2")]
    hosts[1] = doctor.Told(host, error=error) if error else hosts[1]
    return [row for row in doctor.judge_hosts(hosts) if row.verdict not in (doctor.FINE, doctor.SAID)]


def test_two_hosts_that_lack_nothing():
    """Nothing is found, and the exit status is 0 although nobody could read the firewall."""
    assert rows() == []
    assert doctor.exit_status(doctor.judge_hosts([doctor.Told(doctor.HERE, FACTS)])) == 0


# A control link that is down has no use for its address, and a file without an address has no MTU.
ALSO = {"links": "addresses", "addresses": "MTU"}


@pytest.mark.parametrize(
    ("check", "verdict", "mend", "changed"),
    [
        ("ssh", BROKEN, "ssh-copy-id spark-2", {"error": "failed with status 255: Permission denied (publickey)"}),
        ("ssh", BROKEN, "ssh spark-2 true", {"error": "failed with status 255: Host key verification failed."}),
        ("ssh", BROKEN, "apt install python3", {"error": "failed with status 127: python3: not found"}),
        ("Docker", BROKEN, "usermod -aG docker", {"docker": {"unknown": "RuntimeError: permission denied while"}}),
        ("Docker", BROKEN, "apt install docker.io", {"docker": {"unknown": "FileNotFoundError: No such file"}}),
        ("GPU in Docker", BROKEN, "nvidia-ctk", {"nvidia": False}),
        ("cgroup driver", BROKEN, "daemon.json", {"docker": ENGINE | {"CgroupDriver": "systemd"}}),
        ("kernel", BROKEN, "full-upgrade", {"kernel": "6.11.0-1016-nvidia"}),
        ("driver", BROKEN, "full-upgrade", {"driver": "570.1"}),
        ("repository", BROKEN, "git pull", {"repository": "cd" * 32}),
        ("repository", BROKEN, "clone", {"repository": None}),
        ("driver", BROKEN, "NVRM", {"driver": {"unknown": "RuntimeError: NVIDIA-SMI has failed"}}),
        ("links", BROKEN, "power off", link(up=False)),
        ("MTU", BROKEN, "sudo ip link set enp1s0f1np1 mtu 9000", link(mtu=1500)),
        ("MTU", REBOOT, "mtu=9000", link(kept=["auto"])),
        ("addresses", REBOOT, "addresses=[10.0.0.1/24]", link(kept=[])),
        ("addresses", BROKEN, "PRIMARY_IF", link(addresses=[])),
        ("addresses", UNKNOWN, "netplan get", link(kept={"unknown": "FileNotFoundError: nmcli"})),
        ("addresses", BROKEN, "HEAD_NODE_IP", link(addresses=["10.0.0.7/24"]) | {"host": doctor.HERE}),
        ("addresses", BROKEN, "on both", link(network="10.0.9.0/24")),
        ("addresses", BROKEN, "link set enp1s0f1np1", link(gid=False)),
        ("sshd", BROKEN, "OOMScoreAdjust", {"sshd": 0}),
        ("swap", REBOOT, "sysctl.d", {"swap": SWAP | {"swappiness": 1, "kept": False}}),
        ("swap", BROKEN, "-s 100,100", {"earlyoom": "earlyoom -r 60", "swap": SWAP | {"swappiness": 0}}),
        ("clock", BROKEN, "set-ntp", {"time": 130.0}),
        ("clock", UNKNOWN, "", {"synchronized": {"unknown": "RuntimeError: no systemd"}}),
        ("disk", BROKEN, "df -h /d", {"root": DISK | {"free": 3e10, "disk": 2}, "image": None, "base": None}),
        ("disk", BROKEN, "df -h /c", {"disk": {"/c": DISK | {"free": 8e10}}, "weights": {"total": None, "have": 0}}),
        ("disk", BROKEN, "$USER /c/node-ray", {"disk": {"/c/node-ray": DISK | {"may": False}}}),
        ("ports", BROKEN, "sport = :6379", {"ports": ["22", "6379"], "host": doctor.HERE}),
        ("secrets", BROKEN, "chmod 600 /r/.env", {"env": {"mode": 0o640, "hash": "1"}}),
        ("secrets", BROKEN, "inv token", {"token": {"mode": 0o600, "hash": "3"}}),
    ],
)
def test_each_fault_has_its_verdict_and_its_line(check, verdict, mend, changed):
    """A fault is found by its own check. The worst verdict is the exit status. A token is compared, not shown."""
    found = rows(**changed)
    assert check in {row.check for row in found if row.verdict == verdict} <= {check, ALSO.get(check, check)}
    assert doctor.exit_status(found) == doctor.CODES[verdict]
    assert any(row.verdict == verdict and mend in row.mend for row in found if row.check == check)
    assert all(row.why for row in found) and mend in doctor.mending_script(found)


def test_a_spark_alone_and_one_on_tcp_need_no_data_link():
    """A control link of another kind may have any MTU. Only NCCL's devices count as data links."""
    facts = FACTS | {"links": {"enp1s0f1np1": LINK | {"device": None, "mtu": 1500, "network": None}}}
    on_tcp = facts | {"settings": FACTS["settings"] | {"RDMA_HCAS": ""}}
    wrong = [
        {row.check for row in doctor.judge_hosts([doctor.Told(doctor.HERE, its)]) if row.verdict == BROKEN}
        for its in (facts, on_tcp, facts | {"hosts": 1})
    ]
    assert wrong == [{"links"}, set(), set()]


def test_ports_that_a_node_of_ours_has_are_fine():
    """A cluster that runs is no fault, and a worker needs none of the head's ports."""
    assert rows(doctor.HERE, ports=["6379", "8000"], node="12") == rows("spark-2", ports=["6379"]) == []


def test_the_exit_status_is_that_of_the_gravest():
    """Broken now, then what could not be told, then what a reboot loses."""
    verdicts = [REBOOT, doctor.SAID, UNKNOWN, BROKEN, doctor.FINE]
    some = [doctor.Row("", "", "", verdict) for verdict in verdicts]
    assert [doctor.exit_status(some[:end]) for end in range(1, 6)] == [3, 3, 2, 1, 1]
