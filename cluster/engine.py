"""This node's Docker Engine. The SDK only asks; whatever changes something is a docker command line.

Every function that asks raises Exit with what to type if the Engine cannot be reached or answers with an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from invoke import Exit

# A dry run needs no SDK, and would take 0.1 s longer with it. So each function imports it where it is used.
if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

# The name is constant, so Docker itself refuses a second node on this host.
CONTAINER = "node-ray"
# The article called its containers node- and digits. A node-exporter is somebody else's.
ARTICLE_CONTAINER = re.compile("node-[0-9]+")
REMEDIES = dict.fromkeys(("No such file or directory", "Connection refused"), "sudo systemctl start docker") | {
    "timed out": "systemctl status docker",
    "Permission denied": "sudo usermod -aG docker $USER; then log in again",
}


@contextmanager
def _or_exit(failure: str) -> Iterator[None]:
    try:
        yield
    except Exit:
        raise
    except Exception as error:  # the SDK raises its own, those of requests, ValueError, and plain Exception
        odd = isinstance(error, (AttributeError, LookupError, TypeError))  # of the SDK, for JSON of another form
        text = f"a file in ~/.docker or Docker's answer is not understood ({error!r})" if odd else str(error)
        cause = next((cause for cause in REMEDIES if cause in text), text)
        raise Exit(f"{failure}: {cause}. Type: {REMEDIES.get(cause, 'docker ps')}") from None


@cache
def client(seconds: float = 30) -> DockerClient:
    """Connect to the Engine of the docker command line: by DOCKER_HOST, or Docker's context. seconds: for an answer."""
    import docker

    host = os.environ.get("DOCKER_HOST")
    with _or_exit(f"Docker cannot be reached at {host} (DOCKER_HOST)" if host else "Docker cannot be reached"):
        return docker.from_env(timeout=seconds)


def engine_info() -> dict[str, Any]:
    with _or_exit("Docker could not describe itself"):
        return client().info()


def our_containers(seconds: float = 30) -> list[Container]:
    """The containers of this project and of the article, running or not."""
    with _or_exit("Docker could not list its containers"):
        found = client(seconds).containers.list(all=True, ignore_removed=True)
    return [one for one in found if one.name == CONTAINER or ARTICLE_CONTAINER.fullmatch(one.name)]


def node_container(seconds: float = 30) -> Container | None:
    """This node's container, running or not."""
    return next((one for one in our_containers(seconds) if one.name == CONTAINER), None)


def image_labels(name: str) -> dict[str, str] | None:
    """The labels of an image. None if Docker does not have the image."""
    from docker.errors import ImageNotFound

    with _or_exit(f"Docker could not look for {name}"):
        try:
            return client().images.get(name).labels
        except ImageNotFound:
            return None


def container_environment(container: Container) -> dict[str, str]:
    """The variables that the container started with."""
    return dict(item.partition("=")[::2] for item in container.attrs["Config"]["Env"] or ())


def container_image(container: Container) -> str:
    """The image's name as it was when the container started."""
    return container.attrs["Config"]["Image"]


def container_age(container: Container) -> str:
    created = datetime.fromisoformat(container.attrs["Created"][:19]).replace(tzinfo=UTC)
    return age_in_words((datetime.now(UTC) - created).total_seconds())


def age_in_words(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 1440} d" if minutes >= 2880 else f"{minutes // 60} h" if minutes >= 120 else f"{minutes} min"


def ask_container(container: Container, *words: str) -> str:
    """Run a command in the container and return its standard output. Raises Exit with its last lines if it fails."""
    with _or_exit(f"Docker could not run {words[0]} in {container.name}"):
        status, outputs = container.exec_run(list(words), demux=True)
    out, err = [(output or b"").decode(errors="replace") for output in outputs]
    if status != 0:
        tail = " / ".join((err + out).strip().splitlines()[-3:]) or "no output"
        raise Exit(f"{words[0]} in {container.name} failed ({status}): {tail}")
    return out
