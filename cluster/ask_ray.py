"""Run inside the head's container: what Ray says of its nodes, as JSON. `ray status` is not an interface."""

import json

import ray

ray.init(address="auto", log_to_driver=False, logging_level="ERROR", configure_logging=False)
print(json.dumps([
    {
        "address": found["NodeManagerAddress"],
        "hostname": found["NodeManagerHostname"],
        "gpus": found["Resources"].get("GPU", 0),
    }
    for found in ray.nodes()
    if found["Alive"]
]))  # fmt: skip
