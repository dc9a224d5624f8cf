"""All nodes from the head: what `up` starts and in which order, what it takes down when a step fails, what `down` does.

Docker, ssh and the other nodes are made up here; the stand-in Sparks of tests/rehearsal have real ones.
"""

import errno
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from invoke import Exit

from checks import image, inspection, report
from cluster import detached, guards, leftovers, server
from cluster import engine as asked_by_guards
from cluster.node import Network
from command import run
from fleet import down, remote, up
from host import engine, ports
from settings import models, resolve, version
from vitals import load, recorded, served
from vitals.recorded import Recorded

ID = "0123456789abcdef" * 4
NET = Network("10.0.0.1", ("rocep1s0f0",), ("enp1s0f0np0",))
# Beside the head: `old` was up before, `new` is brought up.
SHELL = {"WORKER_HOSTS": "old,new", "TP_SIZE": "3", "HF_TOKEN": "hf", "VLLM_API_KEY": "sk", "ENV_FILE": ""}
UP = ["new up", "old up", "copy recorder", "server", "recorder", "follow"]
ALL = ["folders", "head", *UP]
TOLD = run.told


class Site:
    """A head and its workers: `did` is what was done, in order; a test changes what is there, and what a step does."""

    def __init__(self, settings):
        self.settings, self.did = settings, []
        self.head, self.address = False, "10.0.0.1"
        self.serving = self.seen = None
        self.came = threading.Event()
        self.steps, self.workers = {}, {"old": "", "new": f"Welcome!\n{ID}"}

    def step(self, name, *_, **__):
        """Note it, and do what a test says that happens then."""
        self.did.append(name)
        return self.steps.get(name, lambda: None)()

    def stands(self):
        """All of it is up, and the server has the line that is asked for."""
        self.head, self.workers = True, {"old": "", "new": ""}
        self.serving = SimpleNamespace(alive=True, words=server.words(self.settings), since=7)
        self.seen = Recorded(1, {"10.0.0.1": None}, {})

    def up(self, keep=False, fabric=False):
        """Type `inv up`."""
        self.came.clear()
        up.up(self.settings, NET, (), keep, fabric)

    def fails(self, name, text="it failed", code=1):
        """Have this step fail."""

        def fail():
            raise Exit(text, code=code)

        self.steps[name] = fail

    def signals(self, name, number):
        """Have this signal come while this step is under way."""
        self.steps[name] = lambda: os.kill(os.getpid(), number)

    @property
    def undone(self):
        """What was taken down again, in order of names where it happens at once."""
        return sorted({*self.did} & {"stop", "remove", "old down", "new down"})


@pytest.fixture
def site(operator, tmp_path):
    """Nothing is up but the worker `old`; who hears which signal is afterwards as it was."""
    settings = resolve.load(models.find("nemotron"), {}, SHELL | {"CACHE_DIR": str(tmp_path)})
    made = Site(settings)
    names = {tuple(server.stop().words): "stop", tuple(leftovers.removal().words): "remove"}
    names |= {tuple(server.start(settings).words): "server", tuple(server.recorder(settings).words): "recorder"}
    names |= {tuple(server.recorder_there().words): "copy recorder"}

    def told(command, who, seconds):
        if "worker --detach" not in command.words[-1]:
            return made.step(f"{who} down")
        # All are at it at once; what a test reads has an order.
        assert who != "old" or made.came.wait(5)
        try:
            made.step(f"{who} up")
        finally:
            made.came.set()
        return made.workers[who]

    def node():
        return SimpleNamespace(status="running", id=ID) if made.head or "head" in made.did else None

    found = SimpleNamespace(settings=settings, nodes=[SimpleNamespace(address="10.0.0.1")], findings=[])
    for module, name, stub in (
        (version, "digest", lambda: "SHA256"),
        (detached, "runs_already", lambda _: made.head),
        (detached, "start", lambda _: made.step("head")),
        (guards, "before_head", lambda *_: None),
        (guards, "before_launch", lambda _: None),
        (guards, "the_head", lambda _: None),
        (guards, "running_node", lambda _: None),
        (guards, "is_serving", lambda _: made.serving is not None or "server" in made.did),
        (run, "run", lambda _: made.step("folders")),
        (run, "run_whole", lambda command: made.step(names[tuple(command.words)])),
        (run, "told", told),
        (inspection, "inspect", lambda *_: found),
        (inspection, "gated", lambda settings, *_: (settings, (), ())),
        (image, "known", lambda *_: None),
        (report, "tell", lambda *_: None),
        (server, "prepare", lambda _: None),
        (served, "ask", lambda _: made.serving),
        (recorded, "read", lambda _: made.seen),
        (load, "follow", lambda *_, **__: made.step("follow")),
        (engine, "node", node),
        (engine, "environment", lambda _: {"MASTER_ADDR": "10.0.0.1", "VLLM_HOST_IP": made.address}),
        (engine, "age", lambda _: "1 min"),
        (asked_by_guards, "node_container", node),
        (asked_by_guards, "container_environment", lambda _: {"MASTER_ADDR": "10.0.0.1", "VLLM_HOST_IP": made.address}),
    ):
        operator.setattr(module, name, stub)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *run.ENDINGS)}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def test_up_starts_all_of_it_in_order(site):
    """Head, then the workers, then, all of them up, the server between its recorder's files and its recorder."""
    site.up()
    assert site.did == ALL and site.undone == []


