"""This node's Docker Engine, asked and never told to do anything: the command line does that."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING

from invoke import Exit

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

NODE = "node-ray"
# The article's containers were called node- and digits; node-exporter is somebody else's.
_OURS = re.compile(r"node-(ray|[0-9]+)")


@cache
def client() -> DockerClient:
    """The Engine that the docker command line would use; raises Exit with what to type if it cannot be reached."""
    # Imported where it is used: it would take every start to 1.75 times what Invoke itself needs.
    import docker
    from docker.context import ContextAPI

    if host := os.environ.get("DOCKER_HOST"):
        return _reached(host, lambda: docker.from_env(timeout=30))
    name = os.environ.get("DOCKER_CONTEXT")
    context = ContextAPI.get_context(name) if name else ContextAPI.get_current_context()
    if context is None:
        raise Exit(f"Docker has no context {name or 'of the name that its config.json says'}. Type: docker context ls")
    return _reached(context.Host, lambda: docker.DockerClient(context.Host, tls=context.TLSConfig or False, timeout=30))


@contextmanager
def _asked(what: str) -> Iterator[None]:
    """Raise Exit, with what to type, where the Engine does not answer as it should."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except (DockerException, RequestException) as error:
        raise Exit(f"Docker could not {what}: {error}. Type: docker ps") from None


def _reached(host: str, connect: Callable[[], DockerClient]) -> DockerClient:
    from docker.errors import DockerException

    try:
        found = connect()
        found.ping()
    except (DockerException, ValueError) as error:  # such as a port that is none
        raise Exit(f"Docker cannot be reached at {host}: {_cause(error)}. {_remedy(str(error))}") from None
    return found


def ours() -> list[Container]:
    """Every container of this project or the article, running or not."""
    with _asked("list its containers"):
        found = client().containers.list(all=True, ignore_removed=True)
    return [container for container in found if _OURS.fullmatch(container.name)]


def node() -> Container | None:
    """The container called node-ray, running or not, or None."""
    return next((container for container in ours() if container.name == NODE), None)


def has_image(name: str) -> bool:
    """Whether this Engine has the image called name."""
    from docker.errors import ImageNotFound

    with _asked(f"say whether it has {name}"):
        try:
            client().images.get(name)
        except ImageNotFound:
            return False
    return True


def labels(name: str) -> dict[str, str]:
    """The labels of the image called name."""
    with _asked(f"tell the labels of {name}"):
        return client().images.get(name).labels


def environment(container: Container) -> dict[str, str]:
    """What the container started with, by name."""
    return dict(item.partition("=")[::2] for item in container.attrs["Config"]["Env"] or ())


def image(container: Container) -> str:
    """The image that the container was started from, as it was called then."""
    return container.attrs["Config"]["Image"]


def age(container: Container) -> str:
    """How long ago the container was made, for a person."""
    made = datetime.fromisoformat(container.attrs["Created"][:19]).replace(tzinfo=UTC)
    minutes = int((datetime.now(UTC) - made).total_seconds() // 60)
    return f"{minutes // 1440} d" if minutes >= 2880 else f"{minutes // 60} h" if minutes >= 120 else f"{minutes} min"


def ask(container: Container, *words: str) -> str:
    """The standard output of a command in the container; raises Exit with its last lines if it fails."""
    status, (out, err) = _exec(container, words)
    if status != 0:
        tail = ((err or b"") + (out or b"")).decode(errors="replace").strip().splitlines()[-3:]
        raise Exit(f"{words[0]} in {container.name} failed ({status}): {' / '.join(tail) or 'it said nothing'}")
    return (out or b"").decode(errors="replace")


def succeeds(container: Container, *words: str) -> bool:
    """Whether a command in the container ends well; raises Exit if it could not be asked."""
    return _exec(container, words)[0] == 0


def _exec(container: Container, words: Sequence[str]) -> tuple[int, tuple[bytes | None, bytes | None]]:
    with _asked(f"ask {container.name}"):
        return container.exec_run(list(words), demux=True)


def _cause(error: Exception) -> str:
    known = ("Permission denied", "No such file or directory", "Connection refused", "timed out")
    return next((cause for cause in known if cause in str(error)), str(error))


def _remedy(message: str) -> str:
    if "Permission" in message:
        return "Type: sudo usermod -aG docker $USER; then log in again."
    named = [name for name in ("DOCKER_HOST", "DOCKER_CONTEXT") if os.environ.get(name)]
    return f"Type: sudo systemctl start docker{f', or: unset {named[0]}' if named else ''}"
