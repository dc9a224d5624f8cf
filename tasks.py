"""The table of contents: what `inv` can do on each node. What a task says goes to standard error; command lines
alone go to standard output. What no dry run needs is imported where it is used."""

from collections.abc import Callable
from functools import partial

from invoke import Collection, Context, Exit, Task, task

from cluster import cleanup as leftovers
from cluster import guards, image, node, server
from cluster import plan as planned
from cluster import token as tokens
from command import run
from command.command import Command, say, show, tell
from settings import models, resolve, version
from settings.resolve import Settings

# None of their values has a place: Invoke would take what follows the task, even --help, for the first of them.
verb = partial(task, auto_shortflags=False, positional=[])

MODEL = "the model, by the name of its profile: " + ", ".join(models.known())
START = "a model whose variables are forwarded and whose image is used"
DETACH = "come back once Ray runs; inv logs --node has its log"
LEAVE = "come back at once; inv logs has the log"
ALLOW = "rules to pass over, comma separated; each finding names its own"
MAX_LEN = "the context in tokens (MAX_MODEL_LEN): 1048576, 1M, 256K (262144), 256k (256000)"


@verb(name="build-image", help={"base-image": "what Ray is put on (BASE_IMAGE)", "tag": "the new image's name (TAG)"})
def build_image(c: Context, base_image: str | None = None, tag: str | None = None) -> None:
    """Build the image that every node runs."""
    _each(c, [image.build_command(_settings(None, BASE_IMAGE=base_image, TAG=tag))])


@verb(help={"model": START, "detach": DETACH})
def head(c: Context, model: str | None = None, detach: bool = False) -> None:
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
    c: Context,
    model: str | None = None,
    head_ip: str | None = None,
    detach: bool = False,
    repository: str | None = None,
) -> None:
    """Bring this node up as a worker."""
    version.check(repository)
    settings = _settings(model, HEAD_NODE_IP=head_ip)
    net = node.find_network(settings)
    _bring_up(c, node.worker_commands(settings, net, detach), lambda: guards.before_worker(settings, net))


@verb(help={"model": MODEL, "max-len": MAX_LEN, "allow": ALLOW, "detach": LEAVE})
def launch(c: Context, model: str, max_len: str | None = None, allow: str | None = None, detach: bool = False) -> None:
    """Check every node, serve a model, follow its log."""
    settings = _settings(_given(model), MAX_MODEL_LEN=max_len)
    if c.config.run.dry:
        return show(*server.launch_commands(settings, detach))
    from checks import inspection, report
    from cluster import load

    allowed = report.rule_names(allow)
    found = inspection.inspect(settings, guards.before_launch(settings))
    report.tell(found, allowed)
    load.launch_model(found.settings, [one.address for one in found.nodes], detach)


@verb(help={
    "model": MODEL, "max-len": MAX_LEN, "allow": ALLOW,
    "keep": "leave what has started as it is, even if a later step fails",
    "fabric": "prove the data plane too, by an all-reduce between the nodes' GPUs",
})  # fmt: skip
def up(
    c: Context,
    model: str,
    max_len: str | None = None,
    allow: str | None = None,
    keep: bool = False,
    fabric: bool = False,
) -> None:
    """Bring all nodes up from the head, serve a model."""
    from fleet import up as fleet

    settings = _settings(_given(model), MAX_MODEL_LEN=max_len)
    net = node.find_network(settings)
    if c.config.run.dry:
        return show(*fleet.commands(settings, net))
    from checks import report

    fleet.up(settings, net, report.rule_names(allow), keep, fabric)


@verb(help={"here": "only this node", "head-ip": "only if it is of this head"})
def down(c: Context, here: bool = False, head_ip: str | None = None) -> None:
    """End the server and take all nodes down."""
    from fleet import down as fleet

    settings = _settings(None)
    if head_ip is not None and not here:
        raise Exit("--head-ip goes with --here: inv down takes down the nodes of the head that it is typed on.")
    if c.config.run.dry:
        return show(*([node.removal_command()] if here else fleet.commands(settings)))
    if here:
        fleet.here(head_ip)
    else:
        fleet.down(settings)


@verb(help={"json": "for a machine, on standard output"})
def status(c: Context, json: bool = False) -> None:
    """Tell what runs on which node, since when."""
    settings = _settings(None)
    if c.config.run.dry:
        return
    from fleet import status as fleet

    fleet.report(settings, json)


@verb(help={"node": "the node's own log, not its server's", "follow": "go on with what comes"})
def logs(c: Context, node: bool = False, follow: bool = False) -> None:
    """Show the server's log, or this node's own."""
    shown = server.log_command(_settings(None), node, follow)
    if c.config.run.dry:
        return show(shown)
    server.show_log(shown)


@verb(help={"url": "where the API is, such as http://10.0.0.1:8000"})
def watch(c: Context, url: str) -> None:
    """From a third machine: run a hook when it fails."""
    settings = _settings(None)
    if c.config.run.dry:
        return
    from vitals import watch as watching

    watching.watch(settings, url)


