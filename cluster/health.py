"""An honest first look: Ray's nodes, the API, the GPU on the host and in the container; each part says its own."""

from collections.abc import Callable

from invoke import Exit

from cluster import guards
from cluster.node import CONTAINER
from command import run, template
from command.command import Command, say
from settings.resolve import Settings


def gpu() -> Command:
    """The command that names this host's GPU; its memory columns would say [N/A] on GB10."""
    return Command(template.render("nvidia_smi.j2", container=None), "this node")


def gpu_inside() -> Command:
    """The same in the node's container."""
    return Command(template.render("nvidia_smi.j2", container=CONTAINER), "this node")


def report(settings: Settings) -> bool:
    """Say how each part is, whatever the others are; True if all are well."""
    parts: dict[str, Callable[[], str]] = {
        "Ray": _ray,
        "API": lambda: _api(settings),
        "GPU on the host": lambda: _gpu(gpu()),
        "GPU in the container": lambda: _gpu(gpu_inside()),
    }
    well = [_part(name, ask) for name, ask in parts.items()]
    return all(well)


def _part(name: str, ask: Callable[[], str]) -> bool:
    try:
        said, well = ask(), True
    except Exit as error:
        said, well = str(error.message), False
    say(f"{'ok  ' if well else 'FAIL'}  {name}: {said}")
    return well


def _ray() -> str:
    from checks import nodes

    found = nodes.ask(guards.running_node("Type: inv head"))
    return f"{len(found)} nodes: " + ", ".join(f"{node.address} ({node.ray_gpus:.0f} GPU)" for node in found)


def _api(settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings["HOST"], settings["HOST"])
    # Imported here: it would slow every start of every task.
    import http.client
    import urllib.error
    import urllib.request

    url = f"http://{f'[{host}]' if ':' in host else host}:{settings['PORT']}/health"
    try:
        # No proxy: this is our own machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return f"{url} says {answer.status}"
    except urllib.error.HTTPError as error:
        raise Exit(f"{url} says {error.code}. Its log: {settings['CACHE_DIR']}/node-ray/serve.log") from None
    except (OSError, http.client.HTTPException) as error:
        raise Exit(f"{url} does not answer ({error}). Is a model launched? inv launch --model NAME") from None


def _gpu(command: Command) -> str:
    if not (named := run.output(command)):
        raise Exit("nvidia-smi named none. Type: nvidia-smi")
    return named
