"""The image that both nodes run: NVIDIA's vLLM with Ray put back."""

from pathlib import Path

from invoke import Exit

from command import template
from command.command import Command
from settings.names import DEFAULT_BASE_IMAGE
from settings.resolve import Settings

# The first of these also pulls the base where it is missing. A base with Ray keeps its own.
_VLLM = 'from importlib.metadata import version; print(version("vllm"))'
_RAY = 'from importlib.metadata import distributions as d; print(next((f.version for f in d(name="ray")), "{}"))'
_DIGEST = "{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}"


def build(settings: Settings) -> Command:
    """The command that builds cluster/Dockerfile; raises Exit if another base would take the usual name."""
    base = settings["BASE_IMAGE"]
    if base != DEFAULT_BASE_IMAGE and "TAG" not in settings:
        raise Exit(
            f"BASE_IMAGE ({settings.origin('BASE_IMAGE')}) is {base}: another base wants a name of its own, or it "
            f"would replace {settings['VLLM_IMAGE']}. Add --tag local/vllm-ray:NAME, and use it as VLLM_IMAGE."
        )
    asks = {
        "VLLM_VERSION": template.render("image_python.j2", image=base, script=_VLLM),
        "RAY_VERSION": template.render("image_python.j2", image=base, script=_RAY.format(settings["RAY_VERSION"])),
        "BASE_DIGEST": template.render("image_inspect.j2", image=base, format=_DIGEST),
    }
    folder = Path(__file__).resolve().parent
    tag = settings.get("TAG", settings["VLLM_IMAGE"])
    lines = template.render("docker_build.j2", BASE_IMAGE=base, by_name=list(asks), tag=tag, folder=folder)
    return Command(lines, "every node", asks=asks)
