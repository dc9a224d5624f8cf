"""Two stand-in Sparks for the whole session, and an operator who types `inv …` on them."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from operating import Terminal, bring_up

from rehearsal import needs
from rehearsal.flow import IMAGE, Flow
from rehearsal.hosts import Host
from rehearsal.rig import Rig
from rehearsal.shells import Shells


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Stand-in Sparks with the product's image on each; skipped where they can't run, which in CI is a failure."""
    if said := needs.missing(tests=True):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    with Rig(say=lambda line: print(line, flush=True)) as made:
        Flow(made, made.say).build()
        made.copy(IMAGE)
        yield made


@pytest.fixture(scope="session")
def shells(rig: Rig) -> Shells:
    """A sshd on every worker, which the head reaches as spark-2; they end with the rig."""
    made = Shells(rig.hosts)
    for worker in rig.hosts[1:]:
        made.start(worker)
    return made


@pytest.fixture
def sparks(rig: Rig) -> Iterator[list[Host]]:
    """The two hosts with nothing on them, before and after."""
    yield rig.hosts
    for host in rig.hosts:
        host.run("docker", "rm", "--force", "node-ray")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Opens terminals, and closes those that a failed test leaves open."""
    opened: list[Terminal] = []

    def open_one(host: Host, *words: str, **env: str) -> Terminal:
        opened.append(Terminal(host, *words, **env))
        return opened[-1]

    yield open_one
    for left in opened:
        if left.process.poll() is None:
            left.end(signal.SIGKILL)


@pytest.fixture
def cluster(sparks: list[Host], terminal: Callable[..., Terminal]) -> list[Terminal]:
    """Head and worker up for the tiny model, and Ray has both."""
    return bring_up(sparks, terminal)
