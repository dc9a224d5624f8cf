"""Ray's command line in a container, behind start.sh: a refusal by the head is a sentence, any other failure is Ray's.

The messages are those of Ray 2.60 and 2.58, which tests/rehearsal/test_token.py meets on the stand-in Sparks.
"""

import os
import signal
import subprocess
import sys

import pytest

from cluster.repository import ROOT

REFUSED = (
    "Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n"
    '  File "python/ray/includes/common.pxi", line 119, in ray._raylet.check_status\n'
    "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is missing or incorrect."
)
MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.3\n"
    "This process on node 127.0.0.1 was started with:\n    Ray: 2.58.0\n    Python: 3.11.2\n"
)
AGAIN = "Then bring this node up again.\n"
HAS_A_TOKEN = "The head (10.0.0.1) has a token, and this node has {}. Type on the head: inv token; then the line that "


@pytest.fixture
def start(tmp_path):
    """Runs `start.sh ray start` with a Ray that prints its words and fails with a message. Returns all that is said."""
    (tmp_path / "python3").write_text(f'#!/bin/sh\n[ "$1" = -IS ] && exec sleep 60\nexec {sys.executable} "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "ray/scripts").mkdir(parents=True)

    def run(message: str, **env: str) -> str:
        main = f"def main():\n    print(*sys.argv)\n    raise RuntimeError({message!r})\n"
        (tmp_path / "ray/scripts/scripts.py").write_text(f"import sys\n{main}")
        env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
        env |= {"MASTER_ADDR": "10.0.0.1", "VLLM_HOST_IP": "10.0.0.2", "NODE_RAY_WRAPPER": "docker run 'local/a b:1'"}
        words = ["/bin/bash", ROOT / "cluster/inside/start.sh", "ray", "start"]
        with (tmp_path / "said").open("w+") as said:
            child = subprocess.Popen(words, env=env, stdout=said, stderr=said, process_group=0)
            assert child.wait(20) == 1
            os.killpg(child.pid, signal.SIGKILL)
            said.seek(0)
            return said.read()

    return run


@pytest.mark.parametrize(("mode", "here"), [({}, "none"), ({"RAY_AUTH_MODE": "token"}, "another")])
def test_a_token_that_the_head_refuses(mode, here, start):
    """The sentence says what this node has, and the task that prints the line which copies the head's token."""
    assert start(REFUSED, **mode) == f"ray start\n{HAS_A_TOKEN.format(here)}it prints for 10.0.0.2. {AGAIN}"


def test_a_ray_of_another_version(start):
    """The sentence has the versions of both sides, and the line that copies the head's image."""
    assert start(MISMATCH) == (
        "ray start\nThe head (10.0.0.1) has Ray 2.60.0 and Python 3.12.3, and the image of this node has Ray 2.58.0 "
        f"and Python 3.11.2. Type on the head: VLLM_IMAGE='local/a b:1' inv ship-image --to 10.0.0.2. {AGAIN}"
    )


def test_another_failure_is_rays(start):
    """Nothing of what Ray says is lost."""
    said = start("Failed to connect to GCS.")
    assert "Traceback" in said and "RuntimeError: Failed to connect to GCS.\n" in said
