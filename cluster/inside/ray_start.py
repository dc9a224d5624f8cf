"""Be Ray's command line, but say in one sentence that the head refuses this node. start.sh runs this for `ray`."""

import os
import re
import shlex
import sys


def refusal(said, env):
    """Return a sentence for Ray's message, or None if that is no refusal by the head. Read from Ray 2.58 and 2.60."""
    head, own = env.get("MASTER_ADDR"), env.get("VLLM_HOST_IP")
    if "InvalidAuthToken" in said:
        what = f"a token, and this node has {'another' if env.get('RAY_AUTH_MODE') == 'token' else 'none'}"
        todo = f"inv token; then the line that it prints for {own}"
    elif "Version mismatch" in said and len(found := re.findall(r"(Ray: \S+)\s+(Python: \S+)", said)) == 2:
        theirs, ours = (" and ".join(pair).replace(":", "") for pair in found)
        what = f"{theirs}, and the image of this node has {ours}"
        todo = f"VLLM_IMAGE={shlex.quote(shlex.split(env['NODE_RAY_WRAPPER'])[-1])} inv ship-image --to {own}"
    else:
        return None
    return f"The head ({head}) has {what}. Type on the head: {todo}. Then bring this node up again."


if __name__ == "__main__":
    sys.path.pop(0)  # a script beside this one must hide no module of Ray
    from ray.scripts.scripts import main

    sys.argv = sys.argv[1:]  # Ray's help and errors then name the command `ray`
    try:
        main()
    except Exception as error:
        if (sentence := refusal(str(error), os.environ)) is None:
            raise
        print(sentence, flush=True)  # Ray's own lines may still wait in this stream: the sentence comes last
        sys.exit(1)
