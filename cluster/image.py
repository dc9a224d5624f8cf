"""The image that every node runs: NVIDIA's vLLM with Ray put back."""

from pathlib import Path

from invoke import Exit

from cluster.command import Command, render
from cluster.settings import DEFAULT_BASE_IMAGE, Settings

# The first `docker run` with one of these also pulls the base. A base that has Ray keeps its version.
VLLM_VERSION = 'from importlib.metadata import version; print(version("vllm"))'
RAY_VERSION = 'from importlib.metadata import distributions as d; print(next((f.version for f in d(name="ray")), "{}"))'
DIGEST = "{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}"


def build_command(settings: Settings) -> Command:
    """Build cluster/Dockerfile. Raises Exit if the image of another base would get the name that every node uses."""
    base = settings["BASE_IMAGE"]
    if base != DEFAULT_BASE_IMAGE and "TAG" not in settings:
        raise Exit(
            f"BASE_IMAGE ({settings.origin('BASE_IMAGE')}) is {base}, and the image made of it would replace "
            f"{settings['VLLM_IMAGE']}. Give it a name: --tag local/vllm-ray:NAME; and set VLLM_IMAGE to that name."
        )
    asks = {
        "VLLM_VERSION": render("image_python.j2", image=base, script=VLLM_VERSION),
        "RAY_VERSION": render("image_python.j2", image=base, script=RAY_VERSION.format(settings["RAY_VERSION"])),
        "BASE_DIGEST": render("image_inspect.j2", image=base, format=DIGEST),
    }
    tag, folder = settings.get("TAG", settings["VLLM_IMAGE"]), Path(__file__).resolve().parent
    lines = render("docker_build.j2", BASE_IMAGE=base, by_name=list(asks), tag=tag, folder=folder)
    return Command(lines, "every node", asks=asks)
