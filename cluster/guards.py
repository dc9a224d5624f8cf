"""What must be true before head, worker and launch act; each guard raises Exit with the cause and what to type."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from invoke import Exit

from cluster import server, token
from cluster.node import CONTAINER, RAY_PORT, Network
from command.command import say
from host import engine, ports
from settings.resolve import Settings

if TYPE_CHECKING:
    from docker.models.containers import Container


def before_head(settings: Settings, net: Network) -> None:
    """Refuse a head that is not at HEAD_NODE_IP, or whose Docker, image, name or port is not ready."""
    address = settings["HEAD_NODE_IP"]
    if not ports.is_mine(address):
        raise Exit(
            f"HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is {address}, which is no address of this host. "
            f"On the other node type: inv worker{_model(settings)}; or set HEAD_NODE_IP in .env on every node."
        )
    if net.address != address:
        raise Exit(
            f"HEAD_NODE_IP is {address}, but this node would call itself {net.address} "
            f"({'VLLM_HOST_IP' if 'VLLM_HOST_IP' in settings else settings['PRIMARY_IF']}). Set one of them in .env."
        )
    _engine_is_ready(settings)
    if obstacle := ports.obstacle("0.0.0.0", RAY_PORT):
        raise Exit(f"Ray cannot listen: {obstacle}. To see what is left: inv cleanup")


def before_worker(settings: Settings, net: Network) -> None:
    """Refuse a worker on the head's own host, or whose Docker, image or name is not ready; then wait for the head."""
    address = settings["HEAD_NODE_IP"]
    if ports.is_mine(address):
        raise Exit(
            f"HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is {address}, which is this host: a worker here would "
            f"put both ranks on one Spark. Type inv head{_model(settings)} here, and inv worker on the other node."
        )
    if not ports.is_mine(net.address):
        raise Exit(
            f"VLLM_HOST_IP ({settings.origin('VLLM_HOST_IP')}) is {net.address}, which is no address of this host. "
            "Unset it, and the address of PRIMARY_IF is taken."
        )
    _engine_is_ready(settings)
    _wait_for_head(address, int(settings["WAIT_HEAD_S"]))


def before_launch(settings: Settings) -> Container:
    """Refuse to load a model where the head, its variables or its ports are not what it needs; the head's container."""
    head = the_head(settings)
    secrets(settings)
    _forwarded(settings, head)
    nothing_serves(head)
    if obstacle := ports.obstacle(settings["HOST"], int(settings["PORT"])):
        raise Exit(f"The API cannot listen: {obstacle}. Set HOST, or another port: PORT=8001 inv launch ...")
    ray_answers(settings)
    return head


def secrets(settings: Settings) -> None:
    """Refuse where a secret that the model requires is unset or empty."""
    missing = [name for name in settings["REQUIRED_SECRETS"].split() if not settings.get(name)]
    if missing:
        raise Exit(f"{' and '.join(missing)} must be set for {settings.model.name}: in .env, or in the shell.")


def ray_answers(settings: Settings) -> None:
    """Refuse where Ray's port does not answer: whoever asks Ray itself would wait for minutes."""
    address = settings["HEAD_NODE_IP"]
    if not ports.answers(address, RAY_PORT):
        raise Exit(f"Ray does not answer at {address}:{RAY_PORT}. Look at the terminal of inv head; then: inv cleanup")


def before_stop() -> None:
    """Refuse to stop what does not run."""
    if not is_serving(running_node("There is nothing to stop.")):
        raise Exit("No server runs in this node's container.")


def nothing_serves(head: Container) -> None:
    """Refuse where a server has the GPUs."""
    if is_serving(head):
        raise Exit("A server runs in this container already. Type: inv stop")


def is_serving(head: Container) -> bool:
    """Whether the server that `launch` recorded in this container still runs."""
    return engine.succeeds(head, "/bin/bash", "-c", server.ALIVE)


