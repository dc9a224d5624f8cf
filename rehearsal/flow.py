"""The rehearsal: the product's own tasks on stand-in Sparks, step by step, and a checked list at the end."""

import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rehearsal import lines, place
from rehearsal.hosts import INV, Host
from rehearsal.rig import Rig
from rehearsal.shell import RehearsalError, Say, wait
from settings import models

IMAGE = "rehearsal/vllm-ray"
READY_S = 300
# The stand-in's runtime drops the limits that many sandboxes may not raise, and with them locked memory's.
ALLOW = "memlock"
_PIPES = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
_CHAT = """
import json, os, sys, urllib.request
body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
request = urllib.request.Request(f"http://{sys.argv[1]}:8000/v1/chat/completions", json.dumps(body).encode(),
    {"Content-Type": "application/json"})
if os.environ["KEY"]:
    request.add_header("Authorization", "Bearer " + os.environ["KEY"])
try:
    print(urllib.request.urlopen(request, timeout=60).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@dataclass
class Step:
    """One line of the checked list; `seconds` is None until it has run, `failed` is why it failed."""

    promise: str
    do: Callable[[], None]
    seconds: float | None = None
    failed: str = ""


class Flow:
    """The article's whole flow on a rig that is up; the API's key lives in the environment of its commands only."""

    def __init__(self, rig: Rig, say: Say) -> None:
        self.rig, self.say = rig, say
        self.head, *self.workers = rig.hosts
        self.key = secrets.token_hex(16)
        header_file(self.head).touch(mode=0o600)
        header_file(self.head).write_text(f"Authorization: Bearer {self.key}\n")
        self.size = {"TP_SIZE": str(len(rig.hosts))}
        self.terminals: list[subprocess.Popen] = []

    def steps(self, keep: bool) -> list[Step]:
        """What a rehearsal promises, in order; with keep the server stays up."""
        steps = [
            Step("build-image puts Ray on an image without it", self.build),
            Step("every host has the same image", lambda: self.rig.copy(IMAGE)),
            Step("head and worker come up, and Ray has every node", self.bring_up),
            Step("vLLM's own parser accepts the lines of every model", self.parse),
            Step("launch serves the tiny model, health says that all is well", self.launch),
            Step("its ranks are on different hosts", self.ranks),
            Step("a chat completion is answered with the key", lambda: self.chat(self.key, "200")),
            Step("and refused without it", lambda: self.chat("", "401")),
            Step("stop ends the server and leaves Ray up", self.stop),
            Step("cleanup removes every node's containers", self.cleanup),
        ]
        return steps[:-2] if keep else steps

    def build(self) -> None:
        """Build the image with the builder's engine, by the product's own task."""
        base = self.rig.base_image()
        env = self.rig.builder.env | {"ENV_FILE": ""}
        words = [*INV, "build-image", "--base-image", base, "--tag", IMAGE]
        self._follow("builder", subprocess.Popen(words, env=env, **_PIPES))

    def bring_up(self) -> None:
        """One terminal for each node, as on two Sparks."""
        self._open(self.head, "head", "--model", "rehearsal", **self.size)
        for worker in self.workers:
            self._open(worker, "worker", "--model", "rehearsal", **self.size)
        self._until(lambda: f"Ray: {len(self.rig.hosts)} nodes" in self._health().stderr, "Ray has every node")

    def parse(self) -> None:
        """Ask the real parser about each model's whole line."""
        if said := lines.refused(self.head, IMAGE, [lines.words(model) for model in models.known().values()]):
            raise RehearsalError("\n".join(said))

    def launch(self) -> None:
        """A third terminal, then health until it is well."""
        self._open(self.head, "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=self.key, **self.size)
        self._until(lambda: self._health().returncode == 0, "health says that all is well")
        for line in self._health().stderr.splitlines():
            self.say(f"{self.head.name} | {line}")

    def ranks(self) -> None:
        """Every host's container has one of vLLM's worker processes, which Ray calls by their class."""
        for host in self.rig.hosts:
            count = host.run("docker", "exec", "node-ray", "pgrep", "-fc", "^ray::RayWorkerProc").stdout.strip()
            self.say(f"{host.name} | ranks of the model in its container: {count}")
            if count != "1":
                raise RehearsalError("expected 1")

    def chat(self, key: str, expected: str) -> None:
        """Ask for a chat completion, from another host than the head where there is one."""
        client = self.rig.hosts[-1]
        done = client.run(sys.executable, "-c", _CHAT, self.head.address, env={"KEY": key}, timeout=120)
        self.say(f"{client.name} | POST /v1/chat/completions: {done.stdout.strip() or done.stderr[-300:]}")
        if done.stdout.strip() != expected:
            raise RehearsalError(f"expected {expected}")

    def stop(self) -> None:
        """End the server; its terminal says so, and Ray still has every node."""
        self._run(self.head, "stop")
        self.terminals.pop().wait(30)
        if f"Ray: {len(self.rig.hosts)} nodes" not in self._health().stderr:
            raise RehearsalError("Ray has lost a node")

    def cleanup(self) -> None:
        """Remove the containers; the terminals of head and worker end with them."""
        for host in self.rig.hosts:
            self._run(host, "cleanup", "--yes")
        while self.terminals:
            self.terminals.pop().wait(30)

    def _open(self, host: Host, *words: str, **env: str) -> None:
        """A terminal on the host, in which a task runs until it is ended; what it says is shown."""
        self.say(f"{host.name} $ inv {' '.join(words)}")
        # A file, which a rehearsal that is kept can go on writing to.
        file = place.log(self.rig.root, f"{host.name}-{words[0]}")
        with file.open("w") as output:
            process = host.popen(
                *INV, *words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self.terminals.append(process)
        threading.Thread(target=self._tail, args=(host.name, file, process), daemon=True).start()

    def _tail(self, name: str, file: Path, process: subprocess.Popen) -> None:
        with file.open(errors="replace") as lines:
            while (line := lines.readline()) or process.poll() is None:
                self.say(f"{name} | {line.rstrip()}") if line else time.sleep(0.2)

    def _run(self, host: Host, *words: str) -> None:
        self.say(f"{host.name} $ inv {' '.join(words)}")
        self._follow(host.name, host.popen(*INV, *words, **_PIPES))

    def _follow(self, name: str, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.say(f"{name} | {line.rstrip()}")
        if status := process.wait():
            raise RehearsalError(f"it failed with status {status}")

    def _health(self) -> subprocess.CompletedProcess:
        # A stand-in shares this machine's memory with the others: what is left of it is nothing to warn of.
        return self.head.run(*INV, "health", env={"VLLM_API_KEY": self.key, "MEM_WARN_GIB": "0"}, timeout=60)

    def _until(self, well: Callable[[], bool], what: str) -> None:
        """Wait for READY_S seconds at most, and no longer than every terminal lasts."""
        ended = lambda: [process for process in self.terminals if process.poll() is not None]  # noqa: E731
        if not wait(lambda: ended() or well(), READY_S, pause=2) or ended():
            raise RehearsalError("a terminal has ended" if ended() else f"not within {READY_S} s: {what}")


def header_file(head: Host) -> Path:
    """Where the header with the rehearsal's API key is kept, for root alone and for `curl -H @FILE`."""
    return head.engine.state / "authorization"


def rehearse(rig: Rig, say: Say, keep: bool = False) -> list[Step]:
    """Run every step on a rig that is up; the first that fails ends it, and the rest stay without a time."""
    steps = Flow(rig, say).steps(keep)
    for number, step in enumerate(steps, 1):
        say(f"\n[{number}/{len(steps)}] {step.promise}")
        start = time.monotonic()
        try:
            step.do()
        except (RehearsalError, OSError, subprocess.SubprocessError) as error:
            step.failed = str(error)
        step.seconds = time.monotonic() - start
        if step.failed:
            say(f"FAILED: {step.failed}")
            break
    return steps


def report(steps: list[Step]) -> list[str]:
    """The checked list: what was proven and how long each step took."""
    marks = [(" " if step.seconds is None else "x" if step.failed else "✓", step) for step in steps]
    return [
        f"[{mark}] {step.promise:<68} {'' if step.seconds is None else f'{step.seconds:6.1f} s'}"
        for mark, step in marks
    ]
