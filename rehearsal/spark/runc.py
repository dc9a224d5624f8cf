"""Stands in front of runc: takes out of a container's specification what this machine cannot give, then becomes runc.

Words: the real runc, a JSON file with what this engine adds (`network`, `mounts`, `env`), then runc's own words.
"""

import json
import os
import sys


def edit(path: str, extra: dict) -> None:
    """Drop the limits (raising one takes CAP_SYS_RESOURCE, which sandboxes lack) and add mounts and variables."""
    with open(path) as file:
        spec = json.load(file)
    process = spec.get("process", spec)  # `exec` gets the process alone
    process.pop("rlimits", None)
    process["env"] = process.get("env", []) + extra.get("env", [])
    if "mounts" in spec:
        spec["mounts"] += extra.get("mounts", [])
    if "linux" in spec and "network" in extra:
        spaces = spec["linux"].setdefault("namespaces", [])
        known = [space for space in spaces if space["type"] == "network"]
        if not known:  # BuildKit leaves the engine's network out, Docker names it. A network of its own has no path.
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
