"""The needs of a rehearsal: programs with their packages, memory, disk, and the line that installs what is missing."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from rehearsal import image, sandbox
from rehearsal.shell import PATH, RehearsalError, works

GB = 10**9
MEMORY_GB = 8
DISK_GB, DISK_AGAIN_GB = 12, 6  # the first time, and where the images of an earlier run are
# Each program with Debian's package and, where there is one, Docker's own: the two kinds conflict.
PROGRAMS = {
    "dockerd": ("docker.io", "docker-ce"),
    "docker": ("docker.io", "docker-ce-cli"),
    "docker-init": ("docker.io", "docker-ce"),
    "containerd": ("docker.io", "containerd.io"),
    "runc": ("docker.io", "containerd.io"),
    "ip": ("iproute2",),
    "debootstrap": ("debootstrap",),
    "nsenter": ("util-linux",),
    "unshare": ("util-linux",),
    "setpriv": ("util-linux",),
    "mount": ("mount",),
}
# The tests need these too: the head reaches its workers over ssh, and a person types curl.
TESTS = {
    "sshd": ("openssh-server",),
    "ssh": ("openssh-client",),
    "ssh-keygen": ("openssh-client",),
    "curl": ("curl",),
    "shellcheck": ("shellcheck",),
}


def missing(root: Path | None = None, *, as_root: bool = True, tests: bool = False) -> str:
    """Return what a rehearsal that lives in `root` lacks, with the line that installs what can be installed.

    The text is empty if nothing is missing. `as_root=False` asks before `sudo`.
    """
    lines = obstacles(root or sandbox.folder(), as_root)
    if lacking := packages(tests):
        line = shlex.join(install_line(lacking))
        lines.append(f"missing: {', '.join(lacking)}. To install: apt-get update && {line}")
    return "\n  ".join(["A rehearsal cannot run here:", *lines]) if lines else ""


def install(*, tests: bool = False) -> None:
    """Install the packages that are missing, and remove none. Raises RehearsalError if apt-get fails."""
    lacking = packages(tests)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for line in (["apt-get", "update"], install_line(lacking)) if lacking else ():
        if subprocess.run(line, env=env, stdin=subprocess.DEVNULL).returncode:
            raise RehearsalError(f"`{shlex.join(line)}` failed, see above")


def install_line(lacking: dict[str, str]) -> list[str]:
    """Return apt-get's words: without recommended packages, and refusing to remove a package."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", "--no-remove", *sorted(set(lacking.values()))]


def packages(tests: bool = False) -> dict[str, str]:
    """Return the package of each missing program: Docker's own where one of those is installed, else Debian's."""
    wanted = PROGRAMS | (TESTS if tests else {})
    dockers = {names[-1] for names in PROGRAMS.values() if len(names) > 1}
    own = any(installed(package) for package in dockers)
    lacking = {
        program: names[-1 if own else 0] for program, names in wanted.items() if not shutil.which(program, path=PATH)
    }
    if lacking.get("docker") == "docker.io" and _client_is_apart():
        lacking["docker"] = "docker-cli"
    if not image.KEYRING.exists():
        lacking["Debian's archive keys"] = "debian-archive-keyring"
    return lacking


def installed(package: str) -> bool:
    """Whether dpkg has a package."""
    return works("sh", "-c", 'dpkg-query -W -f "\\${db:Status-Status}" "$1" | grep -qx installed', "sh", package)


def _client_is_apart() -> bool:
    """Whether docker.io comes without the command line: since Debian 13, not in Ubuntu 24.04."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return False
    return system["ID"] == "debian" and int(system.get("VERSION_ID", "13").partition(".")[0]) >= 13


def obstacles(root: Path, as_root: bool = True) -> list[str]:
    """Return what only a person can change: rights, platform, memory, and the folder with its disk."""
    found = ["it takes root"] if as_root and os.geteuid() else []
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return [*found, f"it takes Linux on x86-64 or aarch64, this is {platform.system()} on {platform.machine()}"]
    words = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    if (memory := int(words.split()[1]) * 1024 / GB) < MEMORY_GB:
        found.append(f"{memory:.0f} GB of memory are available, it takes {MEMORY_GB}")
    if foreign := sandbox.foreign(root):
        setting = f"{sandbox.SETTING} names a folder that is empty, or not there yet"
        found.append(f"{foreign} is not a rehearsal's ({setting})")
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    wanted = DISK_AGAIN_GB if (root / "engines").exists() else DISK_GB
    if (disk := shutil.disk_usage(existing).free / GB) < wanted:
        found.append(f"{disk:.0f} GB are free at {root}, it takes {wanted} ({sandbox.SETTING} names another folder)")
    return found
