"""`inv doctor`: what this host and every worker lack before a model can be served, and the lines that mend it.

One command for each host brings its facts: `python3 -` reads inside/doctor.py from standard input. So a worker needs
ssh and Python, and nothing of this repository. Nothing is changed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cluster.command import Command, render, run, say, tell, words_of
from cluster.links import Link, link_remarks
from cluster.node import RAY_PORT
from cluster.notes import gpu_notes
from cluster.remote import at_once, ssh_command
from cluster.repository import ROOT
from cluster.settings import Settings, load_settings

HERE = "this host"
SECONDS = 60
# The settings that decide what is asked on a host.
NAMES = ("PRIMARY_IF", "HEAD_NODE_IP", "VLLM_HOST_IP", "RDMA_HCAS", "SYSFS", "VLLM_IMAGE", "BASE_IMAGE", "CACHE_DIR",
         "HF_CACHE", "RAY_AUTH_TOKEN_PATH", "PORT", "MODEL_CKPT", "REVISION")  # fmt: skip
# The modules that are sent, each before those that import it.
SENT = ("inside/probe.py", "inside/weights.py", "repository.py", "inside/doctor.py")
LOADER = """import sys, types
for name, text in {texts!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "/"
    exec(compile(text, name, "exec"), vars(module))
sys.modules["doctor"].main()
"""


# --- The facts of each host -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """The facts of one host by name. `error` says why the host did not answer; then there are no facts."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def __getitem__(self, fact: str) -> Any:  # noqa: ANN401 - facts are JSON of any form
        """Return a fact. Raises LookupError with the reason if it could not be asked."""
        told = self.facts.get(fact, {"unknown": self.error or "it was not asked"})
        if isinstance(told, dict) and "unknown" in told:
            raise LookupError(_reason(told))
        return told


def _reason(told: Mapping[str, str]) -> str:
    return re.sub(r"^\w+Error: (\[Errno \d+\] )?|\.?(\n.*)?$", "", told["unknown"], flags=re.DOTALL)


def doctor_commands(
    settings: Settings, names: Sequence[str] = (), workers: Sequence[str] | None = None
) -> dict[str, Command]:
    """Return by host the command that prints the host's facts, the head first.

    names: the facts, all if none is given. workers: the hosts beside the head, every worker if None.
    A worker reads its own `.env`, if the checkout is there. The head hands on what its shell and its flags set.
    """
    plain, here = load_settings(settings.model, {}, {"ENV_FILE": ""}), str(ROOT)
    asked = {"defaults": {name: plain.found[name].text if name in plain else None for name in NAMES},
             "key": secrets.token_hex(16), "names": names}  # fmt: skip
    handed_on = settings.handed_on() | {"HEAD_NODE_IP": settings["HEAD_NODE_IP"]}
    commands = {}
    for host in (HERE, *(settings.workers() if workers is None else workers)):
        given, folder = (settings, here) if host == HERE else (handed_on, settings.get("REPO_DIR", here))
        own = {"given": {name: given[name] for name in NAMES if name in given}, "folder": folder}
        words = words_of(render("doctor.j2", asked=json.dumps(asked | own)))
        one = Command((tuple(words),)) if host == HERE else ssh_command(settings, host, words, reads=True)
        where = f"{host}; its standard input: {', '.join(SENT)} of cluster/, as one text"
        commands[host] = replace(one, where=where, alias="`python3 -`")
    return commands


def ask_hosts(settings: Settings, *names: str, workers: Sequence[str] | None = None) -> list[Told]:
    """Ask all hosts at once, and return what each has told, the head first. The arguments: see doctor_commands."""
    files = [ROOT / "cluster" / name for name in SENT]
    profile = ROOT / settings.model.folder / f"{settings.model.size}.json" if settings.model else ROOT
    bytes_of_weights = json.loads(profile.read_text()).get("weights_gib", 0) * 2**30 if profile.is_file() else 0
    file = os.memfd_create("doctor")  # a full disk does not stop it
    os.write(file, LOADER.format(texts={file.stem: file.read_text() for file in files}).encode())
    commands, told = doctor_commands(settings, names, workers), dict[str, Told]()

    def ask(host: str) -> None:
        begin = time.time()
        answer = run(replace(commands[host], feeds=Path(f"/proc/self/fd/{file}")), capture=True, seconds=SECONDS)
        last = answer.rpartition("\n")[2]  # a shell's start-up files may print, too
        ours = {"asked": [begin, time.time()], "expected": bytes_of_weights, "hosts": len(commands)}
        told[host] = Told(host, json.loads(last) | ours)

    failed = at_once([*commands], ask)
    os.close(file)
    return [told[host] if host in told else Told(host, error=failed[host]) for host in commands]


# --- What is judged ---------------------------------------------------------------------------------------------------

# By weight, each with its exit status. A reboot loses what no file keeps. Only root can read the firewall.
BROKEN, UNKNOWN, REBOOT, SAID, FINE = "BROKEN", "UNKNOWN", "LOST AT A REBOOT", "NOT ASKED", "fine"
CODES = {BROKEN: 1, UNKNOWN: 2, REBOOT: 3, SAID: 0, FINE: 0}
GB = 10**9
# Estimates: the image with its base while Docker unpacks it; Ray's layer alone; caches and logs.
IMAGE_GB, LAYER_GB, ROOM_GB = 30, 1, 5
RESTART = "sudo systemctl restart docker"
# The line that mends a check whose fact could not be asked, by a part of the reason. Any other such check is UNKNOWN.
UNASKED = {
    "ssh": {"Permission denied": "ssh-copy-id {0}", "Host key": "ssh {0} true  # and answer its question once",
            "status 127": "ssh -t {0} sudo apt install python3", "": "ssh -v {0} true"},
    "Docker": {"ermission denied": "sudo usermod -aG docker $USER  # then log in again",
               "No such file": "sudo apt install docker.io", "": "sudo systemctl enable --now docker"},
    "driver": {"": "sudo dmesg | grep NVRM  # after an update of the driver: sudo reboot"},
}  # fmt: skip


class Row(NamedTuple):
    """What was found by one check on one host; with a verdict why that matters, and the line that mends it."""

    check: str
    host: str
    found: str
    verdict: str = FINE
    why: str = ""
    mend: str = ""


@dataclass
class Seen:
    """What one check has found, and what is wrong with that."""

    found: str = "no answer"
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def bad(self, verdict: str, why: str, mend: str) -> None:
        self.wrong.append((verdict, why, mend))


def judge_hosts(hosts: Sequence[Told]) -> list[Row]:
    """Judge each check of each host. The others are compared with the first, the head."""
    rows: list[Row] = []
    for one in hosts:
        check = partial(_check, rows, one.name)
        with check("ssh") as seen:
            seen.found = f"answers, {one['hostname']}"
        if not one.error:
            _judge_software(check, one, hosts[0])
            _judge_network(check, one, hosts[0])
            _judge_host(check, one, hosts[0])
    return rows


@contextmanager
def _check(rows: list[Row], host: str, name: str) -> Iterator[Seen]:
    seen, lines = Seen(), UNASKED.get(name, {})
    try:
        yield seen
    except LookupError as error:
        mend = next((line for part, line in lines.items() if part in str(error)), "").format(host)
        seen.bad(BROKEN if lines else UNKNOWN, str(error), mend)
    rows += [Row(name, host, seen.found, *wrong) for wrong in seen.wrong or [(FINE, "", "")]]


Check = Callable[[str], AbstractContextManager[Seen]]


def _judge_software(check: Check, one: Told, head: Told) -> None:
    with check("Docker") as seen:
        seen.found = one["docker"]["ServerVersion"]
    with check("cgroup driver") as seen:
        seen.found = one["docker"]["CgroupDriver"]
        for note in gpu_notes(one["docker"]):
            seen.bad(BROKEN, note.removeprefix("Warning: ")[:-1], f"sudoedit /etc/docker/daemon.json; {RESTART}")
    with check("GPU in Docker") as seen:
        seen.found = "yes" if one["nvidia"] else "no"
        if not one["nvidia"]:
            mend = f"sudo nvidia-ctk runtime configure --runtime=docker; {RESTART}"
            seen.bad(BROKEN, "no container gets a GPU", mend)
    for name in ("driver", "kernel"):
        with check(name) as seen:
            seen.found, its = one[name], head[name]
            if one[name] != its:
                seen.bad(BROKEN, f"the head's is {its}", "sudo apt update; sudo apt full-upgrade; sudo reboot")
    with check("GPU") as seen:
        gpu, units = one["gpus"][0], {"clock_mhz": "MHz", "power_w": "W", "temperature_c": "°C"}
        seen.found = ", ".join(f"{gpu[name]:.0f} {unit}" for name, unit in units.items() if gpu[name] is not None)
    with check("repository") as seen:
        own, its = one["repository"], head["repository"]
        seen.found = (own or "none")[:12]
        if own != its:
            mend = "git status; git pull" if own else "# clone it there; REPO_DIR in the head's .env names the folder"
            seen.bad(BROKEN, f"the head's is {its[:12]}, so the nodes would differ", mend)


def _judge_network(check: Check, one: Told, head: Told) -> None:
    env = one["settings"]
    with check("links") as seen:
        links = [Link(at["device"], name, at["up"], None) for name, at in one["links"].items() if at["device"]]
        rates = {at["gbits"] for at in one["links"].values() if at["up"]}
        seen.found = f"{sum(link.up for link in links)} of {len(links)} up, {'/'.join(map(str, rates)) or 0} Gbit/s"
        notes = [note.removeprefix("Warning: ")[:-1] for note in link_remarks(links) if note.startswith("Warning: ")]
        if not any(link.up for link in links) and one["hosts"] > 1 and env["RDMA_HCAS"] != "":
            notes = ["no data link is up, so NCCL would use TCP"]
        for note in notes:
            seen.bad(BROKEN, note, "# power off, wait, power on; or try another cable")
    with check("MTU") as seen:
        used = {name: at for name, at in one["links"].items() if at["up"] and at["device"]}
        seen.found = "/".join(sorted({str(at["mtu"]) for at in used.values()}))
        for name, at in used.items():
            mtu = at["mtu"]
            if mtu < 9000:
                seen.bad(BROKEN, f"{name} has {mtu}: much of the rate is lost", f"sudo ip link set {name} mtu 9000")
            elif "unknown" not in at["kept"] and at["kept"] != [str(mtu)]:
                seen.bad(REBOOT, f"no file sets {mtu} for {name}", f"sudo netplan set ethernets.{name}.mtu={mtu}")
    with check("addresses") as seen:
        link = one["links"].get(env["PRIMARY_IF"], {"addresses": [], "up": False})
        own = link["addresses"] if link["up"] else []
        gids, wanted = sum(at["gid"] for at in one["links"].values()), env["HEAD_NODE_IP"]
        seen.found = f"{', '.join(own) or 'none'}; {gids} GIDs of IPv4"
        if not own and not env["VLLM_HOST_IP"]:
            why = f"{env['PRIMARY_IF']} (PRIMARY_IF) has no IPv4 address, or is down"
            seen.bad(BROKEN, why, "ip -4 address  # then set PRIMARY_IF in .env")
        elif one is head and wanted not in [env["VLLM_HOST_IP"], *(at.partition("/")[0] for at in own)]:
            seen.bad(BROKEN, f"HEAD_NODE_IP is {wanted}", "ip -4 address  # then set HEAD_NODE_IP in every .env")
        unknown = set()
        for name, at in one["links"].items():
            network, its = at["network"], head["links"].get(name, at)["network"]
            if network != its:
                seen.bad(BROKEN, f"{name} is in {network}, and the head's in {its}", "ip -4 address  # on both")
            if at["up"] and network and not at["gid"]:
                mend = f"sudo ip link set {name} down; sudo netplan apply"
                seen.bad(BROKEN, f"{at['device']} has no GID of its address", mend)
            if at["addresses"] and "unknown" in at["kept"]:
                unknown.add(_reason(at["kept"]))
            elif at["addresses"] and not at["kept"]:
                mend = f"sudo netplan set 'ethernets.{name}.addresses=[{at['addresses'][0]}]'"
                seen.bad(REBOOT, f"no file gives {name} its address {at['addresses'][0]}", mend)
        for why in unknown:
            seen.bad(UNKNOWN, f"whether a reboot keeps them ({why})", "sudo netplan get")
    with check("ports") as seen:
        seen.found = f"{len(one['ports'])} in use" if one["node"] is None else "node-ray runs"
        for port in (str(RAY_PORT), env["PORT"]):
            if one is head and one["node"] is None and port in one["ports"]:
                seen.bad(BROKEN, f"another program listens on {port}", f"sudo ss -ltnp 'sport = :{port}'")
    with check("firewall") as seen:
        seen.found = "only root can read it"
        seen.bad(SAID, "the nodes need each other's ports on every link", "sudo ufw status; sudo nft list ruleset")


def _judge_host(check: Check, one: Told, head: Told) -> None:
    with check("sshd") as seen:
        seen.found = "none listens" if one["sshd"] is None else f"OOM score {one['sshd']}"
        if one["sshd"] is not None and one["sshd"] > -900:
            mend = "sudo systemctl edit ssh  # [Service] OOMScoreAdjust=-1000; then: sudo systemctl restart ssh"
            seen.bad(BROKEN, "a host that is short of memory may lose its sshd", mend)
    with check("swap") as seen:
        swap, line = one["swap"], one["earlyoom"] or "no earlyoom"
        seen.found = f"{swap['total'] / GB:.0f} GB, swappiness {swap['swappiness']}, {line}"
        if not swap["kept"]:
            mend = f"echo vm.swappiness={swap['swappiness']} | sudo tee /etc/sysctl.d/90-swappiness.conf"
            seen.bad(REBOOT, f"no file keeps swappiness {swap['swappiness']}", mend)
        if one["earlyoom"] and swap["total"] and swap["swappiness"] == 0 and not re.search("-s *100", line):
            mend = "sudoedit /etc/default/earlyoom  # -r 3600 -m 4,2 -s 100,100; then: sudo systemctl restart earlyoom"
            seen.bad(BROKEN, "earlyoom waits for swap to fill, which swappiness 0 prevents", mend)
    with check("clock") as seen:
        begin, end = one["asked"]
        off = max(begin - one["time"], one["time"] - end, 0)
        seen.found = f"{off:.0f} s off the head's"
        if off > 1 or not one["synchronized"]:
            seen.bad(BROKEN, "the logs of the nodes cannot be compared", "sudo timedatectl set-ntp true")
    with check("disk") as seen:
        root, (folder, cache), weights = one["root"], next(iter(one["disk"].items())), one["weights"] or {}
        seen.found = f"GB free: {root['free'] / GB:.0f} for images, {cache['free'] / GB:.0f} for weights"
        for folder in [shlex.quote(folder) for folder, at in one["disk"].items() if not at["may"]]:
            seen.bad(BROKEN, f"you cannot write to {folder}", f"sudo install -d -o $USER {folder}")
        image = 0 if one["image"] else LAYER_GB if one["base"] else IMAGE_GB
        total = weights.get("total") or one["expected"] if weights else 0
        missing = max(0, total - weights.get("have", 0)) / GB
        places = {root["disk"]: (root, image, one["docker"]["DockerRootDir"])}
        places[cache["disk"]] = (cache, missing + image * (cache["disk"] in places), folder)
        for at, needed, place in places.values():
            if at["free"] / GB < needed + ROOM_GB:
                why = f"{place} has {at['free'] / GB:.0f} GB free, and {needed + ROOM_GB:.0f} are needed"
                seen.bad(BROKEN, why, f"df -h {shlex.quote(place)}; docker system df")
    with check("secrets") as seen:
        files = {f"{one['folder']}/.env": one["env"], one["settings"]["RAY_AUTH_TOKEN_PATH"]: one["token"]}
        modes = {file: told["mode"] for file, told in files.items() if told}
        seen.found = ", ".join(f"{Path(file).name} {mode:o}" for file, mode in modes.items()) or "no file yet"
        for file in [shlex.quote(file) for file, mode in modes.items() if mode & 0o077]:
            seen.bad(BROKEN, f"others can read {file}", f"chmod 600 {file}")
        if one["token"] and head["token"] and one["token"]["hash"] != head["token"]["hash"]:
            mend = "inv token  # on the head: it prints the line that copies the token"
            seen.bad(BROKEN, "Ray's token is not the head's, so Ray refuses this node", mend)


# --- The report -------------------------------------------------------------------------------------------------------


def exit_status(rows: Sequence[Row]) -> int:
    return next((code for verdict, code in CODES.items() if any(row.verdict == verdict for row in rows)), 0)


def show_rows(rows: Sequence[Row]) -> None:
    """Print a table of all hosts side by side, and below it what is not fine, the gravest first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    gravest = sorted(rows, key=lambda row: list(CODES).index(row.verdict))
    cells, wrong = dict[tuple[str, str], str](), dict[tuple[str, str, str], list[str]]()
    for verdict, row in [(row.verdict, row) for row in gravest]:
        cells.setdefault(row[:2], f"{verdict}: {row.found}" if CODES[verdict] else row.found)
        if verdict != FINE:
            line = f" Do: {row.mend[2:]}" if row.mend[:1] == "#" else f" Type: {row.mend}" if row.mend else ""
            wrong.setdefault((verdict, row.why, line), []).append(f"{row.check} of {row.host}")
    hosts = list(dict.fromkeys(row.host for row in rows))
    table = Table("", *hosts, box=box.SIMPLE)
    for check in dict.fromkeys(row.check for row in rows):
        table.add_row(check, *(cells.get((check, host), "") for host in hosts))
    Console(stderr=True, highlight=False, markup=False).print(table)
    say(*(f"{verdict} {', '.join(places)}: {why}.{line}" for (verdict, why, line), places in wrong.items()))


def mending_script(rows: Sequence[Row]) -> str:
    """Return the lines that mend, by host, each below its reason: a shell script to be read."""
    lines = ["#!/bin/sh", "# Read each line before you type it. inv doctor has run none of them."]
    for host in dict.fromkeys(row.host for row in rows):
        own = [row for row in rows if row.host == host and row.verdict not in (FINE, SAID)]
        lines += [
            "",
            f"# --- on {host} ---",
            *(f"# {row.verdict} {row.check}: {row.why}\n{row.mend}".strip() for row in own),
        ]
    return "\n".join(lines)


def report_hosts(settings: Settings, as_script: bool, as_json: bool) -> int:
    """Print what was found on every host. Return the exit status."""
    hosts = ask_hosts(settings)
    rows = judge_hosts(hosts)
    show_rows(rows)
    if as_script:
        tell(mending_script(rows))
    if as_json:
        facts = {one.name: one.facts for one in hosts}
        tell(json.dumps({"facts": facts, "rows": [row._asdict() for row in rows]}, indent=1))
    return exit_status(rows)
