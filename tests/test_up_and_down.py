"""All nodes from the head: the steps of `up` in order, the undoing of those steps if one fails, and `down`.

Docker, ssh and the other nodes are stubs here. tests/rehearsal has real ones.
"""

import errno
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import (
    check,
    detached,
    engine,
    guards,
    load,
    node,
    options,
    readings,
    recorder,
    remote,
    repository,
    served,
    server,
    up,
)
from cluster.command import ENDINGS, held, run
from cluster.doctor import Told
from cluster.models import find_model
from cluster.node import Network
from cluster.recorder import Recorded
from cluster.settings import load_settings

ID = "0123456789abcdef" * 4
NET = Network("10.0.0.1", ("rocep1s0f0",), ("enp1s0f0np0",))
# Beside the head: `old` was up before, `new` is brought up.
SHELL = {"WORKER_HOSTS": "old,new", "TP_SIZE": "3", "HF_TOKEN": "hf", "VLLM_API_KEY": "sk", "ENV_FILE": ""}
ALL = ["head", "new up", "old up", "prepare", "server", "recorder", "follow"]


class Site:
    """A head and its workers. `did` lists the steps in order; a test sets what is up already, and what a step does."""

    def __init__(self, settings):
        self.settings, self.did = settings, []
        self.head, self.env = False, ["MASTER_ADDR=10.0.0.1", "VLLM_HOST_IP=10.0.0.1"]
        self.serving = self.seen = None
        self.came = threading.Event()
        self.hosts, self.asked = [], ()
        self.steps, self.workers = {}, {"old": "", "new": f"Welcome!\nstarted {ID}\nGood bye"}

    def asks(self, *_, workers):
        """Note the workers that are asked, and tell what the test has set for all hosts."""
        self.asked = workers
        return self.hosts

    def step(self, name, *_, **__):
        """Note the step, then do what the test has set for it."""
        self.did.append(name)
        return self.steps.get(name, lambda: None)()

    def stands(self):
        """Head, workers and server are up, and the server has the line that is asked for."""
        self.head, self.workers = True, {"old": "", "new": ""}
        self.serving = SimpleNamespace(alive=True, words=server.serve_words(self.settings), since=7)
        self.seen = Recorded({"10.0.0.1": None}, {})

    def container(self, status="running"):
        """The node's container, as the Docker SDK has it."""
        return SimpleNamespace(status=status, id=ID, attrs={"Config": {"Env": self.env}})

    def up(self, keep=False, fabric=False):
        """Type `inv up`."""
        self.came.clear()
        up.bring_up(self.settings, NET, (), keep, fabric)

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
        """Everything that was taken down, sorted, because some of it happens at the same time."""
        return sorted({*self.did} & {"stop", "remove", "old down", "new down"})


@pytest.fixture
def site(operator, tmp_path):
    """Only the worker `old` is up. Signal handlers are restored afterwards."""
    settings = load_settings(find_model("nemotron"), {}, SHELL | {"CACHE_DIR": str(tmp_path)})
    made = Site(settings)
    names = {tuple(server.stop_command().words): "stop", tuple(node.removal_command().words): "remove"}

    def runs(command, *, heard="", **_):
        if not heard:
            return made.step(names.get(tuple(command.words), "recorder"))
        try:
            return there(heard, "up" if "worker --detach" in command.words[-1] else "down")
        except Exit as error:
            raise Exit(f"{command.alias} failed:\n  {error.message}", code=error.code) from None

    def there(host, task):
        if task == "down":
            return made.step(f"{host} down")
        # The workers come up at the same time. The tests read them in an order.
        assert host != "old" or made.came.wait(5)
        try:
            made.step(f"{host} up")
        finally:
            made.came.set()
        return made.workers[host]

    def bring_node_up(*_):
        return None if made.head else made.step("head") or ID

    def begin(_, offline, started):
        with held():
            made.step("server")
            started()
            made.step("recorder")

    def container():
        return made.container() if made.head or "head" in made.did else None

    found = SimpleNamespace(settings=settings, nodes=[SimpleNamespace(address="10.0.0.1")], findings=[], offline=False)
    for module, name, stub in (
        (repository, "repository_digest", lambda: "SHA256"),
        (detached, "bring_node_up", bring_node_up),
        (guards, "before_launch", lambda _: None),
        (guards, "the_head", lambda _: None),
        (guards, "running_node", lambda _: None),
        (served, "server_runs", lambda _: made.serving is not None or "server" in made.did),
        (up, "run", runs),
        (up, "ask_hosts", made.asks),
        (remote, "run", runs),
        (check, "inspect", lambda *_: found),
        (options, "gated", lambda settings, *_: (settings, (), ())),
        (options, "known_options", lambda *_: None),
        (check, "tell_inspection", lambda *_: None),
        (server, "prepare", lambda _: made.step("prepare")),
        (server, "begin", begin),
        (served, "ask_server", lambda _: made.serving),
        (readings, "note_load", lambda _: None),
        (recorder, "read_recorded", lambda _: made.seen),
        (load, "follow_load", lambda *_, **__: made.step("follow")),
        (engine, "node_container", container),
        (engine, "container_age", lambda _: "1 min"),
    ):
        operator.setattr(module, name, stub)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
    # Under nohup SIGHUP is inherited as ignored, and behind & SIGINT.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def test_up_starts_everything_in_order(site):
    """`up` starts the head, then all workers, then the server, then the recorder."""
    site.up()
    assert site.did == ALL and site.undone == []