@verb(help={
    "model": MODEL, "max-len": MAX_LEN, "allow": ALLOW,
    "json": "for a machine, on standard output",
    "fabric": "prove the data plane too, by an all-reduce between the nodes' GPUs",
})  # fmt: skip
def check(
    c: Context,
    model: str,
    max_len: str | None = None,
    allow: str | None = None,
    json: bool = False,
    fabric: bool = False,
) -> None:
    """Find what would go wrong, without loading anything."""
    settings = _settings(_given(model), MAX_MODEL_LEN=max_len)
    if c.config.run.dry:
        return
    from checks import inspection, report

    allowed = report.rule_names(allow)
    head = guards.the_head(settings)
    guards.ray_answers(settings)
    found = inspection.inspect(settings, head)
    if fabric:
        guards.nothing_serves(head)
        found = inspection.proved(found, head)
    if json:
        tell(report.as_json(found))
    report.tell(found, allowed)


@verb(help={"csv": "a file to write the same to"})
def memory(c: Context, csv: str | None = None) -> None:
    """Print every node's available memory until Ctrl-C."""
    from cluster import recorder

    settings = _settings(None)
    if c.config.run.dry:
        return show(recorder.memory_command())
    guards.the_head(settings)
    recorder.watch_memory(settings, csv)


@verb()
def token(c: Context) -> None:
    """Make the token that Ray then asks everyone for."""
    if not c.config.run.dry:
        tokens.make_token(_settings(None))


@verb()
def stop(c: Context) -> None:
    """End the server and leave Ray up."""
    if not c.config.run.dry:
        guards.before_stop()
    _each(c, [server.stop_command()])


@verb(help={"json": "for a machine, on standard output"})
def health(c: Context, json: bool = False) -> None:
    """Tell how the cluster is; the exit status says it."""
    from vitals import health as looks

    if c.config.run.dry:
        return show(looks.gpu(), looks.gpu_inside())
    raise Exit(code=looks.report(_settings(None), json).code)


@verb(help={"yes": "do not ask"})
def cleanup(c: Context, yes: bool = False) -> None:
    """Show what earlier runs left here, ask, remove it."""
    if c.config.run.dry:
        return show(node.removal_command())
    leftovers.clean_up(_settings(None), yes)


@verb(help={"model": MODEL, "max-len": MAX_LEN})
def plan(c: Context, model: str, max_len: str | None = None) -> None:
    """Print what every node would run, touching nothing."""
    settings = _settings(_given(model), MAX_MODEL_LEN=max_len)
    from checks import inspection, report

    report.foretell(inspection.foresee(settings))
    show(*planned.plan_commands(settings))


@verb(help={
    "hosts": "how many stand-in Sparks: 1, 2 or 4",
    "keep": "leave them up",
    "down": "take down those that were left up",
    "install": "install what is missing first",
})  # fmt: skip
def rehearse(c: Context, hosts: str = "2", keep: bool = False, down: bool = False, install: bool = False) -> None:
    """Run the whole flow on stand-in Sparks, as root."""
    from rehearsal import stage

    _no_dry(c, "rehearse")
    flags = [name for name, given in (("--keep", keep), ("--install", install)) if given]
    if down:
        return stage.down()
    stage.check(hosts)
    stage.prepare(install, "rehearse", "--hosts", hosts, *flags)
    stage.rehearse(hosts, keep)


@verb(name="test", help={"fast": "only what needs neither Docker nor root", "install": "install what is missing first"})
def suite(c: Context, fast: bool = False, install: bool = False) -> None:
    """Run all tests, those on the stand-in Sparks too."""
    from rehearsal import suite as tests

    _no_dry(c, "test")
    if fast:
        tests.fast()
    tests.everything(install)


def _no_dry(c: Context, name: str) -> None:
    if c.config.run.dry:
        raise Exit(f"inv {name} has no dry run: what it would do depends on what it finds on the way.")


def _given(model: str | None) -> str:
    if model is None:
        raise Exit(f"--model is missing; it takes one of {', '.join(models.known())}.")
    return model


def _settings(model: str | None, **flags: str | None) -> Settings:
    settings = resolve.load(models.find(model) if model is not None else None, flags)
    say(*settings.notes, *settings.overridden())
    return settings


def _each(c: Context, commands: list[Command]) -> None:
    if c.config.run.dry:
        return show(*commands)
    for command in commands:
        run.run(command)


def _bring_up(c: Context, commands: list[Command], guard: Callable[[], None]) -> None:
    if c.config.run.dry:
        return show(*commands)
    if started := node.bring_node_up(commands, guard):
        tell(f"started {started}")


def _launcher(model: models.Model) -> Task:
    """`launch-NAME`, for the model called NAME."""

    @verb(name=f"launch-{model.name.replace('.', '-')}", help={"max-len": MAX_LEN, "allow": ALLOW, "detach": LEAVE})
    def launch_model(c: Context, max_len: str | None = None, allow: str | None = None, detach: bool = False) -> None:
        launch(c, model.name, max_len, allow, detach)

    launch_model.__doc__ = f"The same as launch --model {model.name}."
    return launch_model


ns = Collection(
    build_image, head, worker, launch, up, down, status, logs, check, memory, token, stop, health, watch, cleanup, plan,
    rehearse, suite,
)  # fmt: skip
for each in models.known().values():
    if each.folder != "rehearsal":  # on a Spark nobody wants to launch that one; --model rehearsal does
        ns.add_task(_launcher(each))
