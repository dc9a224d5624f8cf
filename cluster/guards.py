"""Guards: what must be true before head, worker, launch and stop act.

A guard raises Exit with the cause and with what to type. A guard that cannot find out has failed.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from invoke import Exit

from cluster import engine, image, served
from cluster.command import say
from cluster.node import CONTAINER, RAY_PORT, Network
from cluster.notes import gpu_notes
from cluster.ports import is_own_address, port_answers, port_obstacle
from cluster.settings import DEFAULT_IMAGE, ModelSettings, Settings
from cluster.token import token_file

if TYPE_CHECKING:
    from docker.models.containers import Container


# --- Before a node is brought up --------------------------------------------------------------------------------------


def before_head(settings: Settings, net: Network) -> None:
    """Refuse a head that is not at HEAD_NODE_IP, that lacks the image, or whose container name or port is taken."""
    if not is_own_address(address := settings["HEAD_NODE_IP"]):
        where = "on the head" if settings.typed[0] == "up" else "here"
        raise Exit(
            f"HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is {address}, which is no address of this host, so this "
            f"node is a worker. Type {where}: {settings.line('worker')}. If this host is to be the head: set "
            f"HEAD_NODE_IP={net.address} in .env on every node."
        )
    if net.address != address:
        source = "VLLM_HOST_IP" if "VLLM_HOST_IP" in settings else "PRIMARY_IF"
        raise Exit(f"HEAD_NODE_IP is {address}, but {source} gives {net.address}. Set one of the two in .env.")
    _check_docker(settings)
    if obstacle := port_obstacle("0.0.0.0", RAY_PORT):
        raise Exit(f"Ray cannot listen: {obstacle}. To see what is left: inv cleanup")


def before_worker(settings: Settings, net: Network) -> None:
    """Refuse a worker on the head's host, or whose image or container name is not ready. Wait for the head."""
    if is_own_address(address := settings["HEAD_NODE_IP"]):
        raise Exit(
            f"HEAD_NODE_IP ({settings.origin('HEAD_NODE_IP')}) is {address}, which is this host, and both ranks would "
            f"be on it. Type here: {settings.line('head')}; on the other node: {settings.line('worker', 'elsewhere')}"
        )
    if not is_own_address(net.address):
        raise Exit(
            f"VLLM_HOST_IP ({settings.origin('VLLM_HOST_IP')}) is {net.address}, which is no address of this host. "
            "Without this setting the node has the address of PRIMARY_IF."
        )
    _check_docker(settings)
    _wait_for_head(settings)


def _check_docker(settings: Settings) -> None:
    name, origin = settings["VLLM_IMAGE"], settings.origin("VLLM_IMAGE")
    for one in engine.our_containers():
        raise Exit(f"A {one.name} is here already ({one.status}, {engine.container_age(one)} old). Type: inv cleanup")
    if (labels := engine.image_labels(name)) is None:
        raise Exit(f"Docker has no image {name} ({origin}). Type: {image.image_line(settings, has=False)}")
    if not (ray_version := labels.get("ray.version") or image.ask_ray_version(name)):
        raise Exit(f"{name} ({origin}) has no Ray. Type: {image.image_line(settings, has=True)}")
    say(*gpu_notes(engine.engine_info()))
    if (token := token_file(settings)) is None:
        say(f"Warning: without a token Ray runs code for anyone who reaches port {RAY_PORT}. To close it: inv token")
    elif [int(number) for number in re.findall(r"\d+", ray_version)[:2]] < [2, 52]:  # by Ray's documentation
        raise Exit(
            f"There is a token ({token}), but the Ray of {name} is {ray_version}, and tokens came with 2.52. "
            f"Go on without the token: RAY_AUTH_TOKEN_PATH=/none; or use {DEFAULT_IMAGE}, which inv build-image makes."
        )


def _wait_for_head(settings: Settings) -> None:
    address, seconds = settings["HEAD_NODE_IP"], int(settings["WAIT_HEAD_S"])
    deadline = time.monotonic() + seconds
    if not port_answers(address, RAY_PORT):
        say(f"Waiting up to {seconds} s for the head at {address}:{RAY_PORT}.")
    while not port_answers(address, RAY_PORT):
        if time.monotonic() > deadline:
            raise Exit(
                f"No head answers at {address}:{RAY_PORT} after {seconds} s (WAIT_HEAD_S). If it runs, check the cable "
                f"and HEAD_NODE_IP; otherwise type there: {settings.line('head', 'elsewhere')}"
            )
        time.sleep(0.3)


