"""A stand-in Spark as commands see it: its network, its Docker Engine, its sysfs tree and its cache."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rehearsal import links, model, place
from rehearsal.engine import Engine
from rehearsal.shell import bound_to_us

# What a person types as `inv`, in the Python that runs this.
INV = (sys.executable, "-m", "invoke", "--search-root", str(Path(__file__).resolve().parent.parent))


@dataclass(frozen=True)
class Host:
    """Stand-in Spark number `number`, counted from 1."""

    number: int
    root: Path
    bound: bool = True

    @property
    def name(self) -> str:
        """Its host name, which its containers see too."""
        return f"spark-{self.number}"

    @property
    def address(self) -> str:
        """Its IPv4 address on the control link."""
        return links.CONTROL.address(self.number)

    @property
    def engine(self) -> Engine:
        """Its Docker Engine."""
        return Engine(self.name, self.root)

    @property
    def cache(self) -> Path:
        """Its CACHE_DIR, which holds the tiny model; gone after the run."""
        return place.state(self.root, self.name) / "cache"

    @property
    def env(self) -> dict[str, str]:
        """The whole environment of a command on this host: nothing of the operator's but PATH."""
        return {
            **self.engine.env,
            "PATH": f"{place.state(self.root, 'bin')}:{self.engine.env['PATH']}",  # nvidia-smi
            "SYSFS": str(self.engine.state / "sys"),
            "CACHE_DIR": str(self.cache),
            "ENV_FILE": "",  # the operator's .env says nothing about this host
        }

    def command(self, *words: str) -> list[str]:
        """The words that run `words` on this host, with the /sys of its network; give it `env` too."""
        return ["ip", "netns", "exec", self.engine.namespace, *words]

    def run(self, *words: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
        """Run words on this host to their end; `env` is added to the host's own. Options are subprocess.run's."""
        options = {"text": True, "capture_output": True, "stdin": subprocess.DEVNULL, **options}
        return subprocess.run(self.command(*words), env={**self.env, **(env or {})}, **options)

    def popen(self, *words: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """Start words on this host; they are killed with this process unless the rig is kept."""
        line = self.command(*words)
        return subprocess.Popen(bound_to_us(*line) if self.bound else line, env={**self.env, **(env or {})}, **options)

    def prepare(self) -> None:
        """Write its sysfs tree and the tiny model."""
        links.write_sysfs(self.engine.state / "sys")
        model.write(self.cache / "huggingface" / model.NAME)
