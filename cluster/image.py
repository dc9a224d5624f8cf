"""The image that every node runs: NVIDIA's vLLM with Ray put back."""

import re
from pathlib import Path

from invoke import Exit

from cluster.command import Command, render, run
from cluster.settings import DEFAULT_BASE_IMAGE, DEFAULT_IMAGE, Settings

# The first `docker run` with one of these also pulls the base. A base that has Ray keeps its version.
VLLM_VERSION = 'from importlib.metadata import version; print(version("vllm"))'
RAY_VERSION = 'from importlib.metadata import distributions as d; print(next((f.version for f in d(name="ray")), "{}"))'
DIGEST = "{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}"


def build_command(settings: Settings) -> Command:
    """Build cluster/Dockerfile. Raises Exit if an image would get a name that says something else than its base."""
    base, tag = settings["BASE_IMAGE"], settings.get("TAG", settings["VLLM_IMAGE"])
    if "TAG" not in settings and (base, tag) != (DEFAULT_BASE_IMAGE, DEFAULT_IMAGE):
        raise Exit(
            f"BASE_IMAGE ({settings.origin('BASE_IMAGE')}) is {base}, and the image made of it would replace "
            f"{tag}. Give it a name: --tag local/vllm-ray:NAME; and set VLLM_IMAGE to that name."
        )
    asks = {
        "VLLM_VERSION": render("image_python.j2", image=base, script=VLLM_VERSION),
        "RAY_VERSION": render("image_python.j2", image=base, script=RAY_VERSION.format(settings["RAY_VERSION"])),
        "BASE_DIGEST": render("image_inspect.j2", image=base, format=DIGEST),
    }
    folder = Path(__file__).resolve().parent
    lines = render("docker_build.j2", BASE_IMAGE=base, by_name=list(asks), tag=tag, folder=folder)
    return Command(lines, "every node", asks=asks)


def image_line(settings: Settings, has: bool) -> str:
    """Return what to type if Docker lacks the image that VLLM_IMAGE names, or if Docker has it and it lacks Ray."""
    name = settings["VLLM_IMAGE"]
    if name == settings.get("TAG", DEFAULT_IMAGE):
        return "inv build-image"
    ours = name.startswith("local/")
    if not ours and not has:
        return f"docker pull {name}"
    base, tag = ("BASE", name) if ours else (name, f"local/vllm-ray:{re.split('[:/@]', name)[-1]}")
    return f"inv build-image --base-image {base} --tag {tag}; then set VLLM_IMAGE={tag}"


def ask_ray_version(name: str) -> str:
    """Return the version of the Ray in an image, or nothing if the image has no Ray."""
    return run(Command(render("image_python.j2", image=name, script=RAY_VERSION.format(""))), capture=True, seconds=60)
