"""A real sshd on each stand-in Spark, and an `ssh` on the head that has their keys, as an operator's ssh has."""

import shutil
import subprocess
from collections.abc import Sequence

from rehearsal import sandbox
from rehearsal.hosts import Host
from rehearsal.shell import PATH, run, script, wait

# sshd needs a folder below /run: it gets a /run of its own, with a disk that is full.
_OWN_RUN = (
    "mount -t tmpfs rehearsal /run && mkdir /run/sshd /run/full && "
    'mount -t tmpfs -o nr_inodes=1,size=1m rehearsal /run/full && exec "$@"'
)
FULL = "/run/full/cache"


class Shells:
    """The sshds of the hosts."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        self.folder = sandbox.state(hosts[0].root, "ssh")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._running: dict[str, subprocess.Popen] = {}
        for name in ("client", "server"):
            if not (self.folder / name).exists():
                run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name)
        self._write_client()

    def start(self, host: Host, **extra: str) -> None:
        """Restart a host's sshd, and wait until it answers. extra: more variables for its sessions."""
        self.stop(host)
        config = self.folder / f"{host.name}.conf"
        config.write_text(self._server(host, host.env | extra))
        sshd = shutil.which("sshd", path=PATH) or "sshd"
        log = (self.folder / f"{host.name}.log").open("w")
        words = ("sh", "-c", _OWN_RUN, "sh", sshd, "-D", "-e", "-f", str(config))
        self._running[host.name] = host.popen(*words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        assert wait(lambda: self.hosts[0].run("ssh", host.name, "true").returncode == 0, 20, pause=0.2), log.name

    def stop(self, host: Host) -> None:
        """End a host's sshd. The sessions of that sshd go on."""
        if process := self._running.pop(host.name, None):
            process.kill()
            process.wait(10)

    def _server(self, host: Host, env: dict[str, str]) -> str:
        lines = [
            f"ListenAddress {host.address}",
            f"HostKey {self.folder}/server",
            f"AuthorizedKeysFile {self.folder}/client.pub",
            "StrictModes no",
            "UsePAM no",
            "PidFile none",
            "SetEnv " + " ".join(f'"{name}={value}"' for name, value in env.items()),
        ]
        return "\n".join([*lines, ""])

    def _write_client(self) -> None:
        lines = [f"IdentityFile {self.folder}/client", "User root", "StrictHostKeyChecking no", "LogLevel ERROR",
                 f"UserKnownHostsFile {self.folder}/known"]  # fmt: skip
        for host in self.hosts:
            lines += [f"Host {host.name}", f"HostName {host.address}"]
        config = self.folder / "config"
        config.write_text("\n".join([*lines, ""]))
        # ssh reads the configuration of the user's own home, whatever HOME says.
        ssh = shutil.which("ssh", path=PATH) or "ssh"
        script(sandbox.state(self.hosts[0].root, "bin") / "ssh", f'exec {ssh} -F {config} "$@"')
