"""The stand-in Sparks put together."""

import atexit
import subprocess
from collections.abc import Collection
from pathlib import Path

from rehearsal import cgroup, image, links, pip_settings, place, signals, sweep
from rehearsal.engine import Engine, script
from rehearsal.hosts import Host
from rehearsal.lock import Lock
from rehearsal.shell import RehearsalError, Say, run, step

KEPT = "the stand-in Sparks of an earlier run were kept up: take them down first (`inv rehearse --down`)"


class Rig:
    """`count` hosts and a builder's engine, up inside a `with`, gone after it (unless `keep` and all went well).

    Hosts numbered in `without_device` have no /dev/infiniband. For the main thread only: signals go there, and what
    it starts dies with it, even by SIGKILL, unless `keep`.
    """

    def __init__(self, count: int = 2, *, keep: bool = False, without_device: Collection[int] = (),
                 root: Path | None = None, say: Say = print) -> None:  # fmt: skip
        self.root = root or place.folder()
        self.hosts = [Host(number, self.root, bound=not keep) for number in range(1, count + 1)]
        self.builder = Engine("builder", self.root)
        self.keep, self.say = keep, say
        self.without_device = without_device
        self._lock = Lock()
        self._handlers: signals.Handlers = {}
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Rig":
        self.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self.keep and failed is None:
            self.leave()
        else:
            self.stop()

    def start(self) -> None:
        """Sweep what a killed run left, make hosts and engines; raise RehearsalError, having taken all down again."""
        self._lock.acquire()
        if self._lock.read().get("kept"):
            self._lock.release()
            raise RehearsalError(KEPT)
        try:
            atexit.register(self.stop)  # for a Ctrl-C in the moment between a `with` and its exit
            self._handlers = signals.once()
            self._make()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Take everything down; a Ctrl-C meanwhile changes nothing, and a second call does nothing."""
        if self._lock.held:
            sweep.clear(self._record)
            self._lock.write({})
            for process in self._processes.values():
                process.wait(10)
            self._end()

    def leave(self) -> None:
        """Leave everything up for later; `sweep.take_down()` ends it."""
        self._lock.write({**self._record, "kept": True})
        self._end()

    def base_image(self) -> str:
        """The stand-in vLLM image on the builder's engine, built if its inputs have changed."""
        return image.make(self.builder, self.say)

    def copy(self, name: str) -> None:
        """Give an image of the builder's to every host that lacks it; such a host is switched off and on for it."""
        wanted = self.builder.image_id(name)
        lacking = [host for host in self.hosts if host.engine.image_id(name) != wanted]
        if not wanted or not lacking:
            return
        with step(self.say, f"copying {name} to {', '.join(host.name for host in lacking)}"):
            self.builder.docker("image", "prune", "--force")
            for host in lacking:
                self.power_off(host)
                image.clone(self.builder, host.engine)
                self.power_on(host)

    def power_off(self, host: Host) -> None:
        """Kill a host's engine and all its containers at once, as a power cut does; its links stay."""
        cgroup.end(host.name, seconds=0)
        self._processes.pop(host.name).wait(10)

    def power_on(self, *hosts: Host) -> None:
        """Start the engines of hosts and wait until they answer."""
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        started = [(host.engine, self._start(host, f"127.0.0.1 localhost\n{names}")) for host in hosts]
        for engine, process in started:
            engine.ready(process)

    def link_down(self, host: Host, netdev: str) -> None:
        """Take the carrier from a host's network device, by its cable's other end."""
        links.switch(self._spaces, host.number, netdev, "down")

    def link_up(self, host: Host, netdev: str) -> None:
        """Give the carrier back."""
        links.switch(self._spaces, host.number, netdev, "up")

    @property
    def _spaces(self) -> list[str]:
        return [host.engine.namespace for host in self.hosts]

    @property
    def _record(self) -> dict:
        engines = [self.builder, *(host.engine for host in self.hosts)]
        switches = [] if len(self.hosts) == 2 else [links.SWITCH]
        spaces = [*(engine.namespace for engine in engines), *switches]
        return {"root": str(self.root), "engines": [engine.name for engine in engines], "spaces": spaces}

    def _make(self) -> None:
        sweep.clear(self._lock.read())
        self._lock.write(self._record)
        for space in self._record["spaces"]:
            run("ip", "netns", "add", space)
            run("ip", "-n", space, "link", "set", "lo", "up")
        links.connect(self._spaces)
        self._furnish()
        builder = self._start_builder()
        self.power_on(*self.hosts)
        self.builder.ready(builder)

    def _furnish(self) -> None:
        tools = place.state(self.root, "bin")
        tools.mkdir(parents=True)
        script(tools / "nvidia-smi", *(image.CONTEXT / "nvidia-smi").read_text().splitlines()[1:])
        for host in self.hosts:
            host.prepare()

    def _start_builder(self) -> subprocess.Popen:
        lent = pip_settings.additions(self.builder.state / "pip")
        lent["network"] = str(self.builder.state / "net/machine")
        return self._run(self.builder, hosts=Path("/etc/hosts").read_text(), additions=lent, infiniband=False)

    def _start(self, host: Host, hosts: str) -> subprocess.Popen:
        device = host.number not in self.without_device
        return self._run(host.engine, hosts=hosts, additions={}, infiniband=device)

    def _run(self, engine: Engine, **options) -> subprocess.Popen:
        self._processes[engine.name] = engine.start(bound=not self.keep, **options)
        return self._processes[engine.name]

    def _end(self) -> None:
        atexit.unregister(self.stop)
        signals.restore(self._handlers)
        self._handlers = {}
        self._lock.release()
