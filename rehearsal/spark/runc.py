"""Runs in place of runc: edits the container's specification for this machine, then becomes the real runc.

Arguments: the real runc; a JSON file with this engine's additions (`network`, `mounts`, `env`); the arguments of runc.
"""

import json
import os
import sys


def edit(path: str, extra: dict) -> None:
    """Drop all limits, and add network, mounts and variables.

    Raising a limit needs CAP_SYS_RESOURCE, which many sandboxes lack.
    """
    with open(path) as file:
        spec = json.load(file)
    process = spec.get("process", spec)  # for `exec` the file holds the process alone
    process.pop("rlimits", None)
    process["env"] = process.get("env", []) + extra.get("env", [])
    if "mounts" in spec:
        spec["mounts"] += extra.get("mounts", [])
    if "linux" in spec and "network" in extra:
        spaces = spec["linux"].setdefault("namespaces", [])
        known = [space for space in spaces if space["type"] == "network"]
        # BuildKit leaves the engine's network out; Docker gives its path. A network of the container's own has no path.
        if not known:
            spaces.append({"type": "network", "path": extra["network"]})
        elif "path" in known[0]:
            known[0]["path"] = extra["network"]
    with open(path, "w") as file:
        json.dump(spec, file)


real, additions, *words = sys.argv[1:]
if "--bundle" in words:
    with open(additions) as file:
        edit(os.path.join(words[words.index("--bundle") + 1], "config.json"), json.load(file))
elif "--process" in words:
    edit(words[words.index("--process") + 1], {})
os.execv(real, [real, *words])
