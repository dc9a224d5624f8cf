"""Run inside the head's container, as `python3 -c SOURCE BYTES ALL_REDUCE`: one process with the source ALL_REDUCE on
every alive node, through Ray; what each said and NCCL's log of it, as JSON. Each ends within RANK_S, on its own if
nobody else can end it, and leaves no file: NCCL writes its log into a pipe."""

import json
import os
import socket
import subprocess
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

RANK_S, ANSWER_S = 40, 48
LOG_CHARS = 100_000
# Through a file's name NCCL writes each line at once: what it said before a hang is known.
LOGGED = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": "/dev/stderr"}


def rank(source: str, words: list) -> dict:
    """One rank, in a process that nothing has initialised NCCL in."""
    command = ["timeout", "--signal=KILL", str(RANK_S), sys.executable, "-c", source, *words]
    done = subprocess.run(
        command,
        env={**os.environ, **LOGGED},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    told = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))}
    return {"status": done.returncode, "told": done.stdout, "log": done.stderr[-LOG_CHARS:], "environment": told}


def free_port(address: str) -> int:
    """A port that nobody holds at the moment."""
    with socket.create_server((address, 0)) as asked:
        return asked.getsockname()[1]


def start(nodes: list, size: str, source: str) -> list:
    """A rank on each node, with its GPU if it told Ray of one: while a server holds that, it does not start."""
    here = os.environ["VLLM_HOST_IP"]
    meeting = [str(len(nodes)), here, str(free_port(here)), size]
    task = ray.remote(num_cpus=0, max_retries=0)(rank)
    return [
        task.options(
            num_gpus=min(1, node["Resources"].get("GPU", 0)),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(source, [str(number), *meeting])
        for number, node in enumerate(nodes)
    ]


def answer(asked: ray.ObjectRef) -> dict:
    """What a rank said, or why it said nothing."""
    try:
        return ray.get(asked, timeout=0.1)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked, force=True)
        return {"error": f"no answer within {ANSWER_S} s; while a server holds its GPU (inv stop) it cannot start"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}


def main(size: str, source: str) -> None:
    """Ask every node, the head first: rank 0 is where the others meet."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
    here = os.environ["VLLM_HOST_IP"]
    alive = (node for node in ray.nodes() if node["Alive"])
    nodes = sorted(alive, key=lambda node: (node["NodeManagerAddress"] != here, node["NodeManagerAddress"]))
    asked = start(nodes, size, source)
    ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    answers = [
        {"address": node["NodeManagerAddress"], "hostname": node["NodeManagerHostname"], **answer(asked[number])}
        for number, node in enumerate(nodes)
    ]
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