def test_what_is_up_is_left_alone(site):
    """A server with this line, too: only its load is waited for, and a failure there takes nothing down."""
    site.stands()
    site.up()
    assert site.did == ["new up", "old up", "follow"]
    site.fails("follow")
    with pytest.raises(Exit):
        site.up()
    assert site.undone == []


@pytest.mark.parametrize("age", [None, 60, -60])
def test_a_recorder_that_has_stopped_is_started_again(age, site):
    """Beside the server, which is left alone."""
    site.stands()
    site.seen = None if age is None else Recorded(age, {"10.0.0.1": None}, {})
    site.up()
    assert site.did == ["new up", "old up", "copy recorder", "recorder", "follow"]


def test_a_server_that_has_the_gpus_is_not_proved_past(site):
    """`--fabric` on a cluster that serves is refused, not left out in silence."""
    site.stands()
    with pytest.raises(Exit, match=r"--fabric cannot be proved. Type: inv stop; or leave --fabric out"):
        site.up(fabric=True)
    assert site.undone == []


def test_a_second_up_at_the_same_time_is_refused(site):
    """Nothing of the first is touched, which goes on; afterwards another may be typed."""
    refused = []

    def second():
        del site.steps["follow"]
        with pytest.raises(Exit, match="Another inv up runs on this head") as error:
            site.up()
        refused.append(error)

    site.steps["follow"] = second
    site.up()
    assert refused and site.did == ALL
    site.up()
    assert site.did == ALL * 2


def test_a_folder_that_cannot_be_written_starts_nothing(site, tmp_path):
    """With what to look at."""
    (tmp_path / "node-ray").write_text("a file where the folder should be")
    with pytest.raises(Exit, match=r"up.lock cannot be written: .*\. Type: ls -ld /"):
        site.up()
    assert site.did == []


@pytest.mark.parametrize(("there", "undone"), [(True, ["new down"]), (False, ["new down", "remove"])])
def test_a_server_that_could_not_start_stops_nobodys(there, undone, site):
    """Somebody else's has the lock then: only nodes that this run has brought up are taken down."""
    site.head = there
    site.fails("server", "a server runs here already")
    with pytest.raises(Exit, match="a server runs here already"):
        site.up()
    assert site.undone == undone and "recorder" not in site.did


def test_a_head_that_could_not_start_is_not_removed(site):
    """Its container is gone, or is somebody's who was faster; no worker was asked."""
    site.fails("head", "node-ray ended with status 125")
    with pytest.raises(Exit, match="node-ray ended with status 125"):
        site.up()
    assert site.did == ["folders", "head"]


@pytest.mark.parametrize("where", ["server", "recorder", "follow"])
def test_a_terminal_that_is_lost_takes_nothing_down(where, site):
    """From when the server has started on: it goes on loading, guarded, and the next `up` waits for it."""
    site.signals(where, signal.SIGHUP)
    with pytest.raises(SystemExit) as ended:
        site.up()
    assert ended.value.code == 129 and site.undone == [] and {"server", "recorder"} <= {*site.did}


@pytest.mark.parametrize("reason", [OSError(errno.EIO, "Input/output error"), Exit("Nobody reads it any more")])
def test_what_fails_for_a_lost_terminal_takes_nothing_down(reason, site):
    """Whoever writes to it while the hang-up goes through fails in its place, whether it says of what or not."""

    def lost():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            raise reason from None

    site.steps["follow"] = lost
    with pytest.raises(type(reason)):
        site.up()
    assert site.undone == []


@pytest.mark.parametrize(
    ("where", "number", "code"),
    [("folders", signal.SIGHUP, 129), ("copy recorder", signal.SIGHUP, 129), ("follow", signal.SIGTERM, 143)],
)
def test_another_end_takes_down_what_was_started(where, number, code, site):
    """A hang-up before the server has started, or a SIGTERM: what this run has brought up until then."""
    site.signals(where, number)
    with pytest.raises(SystemExit) as ended:
        site.up()
    assert ended.value.code == code
    assert site.undone == ([] if where == "folders" else ["new down", "remove"])


