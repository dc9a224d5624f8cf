"""`inv rehearse` as a user types it."""

import os
import re
import subprocess
import sys

import pytest

from rehearsal import needs, sandbox
from rehearsal.hosts import INV

pytestmark = pytest.mark.rehearsal


@pytest.fixture(autouse=True)
def able():
    """Skip if no rehearsal can run here. Leave no rehearsal behind."""
    if said := needs.missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    yield
    sandbox.take_down()


def rehearse(*flags: str) -> subprocess.CompletedProcess:
    """Run `inv rehearse`, and wait for its end."""
    done = subprocess.run([*INV, "rehearse", *flags], capture_output=True, text=True, timeout=1500, check=False)
    sys.stderr.write(done.stderr[-3000:])
    return done


def test_the_whole_flow_is_green():
    """The last list and the exit status report success. Standard output stays empty."""
    done = rehearse()
    marks = re.findall(r"^\[(.)\] ", done.stderr, re.M)
    assert (done.returncode, done.stdout, marks) == (0, "", ["✓"] * 10)


def test_kept_sparks_answer_as_it_says_and_go_when_told():
    """--keep prints commands for the stand-ins, and they work as printed. --down takes the stand-ins down."""
    done = rehearse("--keep", "--hosts", "1")
    assert done.returncode == 0
    for line, answer in (("docker ps", "node-ray"), ("/v1/models", '"tiny"')):
        typed = next(said for said in done.stderr.splitlines() if said.startswith("  nsenter") and said.endswith(line))
        told = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, timeout=60, check=True)
        assert answer in told.stdout
    second = rehearse()
    assert second.returncode != 0 and "--down" in second.stderr
    assert "The stand-in Sparks are down." in rehearse("--down").stderr


@pytest.mark.parametrize("flags", [("--hosts", "3"), ("--hosts", "two")])
def test_a_wrong_number_is_a_sentence(flags):
    """The number of hosts is refused before anything changes."""
    done = rehearse(*flags)
    assert done.returncode != 0 and "it takes 1, 2, 4" in done.stderr and "Traceback" not in done.stderr
