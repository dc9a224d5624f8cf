"""What every container must agree on before a model is loaded: each rule has a name, and says all that it finds."""

import shlex
from collections.abc import Callable, Iterator, Sequence

from checks.comparison import bring_up, telling, unknown, unlike
from checks.finding import Finding
from checks.link_rules import links, network, nic_lists, rdma
from checks.nodes import Node, Unknown
from settings.resolve import Settings

Rule = Callable[[Sequence[Node], Settings], Iterator[Finding]]


def findings(nodes: Sequence[Node], settings: Settings) -> list[Finding]:
    """All that all rules find, in the order of RULES."""
    return [found for rule in RULES for found in rule(nodes, settings)]


def enough(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """As many distinct addresses with a GPU as TP_SIZE times PP_SIZE."""
    have = sorted({node.address for node in nodes if node.ray_gpus >= 1})
    if len(have) < settings.world_size():
        yield Finding(
            "nodes",
            f"The model needs {settings.world_size()} nodes with a GPU (TP_SIZE times PP_SIZE); Ray has {len(have)}: "
            f"{', '.join(have) or 'none'}. On each that is missing: inv worker",
        )


def hosts(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """Every node is a machine of its own."""
    yield from unknown("hosts", nodes, "host")
    told = telling(nodes, "host")
    for number, node in enumerate(told):
        if twin := next((other for other in told[:number] if other["host"] == node["host"]), None):
            whose = "the head's own machine" if twin is nodes[0] else f"the machine of {twin.address}"
            yield Finding(
                "hosts",
                f"The worker {node.address} was started on {whose} ({twin.hostname}): both ranks would share one "
                "Spark. Ctrl-C it, then on the other Spark: inv worker",
            )


def gpus(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """One GPU in every container."""
    yield from unknown("gpus", nodes, "gpus")
    for node in nodes:
        if not isinstance(node["gpus"], Unknown) and len(node["gpus"]) != 1:
            yield Finding("gpus", f"{node.address} has {len(node['gpus'])} GPUs in its container; a Spark has one.")


def wrapper(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same `docker run`, word for word but for the host's side of the mounts."""
    yield from unknown("wrapper", nodes, "wrapper")
    for node, here, there in unlike(nodes, "wrapper"):
        mine, theirs = shlex.split(here["words"]), shlex.split(there["words"])
        only_here = [word for word in mine if word not in theirs]
        only_there = [word for word in theirs if word not in mine]
        yield Finding(
            "wrapper",
            f"The containers were started differently: {nodes[0].address} alone has {_words(only_here)}, "
            f"{node.address} alone has {_words(only_there)}. Bring both up from one version of this repository, with "
            "the same --model.",
        )


def variables(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same value of every forwarded variable, in every container, as the model's profile has it."""
    yield from unknown("variables", nodes, "environment")
    for name in settings.forward:
        values = {node.address: node.variable(name) for node in telling(nodes, "environment")}
        if set(values.values()) - {settings[name]}:
            told = ", ".join(f"{address} has {'none' if value is None else value}" for address, value in values.items())
            yield Finding(
                "variables",
                f"{name} must be {settings[name]} in every container when it starts: {told}. Ray's processes on a "
                f"worker get it no other way. Ctrl-C where it differs, then there: {bring_up(settings)}",
            )


def image(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same image, or at least one built from the same base."""
    yield from unknown("image", nodes, "image")
    for node, here, there in unlike(nodes, "image"):
        (my_id, _, my_base), (their_id, _, their_base) = here.partition(" "), there.partition(" ")
        if my_id != their_id:
            known = my_base == their_base and my_base
            yield Finding(
                "image",
                f"The images differ: {nodes[0].address} runs {my_id[:19]}, {node.address} runs {their_id[:19]}, built "
                f"from {'the same base' if known else 'different bases'}. From this node: docker save "
                f"{shlex.quote(settings['VLLM_IMAGE'])} | ssh {node.address} docker load",
                refuses=not known,
            )


def versions(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same vLLM, Ray, Python and torch."""
    for package in ("vllm", "ray", "python", "torch"):
        yield from unknown("versions", nodes, package)
        for node, here, there in unlike(nodes, package):
            yield Finding(
                "versions",
                f"{package} is {here} on {nodes[0].address} and {there} on {node.address}. Give both one image: "
                f"docker save {shlex.quote(settings['VLLM_IMAGE'])} | ssh {node.address} docker load",
            )


def token(nodes: Sequence[Node], settings: Settings) -> Iterator[Finding]:
    """The same Ray token everywhere."""
    yield from unknown("token", nodes, "token")
    for node, here, there in unlike(nodes, "token"):
        who = f"{nodes[0].address} has {'one' if here else 'none'}, {node.address} {'another' if there else 'none'}"
        yield Finding("token", f"Ray's token differs: {who}. Copy the file at RAY_AUTH_TOKEN_PATH, and bring both up.")


RULES: tuple[Rule, ...] = (
    enough, hosts, gpus, wrapper, variables, image, versions, rdma, nic_lists, token, network, links,
)  # fmt: skip


def _words(words: list[str]) -> str:
    return shlex.join(words) or "nothing"
