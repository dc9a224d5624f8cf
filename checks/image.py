"""What the image's vLLM knows, asked once for each image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from invoke import Exit

from checks import options
from checks.options import Known
from cluster import node
from command.command import say
from host import engine
from settings.resolve import Settings

if TYPE_CHECKING:
    from docker.models.containers import Container

_BUILT_IN = "/opt/node-ray/options.json"
_SCRIPT = Path(node.__file__).with_name("ask_options.py")


def known(head: Container, settings: Settings) -> Known:
    """The options of the vLLM in the head's container; raises Exit if it cannot tell.

    Kept on this host by image id; else the file that `inv build-image` put into the image, or the image's vLLM itself.
    """
    kept = node.logs(settings) / f"options-{head.image.id.removeprefix('sha256:')[:12]}.json"
    try:
        return options.known(json.loads(kept.read_text()))
    except (OSError, ValueError):
        answer = _ask(head)
    try:
        found = options.known(json.loads(answer))
    except ValueError as error:
        raise Exit(f"The image's vLLM did not say which options it has: {error}") from None
    try:
        kept.write_text(answer)
    except OSError as error:
        say(f"Note: {kept} cannot be written ({error.strerror}): the image is asked again next time.")
    return found


def _ask(head: Container) -> str:
    try:
        return engine.ask(head, "cat", _BUILT_IN)
    except Exit:
        say("Asking the image's vLLM which options it has; half a minute, once.")
    words = ("/bin/bash", "-c", node.IN_SHELL, "bash", "timeout", "180", "python3", "-c", _SCRIPT.read_text())
    return engine.ask(head, *words).splitlines()[-1]
