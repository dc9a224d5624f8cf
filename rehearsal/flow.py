"""The rehearsal: the project's own tasks run on stand-in Sparks, step by step. A list at the end shows the results."""

import json
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.command import render, words_of
from cluster.models import Model, known_models
from cluster.node import HF_CACHE
from cluster.settings import load_settings
from rehearsal import image
from rehearsal.hosts import INV, Host
from rehearsal.rig import Rig
from rehearsal.shell import RehearsalError, Say, wait

IMAGE = "rehearsal/vllm-ray"
READY_S = 300
NOT_RUNNING = 12  # the exit status of `inv health`
# spark/runc.py drops all limits, because many sandboxes may not raise one. The rule about locked memory then refuses.
ALLOW = "memlock"
PARSER = Path(__file__).with_name("parse_lines.py")


class Flow:
    """The whole flow of the article, on a rig that is up."""

    def __init__(self, rig: Rig, say: Say) -> None:
        self.rig, self.say = rig, say
        self.head, *self.workers = rig.hosts
        self.key = secrets.token_hex(16)
        header_file(self.head).touch(mode=0o600)
        header_file(self.head).write_text(f"Authorization: Bearer {self.key}\n")
        self.size = {"TP_SIZE": str(len(rig.hosts))}

    def steps(self, keep: bool) -> list[tuple[str, Callable[[], None]]]:
        """Return each promise of a rehearsal with its step, in order. With keep the server stays up."""
        steps = [
            ("build-image puts Ray on an image without it", self.build),
            ("every host has the same image", lambda: self.rig.copy(IMAGE)),
            ("head and worker come up, and Ray has every node", self.bring_up),
            ("vLLM's own parser accepts the lines of every model", self.parse),
            ("launch serves the tiny model, and health says healthy", self.launch),
            ("the model's ranks are on different hosts", self.ranks),
            ("the API answers a chat completion with the key", lambda: self.chat(self.key, "200")),
            ("the API refuses a chat completion without the key", lambda: self.chat("", "401")),
            ("stop ends the server and its ranks, and leaves Ray up", self.stop),
            ("cleanup removes every node's containers", self.cleanup),
        ]
        return steps[:-2] if keep else steps

    def build(self) -> None:
        """Build the image on the builder's engine, with the project's own task."""
        base = image.make(self.rig.builder, self.say)
        words = [*INV, "build-image", "--base-image", base, "--tag", IMAGE]
        self._follow("builder", words, self.rig.builder.env | {"ENV_FILE": ""})

    def bring_up(self) -> None:
        for host in self.rig.hosts:
            role = "head" if host is self.head else "worker"
            self._type(host, role, "--detach", "--model", "rehearsal", **self.size)
        self._has_every_node(wait_s=60)

    def parse(self) -> None:
        """Raise RehearsalError if vLLM's parser refuses the `vllm serve` line of a model."""
        if said := refused(self.head, [serve_line(model) for model in known_models().values()]):
            raise RehearsalError("\n".join(said))

    def launch(self) -> None:
        """Launch. Then ask `inv health` until the state is healthy or the server has ended."""
        words = ("launch", "--detach", "--model", "rehearsal", "--allow", ALLOW)
        self._type(self.head, *words, VLLM_API_KEY=self.key, **self.size)
        wait(lambda: self._health().returncode in (0, NOT_RUNNING), READY_S, pause=2)
        health = self._health()
        for line in health.stderr.splitlines():
            self.say(f"{self.head.name} | {line}")
        if health.returncode:
            self._type(self.head, "logs")
            raise RehearsalError(f"inv health ended with status {health.returncode}")

    def ranks(self) -> None:
        """Raise RehearsalError unless each host has one rank of the model."""
        self._has_ranks("1")

    def _has_ranks(self, expected: str) -> None:
        for host in self.rig.hosts:  # Ray titles a rank with its class
            count = host.run("docker", "exec", "node-ray", "pgrep", "-fc", "^ray::RayWorkerProc").stdout.strip()
            self.say(f"{host.name} | ranks of the model in its container: {count}")
            if count != expected:
                raise RehearsalError(f"expected {expected}")

    def chat(self, key: str, expected: str) -> None:
        """Request a chat completion from the last host. No command line holds the key."""
        client = self.rig.hosts[-1]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        curl = ("curl", "-sS", "--max-time", "60", "--output", "/dev/null", "--write-out", "%{http_code}")
        asked = ("--header", "@-", "--json", json.dumps(body), f"http://{self.head.address}:8000/v1/chat/completions")
        header = f"Authorization: Bearer {key}" if key else ""
        done = client.run("docker", "exec", "-i", "node-ray", *curl, *asked, input=header, stdin=None)
        self.say(f"{client.name} | POST /v1/chat/completions: {done.stdout.strip()} {done.stderr.strip()}")
        if done.stdout.strip() != expected:
            raise RehearsalError(f"expected {expected}")

    def stop(self) -> None:
        """End the server. Raise RehearsalError if a rank is left then, or if Ray lacks a node."""
        self._type(self.head, "stop")
        self._has_ranks("0")
        self._has_every_node()

    def cleanup(self) -> None:
        for host in self.rig.hosts:
            self._type(host, "cleanup", "--yes")

    def _has_every_node(self, wait_s: float = 0) -> None:
        if not wait(lambda: f"Ray: {len(self.rig.hosts)} nodes" in self._health().stderr, wait_s, pause=2):
            raise RehearsalError(f"Ray lacks a node: {self._health().stderr}")

    def _health(self) -> subprocess.CompletedProcess:
        return self.head.run(*INV, "health", env={"VLLM_API_KEY": self.key}, timeout=60)

    def _type(self, host: Host, *words: str, **env: str) -> None:
        """Run a task on a host, and show the lines that the task prints."""
        self.say(f"{host.name} $ inv {' '.join(words)}")
        self._follow(host.name, host.command(*INV, *words), host.env | env)

    def _follow(self, name: str, words: list[str], env: dict[str, str]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(words, env=env, text=True, **pipes) as task:
            for line in task.stdout or ():
                self.say(f"{name} | {line.rstrip()}")
        if task.returncode:
            raise RehearsalError(f"the task failed with status {task.returncode}")


def header_file(head: Host) -> Path:
    """Return the file with the header of the API key, for `curl -H @FILE`. Only root can read the file."""
    return head.state / "authorization"


def serve_line(model: Model, turned: dict[str, str] | None = None) -> list[str]:
    """Return the words of the model's `vllm serve` line. turned: knobs, set as if in the shell."""
    settings = load_settings(model, shell={"ENV_FILE": "", **(turned or {})})
    return words_of(render(model.serve, hf_cache=HF_CACHE, **settings.public()))


def refused(host: Host, lines: list[list[str]]) -> list[str]:
    """Return vLLM's own message for each line that its parser refuses. The host's engine runs the image."""
    python = ("--volume", f"{PARSER}:{PARSER}:ro", "--entrypoint", "python3", IMAGE, str(PARSER))
    words = ("docker", "run", "--rm", "--interactive", *python)
    done = host.run(*words, input=json.dumps(lines), stdin=None, timeout=300)
    if done.returncode:
        raise RehearsalError(f"vLLM's parser could not be asked: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rehearse(rig: Rig, say: Say, keep: bool = False) -> tuple[list[str], bool]:
    """Run the steps on a rig that is up, until a step fails.

    Returns a list of lines, and whether all steps succeeded. Each line has a promise and the seconds of its step.
    """
    steps, report, well = Flow(rig, say).steps(keep), [], True
    for number, (promise, do) in enumerate(steps, 1):
        if not well:
            report.append(f"[ ] {promise}")
            continue
        say(f"\n[{number}/{len(steps)}] {promise}")
        start = time.monotonic()
        try:
            do()
        except (RehearsalError, OSError, subprocess.SubprocessError) as error:
            say(f"FAILED: {error}")
            well = False
        report.append(f"[{'✓' if well else 'x'}] {promise:<68} {time.monotonic() - start:6.1f} s")
    return report, well
