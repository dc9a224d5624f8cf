"""The model's server: `vllm serve` in the head's container, detached, its log in a file that outlives the container."""

from collections.abc import Callable, Sequence
from pathlib import Path

from invoke import Exit

from cluster import node
from command import run, template
from command.command import Command, say
from command.template import Lines
from settings.models import ROOT
from settings.names import SECRETS
from settings.resolve import Settings

LOG = f"{node.LOGS}/serve.log"
# Below /run, unlike the log: a process id means nothing in the next container.
PID = "/run/vllm-serve.pid"
# The server's words, a line each, from its start until somebody stops it: what ended by itself can be told.
WORDS = "/run/vllm-serve.words"
RECORDER = "/run/recorder"

# `docker exec` passes no signal on and takes its output along when it dies, so the server gets a session, a log file
# and a recorded process id of its own. setsid makes the id that of the whole process group.
# The lock goes on to the server and is its own as long as it lives, so two launches at once are one.
# As long as the server lives its log is cut at 64 MiB, and what was in it kept as serve.log.1.
START = (
    f"exec 9>{PID}.lock; flock -n 9 || {{ echo a server runs here already >&2; exit 1; }}; "
    f"rm -f {node.LOGS}/vitals.json {node.LOGS}/memory-low.json; test -e {LOG} && mv {LOG} {LOG}.1; "
    f'setsid "$@" </dev/null >>{LOG} 2>&1 & p=$!; echo $p >{PID}; '
    f'printf "%s\\n" "$@" >{WORDS}; exec 9>&-; until timeout 60 tail -f --pid=$p /dev/null; do '
    f"test $(stat -c %s {LOG}) -lt {run.LOG_BYTES} || {{ cp {LOG} {LOG}.1; : >{LOG}; }}; "
    "done </dev/null >/dev/null 2>&1 &"
)
FOLLOW = f"exec tail -n +1 -F --pid=$(cat {PID}) {LOG}"
ALIVE = f"test -e {PID} && kill -0 -- -$(cat {PID})"
STATE = f"test -e {WORDS} || exit 0; {{ {ALIVE}; }} 2>/dev/null; echo $?; stat -c %Y {PID}; cat {WORDS}"
RECORD = f'setsid "$@" </dev/null >>{LOG} 2>&1 &'
# `hf download` leaves a file whole or not at all, and the commit that it resolved beside it.
FETCH = 'NO_COLOR=1 "$@" && head -qn1 "${!#}"/.cache/huggingface/download/*.metadata'
STOP = (
    f"rm -f {WORDS}; p=$(cat {PID}) && kill -TERM $p 2>/dev/null || kill -TERM -- -$p || exit; "
    "for _ in {1..30}; do kill -0 -- -$p 2>/dev/null || exit 0; sleep 1; done; "
    "echo still there after 30 s, killed >&2; kill -KILL -- -$p"
)


def url(host: str, port: str, everywhere: str = "127.0.0.1") -> str:
    """The API's address, such as http://127.0.0.1:8000; everywhere: the host where it listens on all addresses."""
    host = everywhere if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def log(settings: Settings) -> Path:
    """The server's log on the head's own disk."""
    return node.logs(settings) / Path(LOG).name


def values(settings: Settings) -> dict[str, str]:
    """What a model's templates are rendered with."""
    return settings.public() | {"hf_cache": node.HF_CACHE}


def words(settings: Settings) -> list[str]:
    """The server's own command line."""
    return template.words(template.render(settings.model.serve, **values(settings)))


def fetch(settings: Settings) -> list[Command]:
    """What has to be in the Hugging Face cache before the server starts, by the model's fetch.j2; often nothing."""
    lines = template.render(settings.model.fetch, **values(settings)) if settings.model.fetch else ()
    return [_inside(FETCH, lines, settings, ["HF_TOKEN"])] if lines else []


def start(settings: Settings) -> Command:
    """The command that starts the server and comes back at once."""
    return _inside(START, template.render(settings.model.serve, **values(settings)), settings, SECRETS)


def recorder(settings: Settings) -> Command:
    """The command that starts, beside the server, what guards the memory and records what every node does."""
    api = url(settings["HOST"], settings["PORT"])
    asked = {"pid": PID, "folder": node.LOGS, "url": api, "least": settings["MEM_ABORT_GIB"]}
    return _inside(RECORD, template.render("recorder.j2", place=RECORDER, **asked))


def recorder_there() -> Command:
    """The command that puts this repository's recorder into the head's container."""
    places = {"folder": ROOT / "recorder", "container": node.CONTAINER, "place": RECORDER}
    return Command(template.render("recorder_copy.j2", **places), "head")


def follow() -> Command:
    """The command that shows the server's log until the server ends."""
    return _inside(FOLLOW)


def stop() -> Command:
    """The command that asks the server to end, waits up to 30 s, then forces it."""
    return _inside(STOP)


def commands(settings: Settings, detached: bool = False) -> list[Command]:
    """All that `launch` runs, in order."""
    begun = [recorder_there(), start(settings), recorder(settings)]
    return [*fetch(settings), *begun, *([] if detached else [follow()])]


def prepare(settings: Settings) -> None:
    """Fetch what the server needs; raises Exit, with the ways on, if that fails."""
    for command in fetch(settings):
        _fetched(command)


def begin(settings: Settings, started: Callable[[], None] = lambda: None) -> None:
    """Start the server and its recorder, and come back at once; raises Exit if that fails.

    started: called between the two, once the server is ours to stop.
    """
    run.run_whole(recorder_there())
    with run.held():  # it must not load unguarded
        run.run_whole(start(settings))
        started()
        run.run_whole(recorder(settings))


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


def _inside(script: str, lines: Lines = (), settings: Settings | None = None, secrets: Sequence[str] = ()) -> Command:
    """A command in the head's container, through a shell, that gets these secrets of the settings by name."""
    outer = template.render("server_exec.j2", secrets=secrets, container=node.CONTAINER, script=script)
    required = settings["REQUIRED_SECRETS"].split() if settings else ()
    handed = {name: value for name, value in settings.secrets().items() if name in secrets} if settings else {}
    needs = [name for name in secrets if name in required]
    return Command(outer + lines, "head", needs=needs, secrets=handed)


# The names of the rewritten module, until it is there.
api_url, server_log, serve_values, serve_words, launch_commands = url, log, values, words, commands
start_command, recorder_command, follow_command, stop_command = start, recorder, follow, stop