def test_a_hang_up_that_is_ignored_stays_so(site):
    """`nohup inv up` goes on without its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    site.signals("follow", signal.SIGHUP)
    site.up()
    assert site.did == ALL and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_end_while_the_server_starts_waits_for_its_recorder(number, site):
    """It must not load unguarded."""
    site.signals("server", number)
    with pytest.raises((Exit, SystemExit)):
        site.up()
    assert site.did[: len(ALL) - 1] == ALL[:-1]


def test_ctrl_c_waits_for_the_workers(site):
    """Only when they have come back it is known which of them has to be taken down; a second one cuts nothing short."""

    def pressed():
        time.sleep(0.02)  # until they are waited for
        os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 2
        while signal.getsignal(signal.SIGINT) != signal.SIG_IGN and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        heard.append(signal.getsignal(signal.SIGINT))

    heard = []
    site.steps["new up"] = pressed
    with pytest.raises(Exit, match="Ctrl-C") as ended:
        site.up()
    assert (ended.value.code, site.undone) == (130, ["new down", "remove"]) and "server" not in site.did
    assert heard == [signal.SIG_IGN]


def test_a_server_of_this_runs_own_is_stopped(site):
    """Where the head was up before: else it goes with the head's container."""
    site.head = True
    site.fails("follow", "STUCK in weights")
    with pytest.raises(Exit, match="STUCK"):
        site.up()
    assert site.undone == ["new down", "stop"] and site.did.index("stop") < site.did.index("new down")


@pytest.mark.parametrize(("there", "undone"), [(True, ["new down"]), (False, ["new down", "remove"])])
def test_a_worker_that_fails_takes_down_what_this_run_started(there, undone, site):
    """The head and the other workers, and not those that were up before; it says which node failed, and why."""
    site.head = there
    site.fails("old up", "The engine is down.")
    with pytest.raises(Exit, match=r"^old: `inv worker .*\n  The engine is down\.$"):
        site.up()
    assert site.undone == undone and "server" not in site.did


def test_all_workers_that_fail_are_named(site):
    """With one line typed all of it can be mended."""
    site.fails("old up", "no image")
    site.fails("new up", "no docker")
    with pytest.raises(Exit, match=r"(?s)^old: .*no image.*\nnew: .*no docker"):
        site.up()
    assert site.undone == ["remove"]


@pytest.mark.parametrize("code", [remote.UNREACHED, 128 + signal.SIGKILL], ids=["broke", "took too long"])
def test_a_worker_that_may_be_somebodys_is_left(code, site):
    """Beside a head that was up before, who lost sight of a worker half way does not know whose it is."""
    site.head = True
    site.fails("new up", "Broken pipe", code)
    with pytest.raises(Exit, match="Broken pipe"):
        site.up()
    assert site.undone == []


def test_a_worker_that_was_lost_sight_of_goes_with_its_head(site):
    """The head is this run's own, and so is whatever has come up for it."""
    site.fails("new up", "Broken pipe", remote.UNREACHED)
    with pytest.raises(Exit, match="Broken pipe"):
        site.up()
    assert site.undone == ["new down", "remove"]


def test_a_worker_that_took_too_long_goes_with_its_head(site):
    """It may come up yet: only ssh was given up here."""
    site.fails("new up", "given up", 128 + signal.SIGKILL)
    with pytest.raises(Exit, match="given up"):
        site.up()
    assert site.undone == ["new down", "remove"]


@pytest.mark.parametrize("said", ["", "no id", ID[:12], f"{ID}\nGood bye", f"{ID}0", ID.upper(), f"id {ID}"])
def test_only_an_id_in_the_last_line_is_a_node_that_was_started(said, site):
    """Whatever a login prints there: a node that nobody here has started is not taken down."""
    site.workers["new"] = said
    site.fails("follow")
    with pytest.raises(Exit):
        site.up()
    assert site.undone == ["remove"]


@pytest.mark.parametrize("where", ["old up", "server", "follow"])
def test_keep_leaves_everything(where, site, capsys):
    """What has started stays, and how to take it down is said."""
    site.fails(where)
    with pytest.raises(Exit, match="it failed"):
        site.up(keep=True)
    assert site.undone == [] and "To take it down: inv down" in capsys.readouterr().err


def test_what_cannot_be_taken_down_hides_no_reason(site, capsys):
    """The other nodes go, and what failed at first is what is said last."""
    site.fails("follow", "STUCK in weights")
    site.fails("new down", "No route to host", remote.UNREACHED)
    with pytest.raises(Exit, match="STUCK in weights"):
        site.up()
    assert site.undone == ["new down", "remove"] and "new: `inv down" in capsys.readouterr().err


def test_a_head_that_cannot_be_taken_down_hides_no_reason(site):
    """Nor does its own container."""
    site.fails("follow", "STUCK in weights")
    site.fails("remove", "docker rm failed")
    with pytest.raises(Exit, match="STUCK in weights"):
        site.up()


