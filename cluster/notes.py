"""Notes to the operator: names that a run does not use, and files with a secret that others can read."""

import os
import shlex
from collections.abc import Mapping

from cluster.command import SECRETS
from cluster.models import file_label, known_models, nearest, read_values
from cluster.settings import CORE, Settings, site_files


def operator_notes(settings: Settings, shell: Mapping[str, str] = os.environ) -> list[str]:
    """Return a sentence for each name in the shell or in a `.env` that does nothing, and for each `.env` too open."""
    files = site_files(settings.model, shell.get("ENV_FILE"))
    values = {origin: read_values(file) for origin, file in files.items()}
    of_models = frozenset[str]().union(*(model.keys for model in known_models().values()))
    used = {*CORE, *settings, *settings.lacking, *settings["VLLM_FORWARD_VARS"].split()}
    known = of_models | used
    notes = [
        f"{name} is set in the shell, but this run does not use it." for name in sorted(shell.keys() & known - used)
    ]
    for origin, file in files.items():
        strangers = sorted(values[origin].keys() - known)
        notes += [f"{origin} sets {name}, which nothing knows{nearest(name, known)}." for name in strangers]
        if any(values[origin].get(name) for name in SECRETS) and file.stat().st_mode & 0o077:
            to_type = f"chmod 600 {shlex.quote(str(file))}"
            notes.append(f"{file_label(file)} holds a secret and others can read it: {to_type}")
    return notes
