"""The table of contents: every task of `inv`, a few lines each.

Standard output gets command lines and the answers that were asked for, standard error everything else. A module that a
dry run does not need is imported inside its task, because every start would pay for it.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from invoke import Collection, Context, Exit, Task, task

from cluster import cleanup as leftovers
from cluster import guards, image, node, options, server
from cluster import plan as planned
from cluster import token as tokens
from cluster.command import Command, become, run, say, show, tell
from cluster.models import Model, find_model, known_models
from cluster.notes import SaidTask, operator_notes, overridden
from cluster.repository import check_repository
from cluster.settings import ModelSettings, Settings, load_settings

# Otherwise Python's garbage collector visits every imported object again: a seventh of the start-up time.
gc.freeze()
Value = str | None  # of a flag that was given, or was not

# Every argument is a flag. With positional arguments Invoke would take the next word, even --help, for a value.
verb = partial(task, klass=SaidTask, auto_shortflags=False, positional=[])

# The rehearsal's model has no task of its own, because nobody with two Sparks wants one.
LISTED = [model for model in known_models().values() if model.folder != "rehearsal"]
MODEL = "the model, by the name of its profile: " + ", ".join(model.name for model in LISTED)
START = "the model, which decides the image and the variables of the node"
DETACH = "return once Ray runs; inv logs --node shows the node's log"
LEAVE = "return at once; inv logs shows the server's log"
ALLOW = "rules to pass over, comma separated; each finding names its rule"
MAX_LEN = "the context in tokens (MAX_MODEL_LEN): 1048576, 1M, 256K (262144), 256k (256000)"
LOAD = {"model": MODEL, "max-len": MAX_LEN, "allow": ALLOW}
FABRIC = "also run an all-reduce between the nodes' GPUs, to prove the data links"
JSON = "print JSON on standard output"


# --- Each session ----------------------------------------------------------------------------------------------------


@verb(help={"model": START, "detach": DETACH})
def head(c: Context, model: Value = None, detach: bool = False) -> None:
    """Bring this node up as the head."""
    settings = _settings(model)
    net = node.find_network(settings)
    _bring_up(c, node.head_commands(settings, net, detach), lambda: guards.before_head(settings, net))


@verb(help={
    "model": START, "detach": DETACH,
    "head-ip": "the head's address on the control link (HEAD_NODE_IP)",
    "repository": "refuse unless this repository's files have this sha256, as the head's have",
})  # fmt: skip
def worker(
    c: Context, model: Value = None, head_ip: Value = None, detach: bool = False, repository: Value = None
) -> None:
    """Bring this node up as a worker."""
    check_repository(repository)
    settings = _settings(model, HEAD_NODE_IP=head_ip)
    net = node.find_network(settings)
    _bring_up(c, node.worker_commands(settings, net, detach), lambda: guards.before_worker(settings, net))


@verb(help=LOAD | {"detach": LEAVE})
def launch(c: Context, model: str, max_len: Value = None, allow: Value = None, detach: bool = False) -> None:
    """Check every node, serve a model, follow its log."""
    settings = _model_settings(model, max_len, "launch", allow=allow, detach=detach)
    if _dry(c, *server.launch_commands(settings, detach)):
        return
    from cluster import check as checks
    from cluster import load

    allowed = checks.rule_names(allow)
    found = checks.inspect(settings, guards.before_launch(settings))
    checks.tell_inspection(found, allowed)
    load.launch_model(found.settings, [one.address for one in found.nodes], detach, found.offline)


@verb(help=LOAD | {"fabric": FABRIC, "keep": "leave everything that has started, even if a later step fails"})
def up(
    c: Context, model: str, max_len: Value = None, allow: Value = None, keep: bool = False, fabric: bool = False
) -> None:
    """Bring all nodes up from the head, serve a model."""
    from cluster import check as checks
    from cluster import up as all_nodes

    settings = _model_settings(model, max_len, "up", allow=allow, keep=keep, fabric=fabric)
    net = node.find_network(settings)
    if not _dry(c, *all_nodes.up_commands(settings, net)):
        all_nodes.bring_up(settings, net, checks.rule_names(allow), keep, fabric)


@verb(help={"json": JSON})
def health(c: Context, json: bool = False) -> None:
    """Tell the cluster's state; the exit status says it."""
    from cluster import health as state

    if not _dry(c, state.gpu_command(), state.gpu_command(node.CONTAINER)):
        raise Exit(code=state.report_health(_settings(), json).code)


@verb(help={"json": JSON})
def status(c: Context, json: bool = False) -> None:
    """Tell what runs on which node, since when."""
    from cluster.status import report_status

    if not _dry(c):
        report_status(_settings(), json)


