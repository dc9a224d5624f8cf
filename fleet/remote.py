"""A task of this repository on another node, over ssh: the operator's own configuration, agent and jump hosts count."""

import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from invoke import Exit

from command import run, template
from command.command import Command
from settings import version
from settings.models import ROOT
from settings.resolve import Settings

_NOT_FOUND = (126, 127)
# What ssh itself ends with, whatever it was asked to run.
UNREACHED = 255


@dataclass(frozen=True)
class Remote:
    """A task on one worker; `host` is what ssh is given, `task` what the person would type there."""

    host: str
    task: str
    command: Command


def needed(settings: Settings) -> list[str]:
    """The workers that the model needs beside the head; raises Exit if there are fewer."""
    have, want = settings.workers(), settings.world_size() - 1
    if len(have) < want:
        named = "WORKER_HOSTS" if "WORKER_HOSTS" in settings else "WORKER_IP"
        raise Exit(
            f"{settings.model.name} needs {want} workers beside the head (TP_SIZE times PP_SIZE less one), and {named} "
            f"({settings.origin(named)}) names {len(have)}: {', '.join(have) or 'none'}. Set it in .env."
        )
    return have[:want]


def worker(settings: Settings, host: str) -> Remote:
    """Bring the worker up there, detached, with what the shell and the flags said here; no secret goes along."""
    asked = settings.public() | {"version": version.digest(), "handed_on": _handed_on(settings)}
    model = settings.model.name if settings.model else ""
    return _task(settings, host, "remote_worker.j2", model=model, **asked)


def down(settings: Settings, host: str, head_ip: str) -> Remote:
    """Remove the worker's container there, if it was started for this head."""
    return _task(settings, host, "remote_down.j2", head_ip=head_ip)


def run_there(remote: Remote, seconds: float) -> str:
    """Run it for at most so many seconds, its lines shown as they come; its standard output.

    Raises Exit with node, command and last lines.
    """
    try:
        return run.told(remote.command, remote.host, seconds)
    except Exit as error:
        raise Exit(_why(remote, error), code=error.code) from None


def _why(remote: Remote, error: Exit) -> str:
    last = "\n".join(f"  {line}" for line in error.message.splitlines()) or "  (it said nothing)"
    failed = f"{remote.host}: `{remote.task}` failed with status {error.code}. Its last lines:\n{last}"
    if error.code == UNREACHED:
        return f"{failed}\nThat is ssh's own status. Type: ssh -v {remote.host} true; WORKER_HOSTS names the workers."
    if error.code in _NOT_FOUND:
        return f"{failed}\nIs this repository there? Clone it to the same folder, or say where it is: REPO_DIR in .env."
    if "No idea what" in error.message:
        return f"{failed}\nThe repository there is another version. On {remote.host}, in it: git pull"
    return failed


def _task(settings: Settings, host: str, name: str, **values: object) -> Remote:
    inv = _inv(settings)
    words = template.words(template.render(name, inv=inv, **values))
    lines = template.render("ssh.j2", host=host, remote=shlex.join(words))
    return Remote(host, shlex.join(["inv", *words[words.index(inv) + 1 :]]), Command(lines, f"head, for {host}"))


def _inv(settings: Settings) -> str:
    """Where `inv` is there: in this checkout's folder, or in REPO_DIR; ssh starts in the home folder, so `~/` goes."""
    folder = PurePosixPath(settings.get("REPO_DIR", str(ROOT)))
    below_home = folder.relative_to("~") if folder.parts[:1] == ("~",) else folder
    return "./inv" if below_home == PurePosixPath() else str(below_home / "inv")


def _handed_on(settings: Settings) -> dict[str, str]:
    return {name: text for name, text in settings.handed_on().items() if name != "HEAD_NODE_IP"}
