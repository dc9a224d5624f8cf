"""Two stand-in Sparks for the whole session, and an operator who types `inv …` on them."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from operating import Terminal, bring_up, joined, serving
from shells import Shells

from rehearsal import needs
from rehearsal.flow import IMAGE, Flow
from rehearsal.hosts import Host
from rehearsal.rig import Rig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that share the session's rig last: while it is up, no other rehearsal can run."""
    items.sort(key=lambda item: "rig" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Stand-in Sparks, each with the image. Where no rehearsal can run, the tests are skipped; in CI they fail."""
    if said := needs.missing(tests=True):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    with Rig(say=lambda line: print(line, flush=True)) as made:
        Flow(made, made.say).build()
        made.copy(IMAGE)
        yield made


@pytest.fixture(scope="session")
def shells(rig: Rig) -> Shells:
    """An sshd on every worker. The head reaches the worker as spark-2. The sshds end with the rig."""
    made = Shells(rig.hosts)
    for worker in rig.hosts[1:]:
        made.start(worker)
    return made


class Standing:
    """Head and worker for the tiny model. They stay up from test to test, unless a test has damaged them."""

    def __init__(self, hosts: list[Host]) -> None:
        self.hosts = hosts
        self.terminals: list[Terminal] = []

    def up(self) -> list[Terminal]:
        """Return the terminals of both nodes. Ray has both nodes, and no server runs."""
        if not self._whole():
            self.down()
            self.terminals = bring_up(self.hosts, Terminal)
        return self.terminals

    def down(self) -> None:
        """Remove the containers and wait for the terminals."""
        for host in self.hosts:
            host.run("docker", "rm", "--force", "node-ray")
        for terminal in self.terminals:
            terminal.process.wait(60)
        self.terminals = []

    def _whole(self) -> bool:
        alive = self.terminals and all(terminal.process.poll() is None for terminal in self.terminals)
        return bool(alive) and joined(self.hosts) and not serving(self.hosts[0])


@pytest.fixture(scope="module")
def standing(rig: Rig) -> Iterator[Standing]:
    """One cluster for the tests of a module."""
    made = Standing(rig.hosts)
    yield made
    made.down()


@pytest.fixture
def sparks(rig: Rig, standing: Standing, request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """The two hosts. They are empty before and after a test, unless the test also uses the cluster."""
    if "cluster" in request.fixturenames:
        yield rig.hosts
    else:
        standing.down()
        yield rig.hosts
        standing.down()


@pytest.fixture
def cluster(standing: Standing) -> list[Terminal]:
    """Head and worker are up for the tiny model, and Ray has both."""
    return standing.up()


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