def test_a_host_without_the_image_starts_nothing(site):
    """`up` then names all that its hosts lack, in order. It asks only the workers that this model needs."""
    lacks = {"image": None, "weights": None, "token": None, "expected": 75e9}
    site.hosts = [Told("this host", lacks), Told("old", error="old: no route")]
    with pytest.raises(Exit) as refused:
        site.up()
    steps = [line.partition("inv ")[2].split()[0] for line in refused.value.message.splitlines()[1:]]
    assert steps == ["doctor", "build-image", "weights", "token", "launch"] and site.did == []
    assert "# some 10 minutes at 1 Gbit/s, then" in refused.value.message
    site.hosts = [Told("this host", lacks | {"image": "sha256:1"}), Told("old", lacks)]
    with pytest.raises(Exit, match=r"2\. .*inv ship-image --model nemotron  # minutes; seconds for"):
        site.up()
    site.settings = load_settings(site.settings.model, {}, SHELL | {"TP_SIZE": "1"})
    site.hosts = []
    site.up()
    assert [*site.asked] == []


def test_nodes_and_server_that_are_up_are_left_alone(site):
    """`up` then only waits for the load of that server. If the load fails, nothing is taken down."""
    site.stands()
    site.up()
    assert site.did == ["new up", "old up", "follow"]
    site.fails("follow")
    with pytest.raises(Exit):
        site.up()
    assert site.undone == []


def test_a_recorder_that_has_stopped_is_started_again(site):
    """`up` starts the recorder again, and leaves the server alone."""
    site.stands()
    site.seen = None
    site.up()
    assert site.did == ["new up", "old up", "recorder", "follow"]


def test_fabric_is_refused_while_a_server_runs(site):
    """`up --fabric` is refused on a cluster that serves. The flag is not silently ignored."""
    site.stands()
    with pytest.raises(Exit, match=r"--fabric needs the GPUs, .* Type: inv stop; or leave --fabric out"):
        site.up(fabric=True)
    assert site.undone == []


def test_a_second_up_at_the_same_time_is_refused(site):
    """The first `up` goes on. After the first has ended, `up` may be typed again."""
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
    """The error names the folder."""
    (tmp_path / "node-ray").write_text("a file where the folder should be")
    with pytest.raises(FileExistsError, match="node-ray"):
        site.up()
    assert site.did == []


@pytest.mark.parametrize(("there", "undone"), [(True, ["new down"]), (False, ["new down", "old down", "remove"])])
def test_a_server_that_could_not_start_stops_no_other_server(there, undone, site):
    """`up` takes down the nodes that it has started. It stops no server, because another run may have started one."""
    site.head = there
    site.fails("server", "a server runs here already")
    with pytest.raises(Exit, match="a server runs here already"):
        site.up()
    assert site.undone == undone and "recorder" not in site.did


def test_a_head_that_could_not_start_is_not_removed(site):
    """The head's container is gone, or another task has started it. `up` asks no worker."""
    site.fails("head", "node-ray ended with status 125")
    with pytest.raises(Exit, match="node-ray ended with status 125"):
        site.up()
    assert site.did == ["head"]


@pytest.mark.parametrize("where", ["server", "recorder", "follow"])
def test_a_terminal_that_is_lost_takes_nothing_down(where, site):
    """After the start of the server, the load goes on with its recorder. The next `up` waits for the load."""
    site.signals(where, signal.SIGHUP)
    with pytest.raises(SystemExit) as ended:
        site.up()
    assert ended.value.code == 129 and site.undone == [] and {"server", "recorder"} <= {*site.did}


@pytest.mark.parametrize("reason", [OSError(errno.EIO, "Input/output error"), Exit("Standard error is closed")])
def test_a_write_to_a_lost_terminal_takes_nothing_down(reason, site):
    """A write may fail while SIGHUP is handled. The server goes on loading all the same."""

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
    [("head", signal.SIGHUP, 129), ("prepare", signal.SIGHUP, 129), ("follow", signal.SIGTERM, 143)],
)
def test_a_signal_takes_down_what_was_started(where, number, code, site):
    """SIGHUP before the start of the server, or SIGTERM at any time, takes down what `up` has started."""
    site.signals(where, number)
    with pytest.raises(SystemExit) as ended:
        site.up()
    assert ended.value.code == code
    assert site.undone == ([] if where == "head" else ["new down", "old down", "remove"])


