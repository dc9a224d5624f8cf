"""`inv doctor`: what this host and every worker lack before a model can be served, and the lines that mend it.

One command for each host brings its facts: `python3 -` reads inside/doctor.py from standard input. So a worker needs
ssh and Python, and nothing of this repository. Nothing is changed.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from invoke import Exit

from cluster.command import Command, render, run, words_of
from cluster.remote import ssh_command
from cluster.repository import ROOT
from cluster.settings import Settings, load_settings

HERE = "this host"
SECONDS = 60
# The settings that decide what is asked on a host.
NAMES = ("PRIMARY_IF", "HEAD_NODE_IP", "VLLM_HOST_IP", "RDMA_HCAS", "SYSFS", "VLLM_IMAGE", "BASE_IMAGE", "CACHE_DIR",
         "HF_CACHE", "RAY_AUTH_TOKEN_PATH", "HOST", "PORT", "MODEL_CKPT", "REVISION")  # fmt: skip
# The modules that are sent, each before those that import it.
SENT = ("inside/probe", "inside/weights", "repository", "inside/doctor")
LOADER = """import sys, types
for name, text in {texts!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = "/"
    exec(compile(text, name, "exec"), vars(module))
sys.modules["doctor"].main()
"""


# --- The facts of each host -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """The facts of one host by name. `error` says why the host did not answer; then there are no facts."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def doctor_commands(settings: Settings, names: Sequence[str] = ()) -> dict[str, Command]:
    """Return by host the command that prints the host's facts, the head first. names: the facts, all if none is given.

    A worker reads its own `.env`, if the checkout is there. The head hands on what its shell and its flags set.
    """
    plain = load_settings(settings.model, {}, {"ENV_FILE": ""})
    default = {name: plain.found[name].text if name in plain else None for name in NAMES}
    handed_on = settings.handed_on() | {"HEAD_NODE_IP": settings["HEAD_NODE_IP"]}
    key, commands = secrets.token_hex(16), {}
    for host in (HERE, *settings.workers()):
        given = settings if host == HERE else handed_on
        folder = str(ROOT) if host == HERE else settings.get("REPO_DIR", str(ROOT))
        asked = {"given": {name: given[name] for name in NAMES if name in given}, "defaults": default,
                 "folder": folder, "key": key, "names": list(names)}  # fmt: skip
        words = words_of(render("doctor.j2", asked=json.dumps(asked)))
        there = ssh_command(settings, host, words, reads=True) if host != HERE else Command((tuple(words),))
        sent = ", ".join(f"{module}.py" for module in SENT)
        where = f"{host}; standard input: {sent} of cluster/, as one text"
        commands[host] = replace(there, where=where, alias=f"{host}: `python3 -`")
    return commands


def ask_hosts(settings: Settings, *names: str) -> list[Told]:
    """Ask all hosts at once, and return what each has told, the head first. names: the facts, all if none is given."""
    files = [ROOT / f"cluster/{module}.py" for module in SENT]
    texts = {file.stem: file.read_text() for file in files if file.exists()}
    file = os.memfd_create("doctor")  # a full disk does not stop it
    os.write(file, LOADER.format(texts=texts).encode())
    commands, told = doctor_commands(settings, names), {}

    def ask(host: str, command: Command) -> None:
        try:
            fed = replace(command, feeds=Path(f"/proc/self/fd/{file}"))
            told[host] = Told(host, json.loads(run(fed, capture=True, seconds=SECONDS)))
        except (Exit, ValueError) as error:
            told[host] = Told(host, error=str(getattr(error, "message", f"{host} has answered no JSON: {error}")))

    # Ctrl-C ends the process at once: the threads change nothing, and nobody waits for them.
    asking = [threading.Thread(target=ask, args=one, daemon=True) for one in commands.items()]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    os.close(file)
    return [told[host] for host in commands]
