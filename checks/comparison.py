"""The facts of several nodes side by side: who could not be asked, who told, whose differ from the head's."""

from collections.abc import Iterator, Sequence

from checks.finding import Finding
from checks.nodes import Node, Unknown
from settings.resolve import Settings


def unknown(rule: str, nodes: Sequence[Node], *facts: str) -> Iterator[Finding]:
    """A finding for each node that could not be asked for one of these facts."""
    for node in nodes:
        for fact in facts:
            if isinstance(told := node[fact], Unknown):
                yield Finding(rule, f"{node.address}: {fact} could not be asked ({told.reason}), so it may be wrong.")


def telling(nodes: Sequence[Node], *facts: str) -> list[Node]:
    """The nodes that could be asked for all of these facts."""
    return [node for node in nodes if not any(isinstance(node[fact], Unknown) for fact in facts)]


def unlike(nodes: Sequence[Node], fact: str) -> Iterator[tuple[Node, object, object]]:
    """Each node whose fact is not the head's, with the head's and its own; unknown ones are told elsewhere."""
    for node in nodes[1:]:
        here, there = nodes[0][fact], node[fact]
        if here != there and not isinstance(here, Unknown) and not isinstance(there, Unknown):
            yield node, here, there


def bring_up(settings: Settings) -> str:
    """The command that brings a node up for this model."""
    return f"inv head or inv worker{f' --model {settings.model.name}' if settings.model else ''}"