def test_an_ignored_sighup_stays_ignored(site):
    """`nohup inv up` goes on without its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    site.signals("follow", signal.SIGHUP)
    site.up()
    assert site.did == ALL and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_ctrl_c_waits_for_the_workers(site):
    """`up` must know which workers it has started before it takes them down. A second Ctrl-C changes nothing."""

    def pressed():
        time.sleep(0.1)  # until they are waited for
        os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 10
        while signal.getsignal(signal.SIGINT) != signal.SIG_IGN and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        heard.append(signal.getsignal(signal.SIGINT))

    heard = []
    site.steps["new up"] = pressed
    with pytest.raises(Exit, match="Ctrl-C") as ended:
        site.up()
    assert (ended.value.code, site.undone) == (130, ["new down", "old down", "remove"]) and "server" not in site.did
    assert heard == [signal.SIG_IGN]


def test_a_server_that_this_run_started_is_stopped(site):
    """If the head was up before, `up` stops the server. Otherwise the server ends with the head's container."""
    site.head = True
    site.fails("follow", "STUCK in weights")
    with pytest.raises(Exit, match="STUCK"):
        site.up()
    assert site.undone == ["new down", "stop"] and site.did.index("stop") < site.did.index("new down")


@pytest.mark.parametrize(("there", "undone"), [(True, ["new down"]), (False, ["new down", "old down", "remove"])])
def test_a_worker_that_fails_takes_down_what_this_run_started(there, undone, site):
    """With its own head `up` takes down all workers, otherwise only its own. The message names the node that failed."""
    site.head = there
    site.fails("old up", "The engine is down.")
    with pytest.raises(Exit, match=r"^old: `inv worker .*\n  The engine is down\.$"):
        site.up()
    assert site.undone == undone and "server" not in site.did


def test_all_workers_that_fail_are_named(site):
    """One message names all workers that failed, so a person can correct all of them at once."""
    site.fails("old up", "no image")
    site.fails("new up", "no docker")
    with pytest.raises(Exit, match=r"(?s)^old: .*no image.*\nnew: .*no docker"):
        site.up()
    assert site.undone == ["new down", "old down", "remove"]


@pytest.mark.parametrize("code", [remote.SSH_FAILED, 128 + signal.SIGKILL], ids=["broke", "took too long"])
def test_a_worker_that_may_be_of_another_run_is_left(code, site):
    """The head was up before and the connection broke, so nobody knows which run has started the worker."""
    site.head = True
    site.fails("new up", "Broken pipe", code)
    with pytest.raises(Exit, match="Broken pipe"):
        site.up()
    assert site.undone == []


@pytest.mark.parametrize("code", [remote.SSH_FAILED, 128 + signal.SIGKILL], ids=["broke", "took too long"])
def test_a_worker_that_may_come_up_goes_with_its_head(code, site):
    """This run has started the head, so every worker of that head is taken down with it."""
    site.fails("new up", "Broken pipe", code)
    with pytest.raises(Exit, match="Broken pipe"):
        site.up()
    assert site.undone == ["new down", "old down", "remove"]


@pytest.mark.parametrize("said", ["", ID, f"started {ID[:12]}", f"has started {ID}0"])
def test_only_a_worker_that_says_so_was_started(said, site):
    """Only the line `started ID` counts, because a login may print anything else."""
    site.head, site.workers["new"] = True, said
    site.fails("follow")
    with pytest.raises(Exit):
        site.up()
    assert site.undone == ["stop"]


@pytest.mark.parametrize("where", ["old up", "follow"])
def test_keep_leaves_everything(where, site, capsys):
    """With --keep all nodes stay up, and the message says how to take them down."""
    site.fails(where)
    with pytest.raises(Exit, match="it failed"):
        site.up(keep=True)
    assert site.undone == [] and "To take it down: inv down" in capsys.readouterr().err


def test_a_worker_that_stays_up_hides_no_reason(site, capsys):
    """The other nodes are taken down. The last message says why `up` failed."""
    site.fails("follow", "STUCK in weights")
    site.fails("new down", "No route to host", remote.SSH_FAILED)
    with pytest.raises(Exit, match="STUCK in weights"):
        site.up()
    assert site.undone == ["new down", "old down", "remove"] and "new: `inv down" in capsys.readouterr().err


def test_a_head_that_cannot_be_taken_down_hides_no_reason(site):
    """The last message says why `up` failed."""
    site.fails("follow", "STUCK in weights")
    site.fails("remove", "docker rm failed")
    with pytest.raises(Exit, match="STUCK in weights"):
        site.up()


