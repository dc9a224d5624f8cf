"""Sentences for the operator: at the start of a task about the settings, and at its end about a mistake.

Each value of the operator's is shown with its origin. A name that a run does not use, and a file with a secret that
others can read, bring a note. A mistake of a file, a template or this machine is a sentence, and no traceback.
"""

import os
import re
import shlex
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from invoke import Exit, Task
from jinja2.exceptions import TemplateSyntaxError

from cluster.command import SECRETS
from cluster.models import file_label, known_models, nearest, read_values
from cluster.repository import ROOT
from cluster.settings import CORE, EVERY_CONTAINER, HIDDEN, SET_BY, Settings, is_operators, site_files

# A name of the shell as near as this to a known one is a typing error. ENABLE_MPT is at 0.9, NCCL_DEBUG_FILE at 0.8.
NEAR = 0.88


def overridden(settings: Settings) -> Iterator[str]:
    """Yield one line for each setting of the operator's, with its origin and without any secret."""
    for name, setting in sorted(settings.found.items()):
        if is_operators(setting.origin):
            secret = setting.value and name in HIDDEN
            shown = "set" if secret else f"= {setting.value or setting.text or '(empty)'}"
            yield f"{name} {shown} ({setting.origin})"


def operator_notes(settings: Settings, shell: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield a sentence for each name in the shell or in a `.env` that does nothing, and for each `.env` too open."""
    of_models = frozenset[str]().union(*(model.keys for model in known_models().values()))
    listed = {*settings.lacking, *settings["VLLM_FORWARD_VARS"].split()}
    # The variables of the containers that another setting writes, each with that setting.
    written = {name: by for name, by in (SET_BY | EVERY_CONTAINER).items() if name != by and name not in listed}
    used = {*CORE, *settings, *listed} - written.keys()
    known = of_models | used
    for name in sorted(shell.keys() - used):
        if name in written:
            yield f"{name} is set in the shell, but every container gets it from {written[name]}: set {written[name]}."
        elif name in of_models:
            yield f"{name} is set in the shell, but this run does not use it."
        # Names with the same first letter: to compare each with all would be felt at every start.
        elif "_" in name and (hint := nearest(name, [one for one in known if one[0] == name[0]], NEAR)):
            yield f"{name} is set in the shell, and nothing here knows it{hint}."
    private = [Path(settings["RAY_AUTH_TOKEN_PATH"])]
    for origin, file in site_files(settings.model, shell.get("ENV_FILE")).items():
        values = read_values(file)
        private += [file] * any(values.get(name) for name in SECRETS)
        for name in sorted(values.keys() - known):
            if name in written:
                yield f"{origin} sets {name}, but every container gets it from {written[name]}: set {written[name]}."
            elif values[name]:
                yield f"{origin} sets {name}, which nothing knows{nearest(name, known)}."
            else:  # the end of a key in base64 looks like this
                line = next(number for number, line in enumerate(file.open(errors="replace"), 1) if name in line)
                yield f"{origin}, line {line}, has an unknown name without a value. Is it the rest of a secret?"
    for file in private:
        with suppress(OSError):  # whoever needs the token stops at a file that cannot be reached
            if file.is_file() and file.stat().st_mode & 0o077:
                yield f"{file_label(file)} holds a secret and others can read it: chmod 600 {shlex.quote(str(file))}"


def gpu_notes(engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning if systemd takes the GPU from running containers at a daemon-reload. engine: `docker info`.

    CDI prevents that (NVIDIA/nvidia-container-toolkit 48), and `--gpus` uses CDI from Docker 29.2 (moby 50228).
    """
    by_cdi = "nvidia.com/gpu" in str(engine.get("DiscoveredDevices"))
    version = [int(number) for number in re.findall(r"\d+", engine.get("ServerVersion", ""))]
    if engine.get("CgroupDriver") == "systemd" and not (by_cdi and version >= [29, 2]):
        yield (
            "Warning: `systemctl daemon-reload`, which unattended upgrades run too, takes the GPU from a running "
            'container. Once: set "exec-opts": ["native.cgroupdriver=cgroupfs"] in /etc/docker/daemon.json, then type: '
            "sudo systemctl restart docker; or use CDI (docs/systemd.md)."
        )


# --- A task that fails ------------------------------------------------------------------------------------------------


class SaidTask(Task):
    """A task that ends in a sentence where the mistake is not this code's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of every task
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            if sentence := in_a_sentence(error):
                raise Exit(sentence) from error
            raise


def in_a_sentence(error: Exception) -> str | None:
    """Return cause and place of an error, or the next line to type. None: the error is this code's."""
    # Jinja gives an error in a template a frame with the template's own file and line.
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, TemplateSyntaxError):
        places, error = [(error.filename or error.name or "", error.lineno)], ValueError(error.message)
    for file, line in [place for place in places if place[0].endswith(".j2")][-1:]:
        return f"{os.path.relpath(file, ROOT)}, line {line}: {error}."
    if isinstance(error, UnicodeError):
        return f"A file or the terminal is not in UTF-8: {error}. Type: unset PYTHONIOENCODING; export LC_ALL=C.UTF-8"
    if not isinstance(error, OSError):
        return None
    connection = isinstance(error, ConnectionError) or not error.errno  # the errors of requests have no number
    look = "docker ps" if connection else f"namei -l {shlex.quote(str(error.filename))}" if error.filename else "df -h"
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}. Type: {look}"
