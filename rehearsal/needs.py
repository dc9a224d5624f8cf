"""What a rehearsal needs of this machine, what of it is missing, and the one line that installs it."""

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rehearsal import image, place
from rehearsal.shell import PATH, RehearsalError, works

GB = 10**9
MEMORY_GB = 8
DISK_GB, DISK_AGAIN_GB = 12, 6  # the first time, and where the images of an earlier run are
# Each program with Debian's package for it, and with Docker's own: the two kinds conflict.
DOCKER = {
    "dockerd": ("docker.io", "docker-ce"),
    "docker": ("docker.io", "docker-ce-cli"),
    "docker-init": ("docker.io", "docker-ce"),
    "containerd": ("docker.io", "containerd.io"),
    "runc": ("docker.io", "containerd.io"),
}
DOCKERS_OWN = ("docker-ce", "docker-ce-cli", "containerd.io")
PROGRAMS = {
    "ip": "iproute2",
    "debootstrap": "debootstrap",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
}
# What the tests need beside that: the head reaches its workers over ssh, a person the API by curl.
TESTS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "curl": "curl",
    "shellcheck": "shellcheck",
}


@dataclass(frozen=True)
class Lack:
    """What this machine lacks: programs with their packages, and what only a person can change."""

    packages: dict[str, str]
    obstacles: list[str]

    def __str__(self) -> str:
        """One message with the line that installs what can be installed; empty if nothing lacks."""
        lines = list(self.obstacles)
        if self.packages:
            line = shlex.join(install_line(self.packages.values()))
            lines.append(f"missing: {', '.join(self.packages)}. To install: apt-get update && {line}")
        return "\n  ".join(["A rehearsal cannot run here:", *lines]) if lines else ""


def missing(*, as_root: bool = True, tests: bool = False) -> str:
    """What is missing, in one message, or an empty text; changes nothing. `as_root=False` asks before `sudo`."""
    return str(look(place.folder(), as_root=as_root, tests=tests))


def look(root: Path, *, as_root: bool = True, tests: bool = False) -> Lack:
    """What a rehearsal that lives in `root`, or with `tests` its tests, lacks on this machine."""
    wanted = _packages() | (TESTS if tests else {})
    packages = {program: package for program, package in wanted.items() if not shutil.which(program, path=PATH)}
    if not image.KEYRING.exists():
        packages["Debian's archive keys"] = "debian-archive-keyring"
    return Lack(packages, _obstacles(root, as_root))


def install(*, tests: bool = False) -> None:
    """Install the packages that are missing, remove none; raise RehearsalError if apt-get fails."""
    packages = look(place.folder(), tests=tests).packages
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for line in (["apt-get", "update"], install_line(packages.values())) if packages else ():
        if subprocess.run(line, env=env, stdin=subprocess.DEVNULL).returncode:
            raise RehearsalError(f"`{shlex.join(line)}` failed, see above")


def install_line(packages: Iterable[str]) -> list[str]:
    """apt-get's words: without recommended packages, and refusing to remove anything."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", "--no-remove", *sorted(set(packages))]


def _packages() -> dict[str, str]:
    """The package of each program; Docker's own where one of them is installed, Debian's where none is."""
    own = any(_installed(package) for package in DOCKERS_OWN)
    apart = {} if own or not _client_is_apart() else {"docker": "docker-cli"}
    return {program: names[own] for program, names in DOCKER.items()} | apart | PROGRAMS


def _client_is_apart() -> bool:
    """Whether docker.io comes without the command line: since Debian 13, not in Ubuntu 24.04."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return False
    return system["ID"] == "debian" and int(system.get("VERSION_ID", "13").partition(".")[0]) >= 13


def _installed(package: str) -> bool:
    return works("sh", "-c", 'dpkg-query -W -f "\\${db:Status-Status}" "$1" | grep -qx installed', "sh", package)


def _obstacles(root: Path, as_root: bool) -> list[str]:
    found = ["it takes root"] if as_root and os.geteuid() else []
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        found.append(f"it takes Linux on x86-64 or aarch64, this is {platform.system()} on {platform.machine()}")
    elif (memory := _memory_gb()) < MEMORY_GB:
        found.append(f"{memory:.0f} GB of memory are available, it takes {MEMORY_GB}")
    if foreign := place.foreign(root):
        found.append(f"{foreign} is not a rehearsal's ({place.SETTING} names a folder that is empty, or not there yet)")
    wanted = DISK_AGAIN_GB if (root / "engines").exists() else DISK_GB
    if (disk := _disk_gb(root)) < wanted:
        found.append(f"{disk:.0f} GB are free at {root}, it takes {wanted} ({place.SETTING} names another folder)")
    return found


def _memory_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / GB


def _disk_gb(root: Path) -> float:
    """Free space of the file system that the folder is or will be on."""
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    return shutil.disk_usage(existing).free / GB