@pytest.fixture
def standing(site):
    """A site where everything is up."""
    site.stands()
    return site


def test_down_takes_down_everything(standing, capsys):
    """`down` stops the server first, then removes all nodes at once."""
    up.take_down(standing.settings)
    assert standing.did[0] == "stop" and sorted(standing.did[1:]) == ["new down", "old down", "remove"]
    assert "node-ray was removed (running, 1 min old)." in capsys.readouterr().err


@pytest.mark.parametrize("what", ["server_runs", "stop"])
def test_a_server_that_cannot_be_stopped_keeps_no_node_up(what, standing, operator, capsys):
    """The server ends with its node. `down` prints the failure of the stop, and does not fail."""
    standing.fails("stop", "the server does not go")
    if what == "server_runs":
        operator.setattr(served, "server_runs", lambda _: standing.step("stop"))
    up.take_down(standing.settings)
    assert standing.undone == ["new down", "old down", "remove", "stop"]
    assert "the server does not go" in capsys.readouterr().err


def test_a_worker_that_is_not_reached_is_named_at_the_end(standing):
    """The other nodes are down by then. The message names the setting for a head without workers."""
    standing.fails("old down", "No route to host", remote.SSH_FAILED)
    with pytest.raises(
        Exit, match=r"(?s)^old: .*These nodes may still be up; the others are down.*WORKER_HOSTS= in .env\.$"
    ) as no:
        up.take_down(standing.settings)
    assert "new" not in no.value.message and standing.undone == ["new down", "old down", "remove", "stop"]


def test_a_worker_that_does_not_answer_in_time_is_named(standing, operator, tmp_path):
    """A host that hangs keeps neither the head nor another worker up."""
    (tmp_path / "ssh").write_text('#!/bin/sh\ncase "$*" in *" old "*) exec sleep 60 ;; esac\n')
    (tmp_path / "ssh").chmod(0o755)
    operator.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    operator.setattr(remote, "run", run)
    operator.setattr(up, "REMOVE_S", 0.03)
    with pytest.raises(Exit, match=r"(?s)^old: .*did not end within 0 s and was killed\.\n.*may still be up"):
        up.take_down(standing.settings)
    assert "remove" in standing.did


def test_down_is_refused_on_a_host_that_is_not_the_head(site, operator):
    """Only the head may take the workers down. Without a container the host's address decides."""
    operator.setattr(up, "is_own_address", lambda address: address != "10.0.0.1")
    with pytest.raises(
        Exit, match=r"This host is not the head: HEAD_NODE_IP \(default\) is 10\.0\.0\.1\. Type it there"
    ):
        up.take_down(site.settings)
    assert site.did == []
    operator.setattr(up, "is_own_address", lambda address: address == "10.0.0.1")
    up.take_down(site.settings)
    assert site.undone == ["new down", "old down"]


@pytest.mark.parametrize("status", ["running", "exited"])
def test_down_is_refused_on_a_worker(status, standing, operator):
    """`down` is refused whether the worker's container runs or not. The message names the head."""
    standing.env[1] = "VLLM_HOST_IP=10.0.0.2"
    operator.setattr(engine, "node_container", lambda: standing.container(status))
    with pytest.raises(Exit, match=r"This node is a worker .* Type the same command on the head, 10\.0\.0\.1\."):
        up.take_down(standing.settings)
    assert standing.did == []


def test_down_uses_the_head_address_of_the_container(standing, operator):
    """This shell may set another HEAD_NODE_IP than the shell that brought the nodes up."""
    asked = []

    operator.setattr(remote, "run", lambda command, **_: asked.append(command.words[-1]))
    other = load_settings(standing.settings.model, {}, SHELL | {"HEAD_NODE_IP": "10.0.0.7"})
    up.take_down(other)
    assert len(asked) == 2 and all(line.endswith("down --here --head-ip 10.0.0.1") for line in asked)


@pytest.mark.parametrize(
    "typed", [lambda site: up.take_down(site.settings), lambda _: up.take_down_here()], ids=["down", "here"]
)
def test_a_container_that_this_tool_has_not_started_stays(typed, standing):
    """Another program's container may have the same name. Only `inv cleanup` removes it, after a question."""
    standing.env = []
    with pytest.raises(Exit, match=r"was started by neither inv head nor inv worker. To see it: inv cleanup"):
        typed(standing)
    assert standing.did == []


def test_a_node_of_another_head_is_left_alone(standing, capsys):
    """`down --here --head-ip` removes only a node of that head, and names what it removed."""
    up.take_down_here("10.0.0.9")
    assert standing.did == [] and "another head, 10.0.0.1: it was left alone" in capsys.readouterr().err
    up.take_down_here("10.0.0.1")
    assert standing.did == ["remove"]
