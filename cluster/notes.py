"""What is said to the operator at the start of a task, about settings.

Each value of the operator's is shown with its origin. A name that a run does not use, and a file with a secret that
others can read, bring a note.
"""

import os
import shlex
from collections.abc import Iterator, Mapping

from cluster.command import SECRETS
from cluster.models import file_label, known_models, nearest, read_values
from cluster.settings import CORE, HIDDEN, SET_BY, Settings, is_operators, site_files

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
    used = {*CORE, *settings, *settings.lacking, *settings["VLLM_FORWARD_VARS"].split()}
    known = of_models | used
    for name in sorted(shell.keys() - used):
        if name in SET_BY:
            yield f"{name} is set in the shell, but every container gets it from {SET_BY[name]}: set {SET_BY[name]}."
        elif name in of_models:
            yield f"{name} is set in the shell, but this run does not use it."
        elif "_" in name and (hint := nearest(name, known, NEAR)):
            yield f"{name} is set in the shell, and nothing here knows it{hint}."
    for origin, file in site_files(settings.model, shell.get("ENV_FILE")).items():
        values = read_values(file)
        for name in sorted(values.keys() - known):
            yield f"{origin} sets {name}, which nothing knows{nearest(name, known)}."
        if any(values.get(name) for name in SECRETS) and file.stat().st_mode & 0o077:
            yield f"{file_label(file)} holds a secret and others can read it: chmod 600 {shlex.quote(str(file))}"
