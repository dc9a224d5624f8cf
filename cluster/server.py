"""The model's server: `vllm serve` in the head's container, detached, its log in a file that outlives the container."""

from collections.abc import Sequence
from pathlib import Path

from invoke import Exit

from cluster import node
from command import run, template
from command.command import Command, say
from command.template import Lines
from settings.names import SECRETS
from settings.resolve import Settings

LOG = f"{node.LOGS}/serve.log"
# Below /run, unlike the log: a process id means nothing in the next container.
PID = "/run/vllm-serve.pid"

# What each node had left at its lowest, by the memory guard.
LOW = f"{node.LOGS}/memory-low.json"
_GUARD = "/run/memory-guard.py"

# `docker exec` passes no signal on and takes its output along when it dies, so the server gets a session, a log file
# and a recorded process id of its own. setsid makes the id that of the whole process group.
# The lock goes on to the server and is its own as long as it lives, so two launches at once are one.
START = (
    f"exec 9>{PID}.lock; flock -n 9 || {{ echo a server runs here already >&2; exit 1; }}; "
    f'test -e {LOG} && mv {LOG} {LOG}.1; setsid "$@" </dev/null >{LOG} 2>&1 & echo $! >{PID}'
)
FOLLOW = f"exec tail -n +1 -F --pid=$(cat {PID}) {LOG}"
ALIVE = f"test -e {PID} && kill -0 -- -$(cat {PID})"
GUARD = f'cat >{_GUARD}; setsid "$@" </dev/null >>{LOG} 2>&1 &'
# `hf download` leaves a file whole or not at all, and the commit that it resolved beside it.
FETCH = 'NO_COLOR=1 "$@" && head -qn1 "${!#}"/.cache/huggingface/download/*.metadata'
STOP = (
    f"p=$(cat {PID}) && kill -TERM $p 2>/dev/null || kill -TERM -- -$p || exit; "
    "for _ in {1..30}; do kill -0 -- -$p 2>/dev/null || exit 0; sleep 1; done; "
    "echo still there after 30 s, killed >&2; kill -KILL -- -$p"
)


def values(settings: Settings) -> dict[str, str]:
    """What a model's templates are rendered with."""
    return settings.public() | {"hf_cache": node.HF_CACHE}


def fetch(settings: Settings) -> list[Command]:
    """What has to be in the Hugging Face cache before the server starts, by the model's fetch.j2; often nothing."""
    lines = template.render(settings.model.fetch, **values(settings)) if settings.model.fetch else ()
    return [_inside(FETCH, lines, settings, ["HF_TOKEN"])] if lines else []


def start(settings: Settings) -> Command:
    """The command that starts the server and comes back at once."""
    return _inside(START, template.render(settings.model.serve, **values(settings)), settings, SECRETS)


def guard(settings: Settings) -> list[Command]:
    """The command that starts the memory guard beside the server; nothing where MEM_ABORT_GIB is 0."""
    least = settings["MEM_ABORT_GIB"]
    if not float(least):
        return []
    lines = template.render("memory_guard.j2", script=_GUARD, pid=PID, low=LOW, least=least)
    return [_inside(GUARD, lines, stdin=Path(__file__).with_name("memory_guard.py"))]


def follow() -> Command:
    """The command that shows the server's log until the server ends."""
    return _inside(FOLLOW)


def stop() -> Command:
    """The command that asks the server to end, waits up to 30 s, then forces it."""
    return _inside(STOP)


def commands(settings: Settings) -> list[Command]:
    """All that `launch` runs, in order."""
    return [*fetch(settings), start(settings), *guard(settings), follow()]


def launch(settings: Settings) -> None:
    """Start the server and follow its log; Ctrl-C stops it, a lost terminal does not. Raises Exit when it has ended."""
    for command in fetch(settings):
        _fetched(command)
    try:
        for command in (start(settings), *guard(settings)):
            run.run_whole(command)
        with run.following(follow()) as log:
            log.wait()
    except KeyboardInterrupt:
        say("Ctrl-C: the server is asked to stop.")
        run.run_whole(stop())
        raise Exit("The server is stopped; Ray is still up.", code=130) from None
    raise Exit(f"The server has ended. Its log: docker exec {node.CONTAINER} tail -n 200 {LOG}")


def _fetched(command: Command) -> None:
    say(command.text)
    try:
        said = run.output(command, seconds=None).splitlines()
        say(f"It is here, from commit {said[-1] if said else 'unknown'}.")
    except Exit as error:
        raise Exit(
            f"The reasoning parser could not be fetched: {error.message}\nWithout it the server would not start. Mend "
            "the network or HF_TOKEN; or go on without the file, with REASONING_PARSER=nemotron_v3 (built into vLLM "
            "0.17.1 and later) or ENABLE_REASONING_PARSER=0 before the same command."
        ) from None


def _inside(
    script: str,
    lines: Lines = (),
    settings: Settings | None = None,
    secrets: Sequence[str] = (),
    stdin: Path | None = None,
) -> Command:
    """A command in the head's container, through a shell, that gets these secrets of the settings by name."""
    outer = template.render(
        "server_exec.j2", secrets=secrets, reads=stdin is not None, container=node.CONTAINER, script=script
    )
    required = settings["REQUIRED_SECRETS"].split() if settings else ()
    handed = {name: value for name, value in settings.secrets().items() if name in secrets} if settings else {}
    needs = [name for name in secrets if name in required]
    return Command(outer + lines, "head", needs=needs, secrets=handed, stdin=stdin)
