"""The programs, packages, memory and disk that a rehearsal needs, and the line that installs missing packages."""

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
DISK_GB, DISK_AGAIN_GB = 12, 6  # for a first run, and for a run with the images of an earlier one
# Each program with its package in Debian. Behind it Docker's own package, which conflicts with Debian's.
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
# The tests need these programs too.
TESTS = {
    "sshd": ("openssh-server",),
    "ssh": ("openssh-client",),
    "ssh-keygen": ("openssh-client",),
    "curl": ("curl",),
    "shellcheck": ("shellcheck",),
}


def missing(root: Path | None = None, *, as_root: bool = True, tests: bool = False) -> str:
    """Return a message with everything that a rehearsal in `root` lacks, and the line that installs the packages.

    The message is empty if nothing is missing. as_root=False: a user who will use sudo asks, so root is not required.
    """
    lines = obstacles(root or sandbox.folder(), as_root)
    if lacking := packages(tests):
        line = shlex.join(install_line(lacking))
        lines.append(f"missing: {', '.join(lacking)}. To install: apt-get update && {line}")
    return "\n  ".join(["A rehearsal cannot run here:", *lines]) if lines else ""


def install(*, tests: bool = False) -> None:
    """Install the missing packages, and remove no package. Raises RehearsalError if apt-get fails."""
    lacking = packages(tests)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for line in (["apt-get", "update"], install_line(lacking)) if lacking else ():
        if subprocess.run(line, env=env, stdin=subprocess.DEVNULL).returncode:
            raise RehearsalError(f"`{shlex.join(line)}` failed, see above")


def install_line(lacking: dict[str, str]) -> list[str]:
    """Return the line of apt-get. It installs no recommended package, and refuses to remove a package."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", "--no-remove", *sorted(set(lacking.values()))]


def packages(tests: bool = False) -> dict[str, str]:
    """Return the package of each missing program. If one of Docker's own is installed, all of them are Docker's own."""
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
    """Whether a package is installed."""
    return works("sh", "-c", 'dpkg-query -W -f "\\${db:Status-Status}" "$1" | grep -qx installed', "sh", package)


def _client_is_apart() -> bool:
    """Whether docker.io lacks the program `docker`. This is so since Debian 13, and not in Ubuntu 24.04."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return False
    return system["ID"] == "debian" and int(system.get("VERSION_ID", "13").partition(".")[0]) >= 13


def obstacles(root: Path, as_root: bool = True) -> list[str]:
    """Return the obstacles that only a person can remove: rights, platform, memory, folder and disk."""
    found = ["a rehearsal needs root"] if as_root and os.geteuid() else []
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return [
            *found,
            f"a rehearsal needs Linux on x86-64 or aarch64, this is {platform.system()} on {platform.machine()}",
        ]
    words = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    if (memory := int(words.split()[1]) * 1024 / GB) < MEMORY_GB:
        found.append(f"{memory:.0f} GB of memory are available, a rehearsal needs {MEMORY_GB}")
    if foreign := sandbox.foreign(root):
        setting = f"set {sandbox.SETTING} to a folder that is empty or does not exist yet"
        found.append(f"{foreign} does not belong to a rehearsal ({setting})")
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    wanted = DISK_AGAIN_GB if (root / "engines").exists() else DISK_GB
    if (disk := shutil.disk_usage(existing).free / GB) < wanted:
        found.append(
            f"{disk:.0f} GB are free at {root}, a rehearsal needs {wanted} (set {sandbox.SETTING} to another folder)"
        )
    return found
