"""A Docker Engine in namespaces of its own. The engine runs `spark/runc.py`, which then becomes the real runc."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.repository import ROOT
from rehearsal import sandbox
from rehearsal.shell import PATH, RehearsalError, run, tail, wait, works

BOOT = Path(__file__).parent / "spark/boot.sh"


@dataclass(frozen=True)
class Engine:
    """One Docker Engine: `spark-1`, `spark-2`, … or `builder`. Its network in /run/netns has the same name."""

    name: str
    root: Path

    @property
    def state(self) -> Path:
        return sandbox.state(self.root, self.name)

    @property
    def data(self) -> Path:
        """The folder of images and layers. It is kept between runs."""
        return self.root / "engines" / self.name

    @property
    def env(self) -> dict[str, str]:
        """The environment in which `docker` talks to this engine. Only PATH comes from the operator's environment."""
        return {
            "PATH": PATH,
            "HOME": str(self.state / "home"),
            "LANG": "C.UTF-8",
            "DOCKER_HOST": f"unix://{self.state}/docker.sock",
            "PYTHONDONTWRITEBYTECODE": "1",  # root must leave no files in the checkout
        }

    def docker(self, *words: str) -> str:
        return run("docker", *words, env=self.env)

    def image_id(self, image: str) -> str:
        """Return the id of an image. The id is empty if this engine does not have the image."""
        return self.docker("image", "ls", "--quiet", "--no-trunc", image)

    def start(self, hosts: str, additions: dict) -> subprocess.Popen:
        """Start the engine in the sandbox. The engine's network must exist already.

        hosts: the text of the engine's /etc/hosts. additions: the mounts and variables that `spark/runc.py` adds to
        every container.
        """
        for folder in (self.state / "home", self._log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (self.state / "hosts").write_text(hosts)
        (self.state / "additions.json").touch(0o600)  # the address of a pip index may hold a password
        (self.state / "additions.json").write_text(json.dumps(additions, indent=1))
        boot = ("sh", BOOT, self.name, self.state, self.data, f"/{sandbox.CGROUP}/{self.name}", ROOT, sys.executable)
        unshare = ("unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child")
        with self._log.open("w") as log:
            quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": self.env}
            line = sandbox.entered(*unshare, *boot, processes=True)
            return subprocess.Popen(line, start_new_session=True, **quiet)

    def ready(self, process: subprocess.Popen) -> None:
        """Wait until the engine answers. Then remove the containers that a killed run left.

        Raises RehearsalError if the engine ends, or does not answer within a minute.
        """
        answers = lambda: works("docker", "version", env=self.env)  # noqa: E731 - it reads as one sentence below
        if not wait(lambda: process.poll() is not None or answers(), 60) or process.poll() is not None:
            words = tail(self._log.read_text(errors="replace"), 8)
            raise RehearsalError(f"the Docker Engine of {self.name} did not start, see {self._log}:\n{words}")
        if containers := self.docker("ps", "--all", "--quiet"):
            self.docker("rm", "--force", "--volumes", *containers.split())

    def kill(self, process: subprocess.Popen) -> None:
        """Kill the engine and all its containers at once. Wait until the kernel has ended their processes."""
        os.kill(sandbox.child(sandbox.child(process.pid)), signal.SIGKILL)
        process.wait(30)

    @property
    def _log(self) -> Path:
        return sandbox.log(self.root, self.name)