# --- Before the server is started or stopped --------------------------------------------------------------------------


def before_launch(settings: ModelSettings) -> Container:
    """Return the head's container. Refuse if the head, its variables, the secrets or the ports are not ready."""
    head = the_head(settings)
    required_values(settings)
    _check_variables(settings, head)
    nothing_serves(head)
    if obstacle := port_obstacle(settings["HOST"], int(settings["PORT"])):
        raise Exit(f"The API cannot listen: {obstacle}. Set HOST, or another port: {settings.line(PORT='8001')}")
    ray_answers(settings)
    return head


def before_stop() -> None:
    if not served.server_runs(running_node("There is nothing to stop.")):
        raise Exit("No server runs in this node's container.")


def required_values(settings: ModelSettings) -> None:
    """Refuse if a secret or a variable of the containers that the model requires is unset or empty."""
    missing = [name for name in settings["REQUIRED_SECRETS"].split() if not settings.get(name)]
    if missing:
        raise Exit(f"{' and '.join(missing)} must be set for {settings.model.name}: in .env, or in the shell.")
    if settings.lacking:
        raise Exit(
            f"{' and '.join(settings.lacking)} must not be empty for {settings.model.name}: its profile lists it in "
            "VLLM_FORWARD_VARS, and a rank without it may choose other kernels. Unset it in the shell and in .env."
        )


def ray_answers(settings: Settings) -> None:
    """Refuse if Ray's port does not answer. A question to Ray itself would then wait for minutes."""
    if not port_answers(address := settings["HEAD_NODE_IP"], RAY_PORT):
        raise Exit(f"Ray does not answer at {address}:{RAY_PORT}. Read its terminal or log; then type: inv cleanup")


def nothing_serves(head: Container) -> None:
    if served.server_runs(head):
        raise Exit("A server runs in this container already. Type: inv stop")


def _check_variables(settings: ModelSettings, head: Container) -> None:
    env = engine.container_environment(head)
    wrong = [
        f"  {name}: {f'has {env[name]!r}' if name in env else 'missing'}, needs {settings[name]!r}"
        for name in settings.forward
        if env.get(name) != settings[name]
    ]
    if wrong:
        listed = "\n".join(wrong)
        raise Exit(
            f"The head's container did not start with what {settings.model.name} needs:\n{listed}\nEvery node needs a "
            f"new container. Type: inv down; then here: {settings.line('head')}; then on every other node: "
            f"{settings.line('worker', 'elsewhere')}"
        )


# --- This node's container --------------------------------------------------------------------------------------------


def running_node(next_step: str) -> Container:
    """Return the node's container if it runs. next_step: the end of the message if there is none."""
    if (found := engine.node_container()) is None:
        raise Exit(f"No {CONTAINER} runs on this node. {next_step}")
    if found.status != "running":
        raise Exit(f"{CONTAINER} is here but {found.status}. Type: inv cleanup")
    return found


def the_head(settings: Settings) -> Container:
    """Return the running container of the head. Refuse on a worker, and if no such container runs."""
    found = running_node(f"Type: {settings.line('head')}")
    is_head(found)
    if served.is_earlier(found):
        raise Exit(served.EARLIER)
    if (runs := engine.container_image(found)) != settings["VLLM_IMAGE"]:
        say(f"Warning: {CONTAINER} runs {runs}, but this model uses {settings['VLLM_IMAGE']}.")
    return found


def is_head(found: Container) -> None:
    """Refuse on a worker, with the head's address."""
    own, head = engine.container_environment(found).get("VLLM_HOST_IP"), head_of(found)
    if own != head:
        raise Exit(f"This node is a worker ({own}). Type the same command on the head, {head}.")


def head_of(found: Container) -> str:
    """Return the address of the head that this container was started for."""
    if not (head := engine.container_environment(found).get("MASTER_ADDR")):
        raise Exit(f"The {CONTAINER} here was started by neither inv head nor inv worker. To see it: inv cleanup")
    return head
