"""The rig: all stand-in Sparks of one rehearsal, with their networks and engines."""

import os
import signal
import subprocess
from pathlib import Path

from rehearsal import hosts, image, sandbox
from rehearsal.engine import Engine
from rehearsal.hosts import Host
from rehearsal.shell import Say

# Ctrl-C, `kill`, and a terminal that is closed.
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Rig:
    """`count` hosts and the builder's engine. They are up inside a `with`, and are taken down after it.

    keep: the rig stays up after a `with` without a failure. Use a rig in the main thread only, because signals go to
    that thread. Without keep the kernel kills the rig when that thread ends, even after a SIGKILL.
    """

    def __init__(self, count: int = 2, *, keep: bool = False, say: Say = print) -> None:
        self.root = sandbox.folder()
        self.hosts = [Host(f"spark-{number}", self.root, number) for number in range(1, count + 1)]
        self.builder = Engine("builder", self.root)
        self.keep, self.say = keep, say
        self.processes: dict[str, subprocess.Popen] = {}
        self._lock: int | None = None

    def __enter__(self) -> "Rig":
        """Remove the remains of a killed run, then start hosts and engines.

        Raises RehearsalError if one of them does not start. Then nothing stays up.
        """
        self._lock = sandbox.claim(self.root)
        try:
            for number in ENDINGS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # under `nohup` SIGHUP stays ignored
                    signal.signal(number, _leave)
            sandbox.sweep(self.root)
            self.processes["sandbox"] = sandbox.begin(self._lock, keep=self.keep)
            self._make()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self.keep and failed is None:
            sandbox.note(process=None)
        else:
            self.stop()

    def stop(self) -> None:
        """Take everything down. A second call does nothing."""
        if self._lock is not None:
            sandbox.end()
            for process in self.processes.values():
                process.wait(10)
            sandbox.sweep(self.root)
            sandbox.LOCK.write_text("")
            os.close(self._lock)
        self._lock = None

    def copy(self, name: str) -> None:
        """Give an image of the builder to every host that lacks the image. Such a host is switched off and on again."""
        wanted = self.builder.image_id(name)
        lacking = [host for host in self.hosts if host.image_id(name) != wanted]
        if not wanted or not lacking:
            return
        self.say(f"copying {name} to {', '.join(host.name for host in lacking)} …")
        self.builder.docker("image", "prune", "--force")
        for host in lacking:
            self.power_off(host)
            image.clone(self.builder, host)
            self.power_on(host)

    def power_off(self, host: Host) -> None:
        """Kill a host's engine and all its containers at once, as a power cut does. The host's links stay."""
        host.kill(self.processes.pop(host.name))

    def power_on(self, *switched: Host) -> None:
        """Start the engines of hosts, and wait until the engines answer."""
        names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        for host in switched:
            self.processes[host.name] = host.start(names, additions={})
        for host in switched:
            host.ready(self.processes[host.name])

    def link_down(self, host: Host, netdev: str) -> None:
        """Take the carrier from a host's network device: the switch's end of the cable goes down."""
        hosts.switch(host, netdev, "down")

    def link_up(self, host: Host, netdev: str) -> None:
        """Give the carrier back to a host's network device."""
        hosts.switch(host, netdev, "up")

    def _make(self) -> None:
        hosts.connect(self.hosts, self.builder.name)
        sandbox.state(self.root, "bin").mkdir(parents=True)
        (sandbox.state(self.root, "bin") / "nvidia-container-runtime-hook").symlink_to("/bin/true")  # for `inv doctor`
        for host in self.hosts:
            host.furnish()
        lent = image.pip_additions() | {"network": str(self.builder.state / "net/machine")}
        builder = self.builder.start(Path("/etc/hosts").read_text(), lent)
        self.processes[self.builder.name] = builder
        self.power_on(*self.hosts)
        self.builder.ready(builder)


def _leave(number: int, _: object) -> None:
    """End the run by an exception. Further signals are ignored, so that they do not end the take-down."""
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
