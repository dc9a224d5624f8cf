"""An operator at stand-in Sparks: terminals, tasks that run in them, and the containers that a task leaves."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

from rehearsal.flow import IMAGE
from rehearsal.hosts import INV, Host
from rehearsal.shell import wait

KEY = "sk-stand-in-marker"
SHELL = {"VLLM_IMAGE": IMAGE}
# `inv` in a terminal. Under `nohup` or behind `&`, SIGHUP or SIGINT would be inherited as ignored.
TYPED = ("env", "--default-signal=HUP,INT", *INV)


class Terminal:
    """A task in a terminal of its own, as a person has one: its output so far, and the signals that end it."""

    def __init__(self, host: Host, *words: str, **env: str) -> None:
        self.said = ""
        self.process = host.popen(
            *TYPED, *words, env=SHELL | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        os.set_blocking(self.process.stdout.fileno(), False)

    def read(self) -> str:
        """Return the whole output so far."""
        self.said += (self.process.stdout.read() or b"").decode(errors="replace")
        return self.said

    def until(self, text: str, seconds: float = 120) -> None:
        """Wait until the text is in the output."""
        assert wait(lambda: text in self.read() or self.process.poll() is not None, seconds), self.said
        assert text in self.read(), self.said

    def end(self, number: signal.Signals, seconds: float = 120) -> int:
        """Send a signal to the task's own process, wait until it has ended, and return its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(seconds)
        self.read()
        return status


def bring_up(sparks: list[Host], terminal: Callable[..., Terminal], **env: str) -> list[Terminal]:
    """Open a terminal for the head and one for each worker, and wait until Ray has all of them."""
    head, *workers = sparks
    opened = [terminal(head, "head", "--model", "rehearsal", **env)]
    opened += [terminal(worker, "worker", "--model", "rehearsal") for worker in workers]
    assert wait(lambda: joined(sparks), 180, pause=1), [one.read() for one in opened]
    return opened


def joined(sparks: list[Host]) -> bool:
    """Whether Ray has every node."""
    return f"Ray: {len(sparks)} nodes" in inv(sparks[0], "health").stderr


def inv(host: Host, *words: str, **env: str) -> subprocess.CompletedProcess:
    """Type a task on the host and wait for its end."""
    return host.run(*INV, *words, env=SHELL | env, timeout=120)


def containers(host: Host) -> str:
    """Return the names and states of the containers on the host, running or not."""
    return host.run("docker", "ps", "--all", "--format", "{{.Names}} {{.State}}").stdout.strip()


def gone(host: Host, seconds: float = 60) -> bool:
    """Whether the host's last container goes within so many seconds."""
    return wait(lambda: not containers(host), seconds)


def serving(host: Host) -> bool:
    """Whether a `vllm serve` runs in the host's container."""
    return host.run("docker", "exec", "node-ray", "pgrep", "-f", "bin/vllm serve").returncode == 0


def settled(condition: Callable[[], bool], seconds: float = 3) -> bool:
    """Whether a condition is true now and stays true for so many seconds."""
    end = time.monotonic() + seconds
    while held := condition():
        if time.monotonic() > end:
            break
        time.sleep(0.3)
    return held


def slowness() -> float:
    """How many times longer than its processor time a piece of work takes here: 1 on a machine with nothing to do."""
    wall, cpu = time.monotonic(), time.process_time()
    while (spent := time.process_time() - cpu) < 0.5:
        pass
    return (time.monotonic() - wall) / spent