@pytest.fixture
def standing(site):
    """All of it is up."""
    site.stands()
    return site


def test_down_takes_down_all_of_it(standing, capsys):
    """The server first, then every node at once."""
    down.down(standing.settings)
    assert standing.did[0] == "stop" and sorted(standing.did[1:]) == ["new down", "old down", "remove"]
    assert "node-ray was removed (running, 1 min old)." in capsys.readouterr().err


@pytest.mark.parametrize("what", ["is_serving", "stop"])
def test_a_server_that_cannot_be_stopped_keeps_no_node_up(what, standing, operator, capsys):
    """Nor does one that cannot be asked: it goes with its node, and that is said and no failure."""
    standing.fails("stop", "the server does not go")
    if what == "is_serving":
        operator.setattr(guards, "is_serving", lambda _: standing.step("stop"))
    down.down(standing.settings)
    assert standing.undone == ["new down", "old down", "remove", "stop"]
    assert "the server does not go" in capsys.readouterr().err


def test_a_worker_that_is_not_reached_is_named_at_the_end(standing):
    """All others are down by then, and what to say of a head without workers is told."""
    standing.fails("old down", "No route to host", remote.UNREACHED)
    with pytest.raises(
        Exit, match=r"(?s)^old: .*These nodes may still be up, the others are down.*WORKER_HOSTS=$"
    ) as no:
        down.down(standing.settings)
    assert "new" not in no.value.message and standing.undone == ["new down", "old down", "remove", "stop"]


def test_a_worker_that_does_not_answer_in_time_is_named(standing, operator, tmp_path):
    """A host that hangs keeps neither the head nor another worker up."""
    (tmp_path / "ssh").write_text('#!/bin/sh\ncase "$*" in *" old "*) exec sleep 60 ;; esac\n')
    (tmp_path / "ssh").chmod(0o755)
    operator.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    operator.setattr(run, "told", TOLD)
    operator.setattr(down, "THERE_S", 0.03)
    with pytest.raises(Exit, match=r"(?s)^old: .*did not end within 0 s and was killed\.\n.*may still be up"):
        down.down(standing.settings)
    assert "remove" in standing.did


def test_down_is_refused_where_nothing_is_the_heads(site, operator):
    """Another host would ask every worker to go; where the head's container is gone, its address tells."""
    operator.setattr(ports, "is_mine", lambda address: address != "10.0.0.1")
    with pytest.raises(
        Exit, match=r"This host is not the head: HEAD_NODE_IP \(default\) is 10\.0\.0\.1\. Type it there"
    ):
        down.down(site.settings)
    assert site.did == []
    operator.setattr(ports, "is_mine", lambda address: address == "10.0.0.1")
    down.down(site.settings)
    assert site.undone == ["new down", "old down"]


@pytest.mark.parametrize("status", ["running", "exited"])
def test_down_is_refused_on_a_worker(status, standing, operator):
    """Whether its container runs or not: its head is where that is typed."""
    standing.address = "10.0.0.2"
    operator.setattr(engine, "node", lambda: SimpleNamespace(status=status))
    operator.setattr(asked_by_guards, "node_container", lambda: SimpleNamespace(status=status))
    with pytest.raises(Exit, match=r"This node is a worker .* Type it on the head, 10\.0\.0\.1\."):
        down.down(standing.settings)
    assert standing.did == []


def test_down_asks_by_the_address_that_the_nodes_were_brought_up_with(standing, operator):
    """HEAD_NODE_IP may have been another in that shell, and then no worker would take this for its head."""
    asked = []
    operator.setattr(run, "told", lambda command, *_: asked.append(command.words[-1]))
    other = resolve.load(standing.settings.model, {}, SHELL | {"HEAD_NODE_IP": "10.0.0.7"})
    down.down(other)
    assert len(asked) == 2 and all(line.endswith("down --here --head-ip 10.0.0.1") for line in asked)


@pytest.mark.parametrize("typed", [lambda site: down.down(site.settings), lambda _: down.here()], ids=["down", "here"])
def test_a_container_of_somebody_elses_is_not_taken_down(typed, standing, operator):
    """One that is called so, and was started by neither task, is a person's question."""
    operator.setattr(engine, "environment", lambda _: {})
    operator.setattr(asked_by_guards, "container_environment", lambda _: {})
    with pytest.raises(Exit, match=r"was started by neither inv head nor inv worker. To look at it: inv cleanup"):
        typed(standing)
    assert standing.did == []


def test_a_node_of_another_head_is_left_alone(standing, capsys):
    """`down --here --head-ip` removes what belongs to that head, and says what it did."""
    down.here("10.0.0.9")
    assert standing.did == [] and "another head, 10.0.0.1: it was left alone" in capsys.readouterr().err
    down.here("10.0.0.1")
    assert standing.did == ["remove"]