@verb(help={"node": "this node's own log instead of the server's", "follow": "go on with what comes"})
def logs(c: Context, node: bool = False, follow: bool = False) -> None:
    """Show the server's log, or this node's own."""
    command = server.log_command(_settings(), node, follow)
    if not _dry(c, command):
        server.show_log(command)


@verb()
def stop(c: Context) -> None:
    """End the server and leave Ray up."""
    if not _dry(c, server.stop_command()):
        from cluster.recorder import stop_server

        stop_server()


@verb(help={"here": "only this node", "head-ip": "only if it belongs to this head"})
def down(c: Context, here: bool = False, head_ip: Value = None) -> None:
    """End the server and take all nodes down."""
    from cluster import up as all_nodes

    settings = _settings()
    if head_ip is not None and not here:
        raise Exit("--head-ip goes with --here: inv down takes down the nodes of the head that it is typed on.")
    if here:
        if not _dry(c, node.removal_command()):
            all_nodes.take_down_here(head_ip)
    elif not _dry(c, *all_nodes.down_commands(settings)):
        all_nodes.take_down(settings)


# --- When something is wrong -----------------------------------------------------------------------------------------


@verb(help=LOAD | {"json": JSON, "fabric": FABRIC})
def check(
    c: Context, model: str, max_len: Value = None, allow: Value = None, json: bool = False, fabric: bool = False
) -> None:
    """Find what would go wrong, without loading anything."""
    from cluster import check as checks

    settings = _model_settings(model, max_len)
    if _dry(c):
        return
    allowed = checks.rule_names(allow)
    head = guards.the_head(settings)
    guards.ray_answers(settings)
    found = checks.inspect(settings, head)
    if fabric:
        guards.nothing_serves(head)
        found = checks.proved(found, head)
    if json:
        tell(checks.as_json(found))
    checks.tell_inspection(found, allowed)


@verb(help={"model": MODEL, "json": JSON, "script": "print the lines that mend, as a shell script to read"})
def doctor(c: Context, model: Value = None, json: bool = False, script: bool = False) -> None:
    """Examine every host before anything runs there."""
    from cluster import doctor as hosts

    settings = _settings(model)
    if not _dry(c, *hosts.doctor_commands(settings).values()):
        raise Exit(code=hosts.report_hosts(settings, script, json))


@verb(help={"csv": "a file to write the same to"})
def memory(c: Context, csv: Value = None) -> None:
    """Print every node's available memory until Ctrl-C."""
    from cluster import recorder

    settings = _settings()
    if not _dry(c, recorder.memory_command()):
        guards.the_head(settings)
        recorder.watch_memory(settings, csv)


@verb(help={"yes": "do not ask"})
def cleanup(c: Context, yes: bool = False) -> None:
    """Show what earlier runs left here, ask, remove it."""
    if not _dry(c, node.removal_command()):
        leftovers.clean_up(_settings(), yes)


@verb(help={"model": MODEL, "max-len": MAX_LEN})
def plan(c: Context, model: str, max_len: Value = None) -> None:
    """Print what every node would run, touching nothing."""
    from cluster import check as checks

    settings = _model_settings(model, max_len)
    checks.foretell(checks.foresee(settings))
    show(*planned.plan_commands(settings))


# --- Once ------------------------------------------------------------------------------------------------------------


@verb(name="build-image", help={"base-image": "the image that Ray is put on (BASE_IMAGE)", "tag": "its name (TAG)",
                                "ship": "then bring it to every worker, as ship-image does"})  # fmt: skip
def build_image(c: Context, base_image: Value = None, tag: Value = None, ship: bool = False) -> None:
    """Build the image that every node runs."""
    from cluster import ship as others

    settings = _settings(BASE_IMAGE=base_image, TAG=tag)
    command = image.build_command(settings)
    if not _dry(c, command, *(others.ship_commands(settings) if ship else ())):
        run(command)
        if ship:
            others.ship_image(settings)


@verb(name="ship-image", help={"model": START, "to": "ssh destinations, comma separated; without it every worker"})
def ship_image(c: Context, model: Value = None, to: Value = None) -> None:
    """Bring this node's image to every worker."""
    from cluster import ship

    settings = replace(_settings(model, WORKER_HOSTS=to), typed=("ship-image",))
    if not _dry(c, *ship.ship_commands(settings)):
        ship.ship_image(settings)


