"""A Docker Engine in namespaces of its own, in front of whose runc stands `spark/runc.py`."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rehearsal import cgroup, place
from rehearsal.shell import PATH, RehearsalError, bound_to_us, contained, run, tail, wait, works

PARTS = Path(__file__).parent / "spark"
HOOK = "nvidia-container-runtime-hook"  # dockerd offers `--gpus` as soon as its PATH has a program of this name


@dataclass(frozen=True)
class Engine:
    """One Docker Engine: `spark-1`, `spark-2`, … or `builder`."""

    name: str
    root: Path

    @property
    def namespace(self) -> str:
        """The network namespace it runs in, and its containers with `--network host`."""
        return f"rehearsal-{self.name}"

    @property
    def state(self) -> Path:
        """Its folder for this run."""
        return place.state(self.root, self.name)

    @property
    def data(self) -> Path:
        """Its images, kept between runs."""
        return place.data(self.root, self.name)

    @property
    def env(self) -> dict[str, str]:
        """A clean environment in which `docker` talks to this engine; nothing of the operator's but PATH."""
        return {
            "PATH": PATH,
            "HOME": str(self.state / "home"),
            "LANG": "C.UTF-8",
            "DOCKER_HOST": f"unix://{self.state}/docker.sock",
            "PYTHONDONTWRITEBYTECODE": "1",  # root leaves no files in the checkout
        }

    def docker(self, *words: str) -> str:
        """Run a short docker command on this engine and return what it printed."""
        return run("docker", *words, env=self.env)

    def image_id(self, image: str) -> str | None:
        """The id of an image, None if this engine does not have it."""
        known = works("docker", "image", "inspect", image, env=self.env)
        return self.docker("image", "inspect", "--format", "{{.Id}}", image) if known else None

    def start(self, *, bound: bool, infiniband: bool, hosts: str, additions: dict) -> subprocess.Popen:
        """Start it, and let it die with this process if `bound`; its network namespace must be there.

        `additions` is what its runc adds to every container (see `spark/runc.py`), `hosts` its /etc/hosts.
        """
        self._write(hosts, additions)
        entrance = cgroup.entrance(self.name)
        boot = ("sh", PARTS / "boot.sh", self.state, self.name, self.namespace, entrance, str(int(infiniband)))
        line = contained(*boot)
        line = bound_to_us(*line) if bound else line
        with self._log.open("w") as log:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            return subprocess.Popen(line, env=self.env, start_new_session=True, **quiet)

    def ready(self, process: subprocess.Popen) -> None:
        """Wait until it answers, and remove what a killed run left in it; raise RehearsalError if it ends or hangs."""
        answers = lambda: works("docker", "version", env=self.env)  # noqa: E731
        if not wait(lambda: process.poll() is not None or answers(), 60) or process.poll() is not None:
            raise RehearsalError(f"the Docker Engine of {self.name} did not start, see {self._log}:\n{self.last_words}")
        self.empty()

    def empty(self) -> None:
        """Remove every container of this engine, running or not."""
        if containers := self.docker("ps", "--all", "--quiet"):
            self.docker("rm", "--force", "--volumes", *containers.split())

    @property
    def last_words(self) -> str:
        """The end of its log."""
        return tail(self._log.read_text(errors="replace"), 8)

    @property
    def _log(self) -> Path:
        return place.log(self.root, self.name)

    def _write(self, hosts: str, additions: dict) -> None:
        self._forget()
        for folder in (self.state / "home", self.state / "etc", self.state / "bin", self._log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (self.state / "engine.json").write_text(json.dumps(self._settings(), indent=1))
        (self.state / "additions.json").write_text(json.dumps(additions, indent=1))
        (self.state / "etc/hosts").write_text(hosts)
        (self.state / "etc/resolv.conf").write_text(Path("/etc/resolv.conf").read_text())
        front = [
            sys.executable,
            "-IS",
            PARTS / "runc.py",
            shutil.which("runc", path=PATH),
            self.state / "additions.json",
        ]
        script(self.state / "bin/runc", f'exec {shlex.join(map(str, front))} "$@"')
        script(self.state / "bin" / HOOK, "exit 0")

    def _forget(self) -> None:
        """Remove what a power cut left: process ids that name strangers in the next process namespace."""
        shutil.rmtree(self.state / "exec", ignore_errors=True)
        for name in ("docker.pid", "docker.sock"):
            (self.state / name).unlink(missing_ok=True)

    def _settings(self) -> dict:
        """What would be dockerd's flags; a file, because without one it reads this machine's own."""
        return {
            "data-root": str(self.data),
            "exec-root": str(self.state / "exec"),
            "pidfile": str(self.state / "docker.pid"),
            "hosts": [f"unix://{self.state}/docker.sock"],
            "bridge": "none",
            "iptables": False,
            "ip-forward": False,
            "storage-driver": "overlay2",
            "features": {"containerd-snapshotter": False},  # new engines' own choice; `image.clone` knows overlay2
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": cgroup.parent(self.name),
        }


def script(path: Path, *lines: str) -> None:
    """Write an executable sh script."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