def running_node(what_next: str) -> Container:
    """The node's container, running; raises Exit with what to do if there is none."""
    found = engine.node()
    if found is None:
        raise Exit(f"No {CONTAINER} runs on this node. {what_next}")
    if found.status != "running":
        raise Exit(f"{CONTAINER} is here but {found.status}. Type: inv cleanup; then {what_next}")
    return found


def the_head(settings: Settings) -> Container:
    """The node's container, if it is the head's; raises Exit with where to go."""
    found = running_node(f"Type: inv head{_model(settings)}")
    is_head(found)
    if engine.image(found) != settings["VLLM_IMAGE"]:
        say(f"Warning: {CONTAINER} runs {engine.image(found)}, not {settings['VLLM_IMAGE']} as this model would.")
    return found


def is_head(found: Container) -> None:
    """Refuse on a worker, with where to go."""
    own, head = engine.environment(found).get("VLLM_HOST_IP"), head_of(found)
    if own != head:
        raise Exit(f"This node is a worker ({own}). Type it on the head, {head}.")


def head_of(found: Container) -> str:
    """The address of the head that this container was started for; raises Exit for a container of somebody else's."""
    if not (head := engine.environment(found).get("MASTER_ADDR")):
        raise Exit(f"The {CONTAINER} here was started by neither inv head nor inv worker. To look at it: inv cleanup")
    return head


def _forwarded(settings: Settings, head: Container) -> None:
    env = engine.environment(head)
    wrong = [
        f"  {name}: {f'has {env[name]!r}' if name in env else 'missing'}, needs {settings[name]!r}"
        for name in settings.forward
        if env.get(name) != settings[name]
    ]
    if wrong:
        raise Exit(
            f"The head's container did not start with what {settings.model.name} needs:\n"
            + "\n".join(wrong)
            + "\nThese must be there when the containers start, on every node: `docker exec` cannot give them to the "
            "processes that Ray starts on a worker.\nEnd inv head and inv worker (Ctrl-C, or inv down), then type:\n"
            f"  inv head{_model(settings)}     # here\n  inv worker{_model(settings)}   # on every other node"
        )


def _engine_is_ready(settings: Settings) -> None:
    left = engine.node()
    if left is not None:
        raise Exit(f"A {CONTAINER} is here already ({left.status}, {engine.age(left)} old). Type: inv cleanup")
    if not engine.has_image(settings["VLLM_IMAGE"]):
        raise Exit(
            f"Docker has no image {settings['VLLM_IMAGE']} ({settings.origin('VLLM_IMAGE')}). Type: inv build-image"
        )
    _ray_knows_tokens(settings)


def _ray_knows_tokens(settings: Settings) -> None:
    if not (path := token.token_file(settings)):
        return say(
            f"Warning: without a token Ray runs code for anyone who reaches port {RAY_PORT} of this node, on every "
            "interface. To close it: inv token"
        )
    ray = engine.labels(settings["VLLM_IMAGE"]).get("ray.version", "unknown")
    if token.knows_no_tokens(ray):
        raise Exit(
            f"There is a token ({path}), but the Ray of {settings['VLLM_IMAGE']} is {ray}, and tokens came with 2.52. "
            "Type: inv build-image; or serve without one: RAY_AUTH_TOKEN_PATH=/none"
        )


def _wait_for_head(address: str, seconds: int) -> None:
    deadline, said = time.monotonic() + seconds, 0.0
    while not ports.answers(address, RAY_PORT):
        left = deadline - time.monotonic()
        if left <= 0:
            raise Exit(
                f"No head answers at {address}:{RAY_PORT} after {seconds} s (WAIT_HEAD_S). Type inv head there; if it "
                "runs, check the cable and HEAD_NODE_IP."
            )
        if time.monotonic() - said >= 5:
            said = time.monotonic()
            say(f"Waiting for the head at {address}:{RAY_PORT}, {left:.0f} s more.")
        time.sleep(min(0.3, left))


def _model(settings: Settings) -> str:
    return f" --model {settings.model.name}" if settings.model else ""


# The names of the rewritten module, until it is there.
required_secrets = secrets