@verb(help={
    "model": MODEL, "deep": "read every byte, and compare it with the hub's sha256",
    "revision": "a branch, a tag or a commit (REVISION)",
    "here": "print what this node has as JSON, and do nothing else",
    "receive": "take files from the head, on standard input",
})  # fmt: skip
def weights(
    c: Context, model: str, revision: Value = None, deep: bool = False, here: bool = False, receive: bool = False
) -> None:
    """Fetch a model once, ship it to every node, verify it."""
    from cluster import weights as checkpoint

    settings = _model_settings(model, None, "weights", revision, deep=deep)
    folder, received = checkpoint.receive_commands(settings)
    if _dry(c, *([folder, received] if receive else [] if here else checkpoint.weights_commands(settings))):
        return
    if receive:
        run(folder)
        become(received)
    checkpoint.tell_here(settings, deep) if here else checkpoint.provide_weights(settings, deep)


@verb()
def token(c: Context) -> None:
    """Make the token that Ray then asks everyone for."""
    if not _dry(c):
        tokens.make_token(_settings())


@verb(help={"url": "the API's address, such as http://10.0.0.1:8000"})
def watch(c: Context, url: str) -> None:
    """From a third machine: run a hook when the API fails."""
    from cluster.watch import watch_api

    if not _dry(c):
        watch_api(_settings(), url)


@verb(help={
    "hosts": "how many stand-in Sparks: 1, 2 or 4",
    "keep": "leave them up",
    "down": "take down those that were left up",
    "install": "install what is missing first",
})  # fmt: skip
def rehearse(c: Context, hosts: str = "2", keep: bool = False, down: bool = False, install: bool = False) -> None:
    """Run the whole flow on stand-in Sparks, as root."""
    from rehearsal import stage

    _refuse_dry(c)
    if down:
        return stage.down()
    stage.check(hosts)
    flags = [name for name, given in (("--keep", keep), ("--install", install)) if given]
    stage.prepare(install, "rehearse", "--hosts", hosts, *flags)
    stage.rehearse(hosts, keep)


@verb(name="test", help={"fast": "only what needs neither Docker nor root", "install": "install what is missing first"})
def suite(c: Context, fast: bool = False, install: bool = False) -> None:
    """Run all tests, those on the stand-in Sparks too."""
    from rehearsal import stage

    _refuse_dry(c)
    if fast:
        stage.fast()
    stage.everything(install)


# --- Shared by the tasks ---------------------------------------------------------------------------------------------


def _dry(c: Context, *commands: Command) -> bool:
    """In a dry run, print the commands that the task would run. Return whether this is a dry run."""
    if c.config.run.dry:
        show(*commands) if commands else say("This task runs no command line: a dry run has nothing to show.")
    return bool(c.config.run.dry)


def _refuse_dry(c: Context) -> None:
    if c.config.run.dry:
        raise Exit("This task has no dry run: its commands depend on what it finds on the way.")


def _bring_up(c: Context, commands: Sequence[Command], guard: Callable[[], None]) -> None:
    if _dry(c, *commands):
        return
    if commands[-1].log is None:
        become(node.prepare_node(commands, guard))
    from cluster.detached import bring_node_up

    if started := bring_node_up(commands, guard):
        tell(f"started {started}")  # `inv up` reads this line to know which nodes it may take down


def _settings(name: Value = None, **flags: Value) -> Settings:
    settings = load_settings(find_model(name) if name is not None else None, flags)
    say(*operator_notes(settings), *settings.notes, *overridden(settings))
    return settings


def _model_settings(
    name: Value, max_len: Value, task: str = "launch", revision: Value = None, **own: Value | bool
) -> ModelSettings:
    if name is None:
        raise Exit(f"--model is missing; it takes one of {', '.join(known_models())}.")
    settings = _settings(name, MAX_MODEL_LEN=max_len, REVISION=revision)
    assert isinstance(settings, ModelSettings)
    words = [word for flag, value in own.items() if value for word in (f"--{flag}", value) if isinstance(word, str)]
    return replace(options.uncontradicted(settings), typed=(task, *words))


def _launcher(model: Model) -> Task:
    """Return the task `launch-NAME` of one model."""

    @verb(name=f"launch-{model.name.replace('.', '-')}", help={"max-len": MAX_LEN, "allow": ALLOW, "detach": LEAVE})
    def launch_model(c: Context, max_len: Value = None, allow: Value = None, detach: bool = False) -> None:
        launch(c, model.name, max_len, allow, detach)

    launch_model.__doc__ = f"The same as launch --model {model.name}."
    return launch_model


ns = Collection(
    head, worker, launch, up, health, status, logs, stop, down, check, doctor, memory, cleanup, plan, build_image,
    ship_image, weights, token, watch, rehearse, suite, *(_launcher(model) for model in LISTED),
)  # fmt: skip
