"""Every node of the cluster, through Ray, for the scripts beside this file; `start_gauges` of recorder.py shows how.

The class of an actor belongs to the script that is run, so Ray copies the class to the nodes. Keep the actors in a
variable until the answers are there: Ray ends an actor that nothing refers to.

Run as a script, this file prints the addresses of the alive nodes as JSON.
"""

import json

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def nodes():
    """Connect to the Ray of this container; return its alive nodes, each as Ray describes it."""
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
    return [node for node in ray.nodes() if node["Alive"]]


def pinned(node):
    """Options for an actor or a task that must run on this node and on no other."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def gather(asked, seconds):
    """Return each answer under its key; if it failed, the exception, and after so many seconds a GetTimeoutError."""
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    answers = {}
    for key, reference in asked.items():
        try:
            answers[key] = ray.get(reference, timeout=0.01)
        except Exception as error:
            answers[key] = error
    return answers


if __name__ == "__main__":
    print(json.dumps([node["NodeManagerAddress"] for node in nodes()]))
