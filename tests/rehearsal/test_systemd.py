"""The cluster comes back by itself: the commands in the units of docs/systemd.md, run as systemd would run them.

systemd itself is not on the stand-in Sparks. A script in its place runs the lines of `sparks.service` for the hook.
"""

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from operating import KEY, SHELL, Terminal, containers, inv
from test_memory_guards import GIB, LOAD_GIB, available, take  # noqa: F401 - take is a fixture

from rehearsal.flow import ALLOW
from rehearsal.hosts import INV
from rehearsal.shell import script

pytestmark = pytest.mark.rehearsal
PAGE = (Path(__file__).resolve().parents[2] / "docs/systemd.md").read_text()
OURS = {
    "/opt/sparks/inv": shlex.join(INV),
    "--model nemotron": f"--model rehearsal --allow {ALLOW},memory-floor,memory-low",
    "spark2 docker": "spark-2 docker",
    "http://spark1:8000": "http://10.0.0.1:8000",
}
QUICK = {"WATCH_INTERVAL_S": "2", "WATCH_FAILURES": "2"}
BACK_S = 300


def lines(key: str) -> list[str]:
    """Return the commands of the page's units with this key, in order, with the names of the stand-in Sparks."""
    found = [line.removeprefix("-") for line in re.findall(f"^{key}=(.+)$", PAGE, re.M)]
    for theirs, ours in OURS.items():
        found = [line.replace(theirs, ours) for line in found]
    return found


class Unit:
    """`sparks.service` on the head, and its watch."""

    def __init__(self, sparks, terminal, folder: Path, **env: str) -> None:
        self.head, self.open, self.log = sparks[0], terminal, folder / "journal"
        self.env = SHELL | {"VLLM_API_KEY": KEY, "WORKER_HOSTS": "spark-2"} | env
        stop, before, begin = lines("ExecStop"), lines("ExecStartPre"), lines("ExecStart")[:1]
        assert (len(stop), len(before), len(begin)) == (1, 2, 1)
        self.start_file, restart = folder / "start", folder / "restart"
        exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in self.env.items())
        script(self.start_file, "\n".join([exports, *before, *begin]))
        script(restart, "\n".join([exports, *stop, f"exec {self.start_file}"]))
        (folder / "bin").mkdir()
        script(folder / "bin/sudo", 'shift; exec "$@"')
        asked = 'test "$*" = "--no-block restart sparks"'
        script(folder / "bin/systemctl", f"{asked} && setsid {restart} </dev/null >>{self.log} 2>&1 &")
        self.path = {"PATH": f"{folder}/bin:{self.head.env['PATH']}"}

    def boot(self) -> None:
        """Start the unit, as systemd does at boot."""
        done = self.head.run(self.start_file, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]

    def watch(self, most: int) -> Terminal:
        """Start the watch's unit, and wait until its hook may run."""
        words = shlex.split(lines("ExecStart")[1].removeprefix(shlex.join(INV)))
        hook = re.search("^WATCH_HOOK=(.+)$", PAGE, re.M)[1]
        typed = self.open(self.head, *words, **self.env, **self.path, **QUICK, WATCH_HOOK=hook, WATCH_MAX=str(most))
        typed.until("armed")
        return typed

    def an_hour_passes(self) -> None:
        """Let the runs of the hook be longer ago than WATCH_COOLDOWN_S."""
        file = self.head.cache / "node-ray/watch.json"
        file.write_text(json.dumps([at - 3700 for at in json.loads(file.read_text())]))


@pytest.fixture
def unit(sparks, shells, terminal, tmp_path) -> Callable[..., Unit]:
    """Makes the units of the page. Afterwards no file of the watch is left."""
    yield lambda **env: Unit(sparks, terminal, tmp_path, **env)
    (sparks[0].cache / "node-ray/watch.json").unlink(missing_ok=True)


def test_after_a_crash_and_after_a_reboot_the_model_is_served_again(unit, sparks):
    """The hook brings a killed server back. At boot `up` works where nothing is, and beside a worker that is left."""
    sparks_service = unit()
    sparks_service.boot()
    watch = sparks_service.watch(most=1)
    killed = time.monotonic()
    sparks[0].run("docker", "exec", "node-ray", "pkill", "-KILL", "-f", "bin/vllm serve")
    watch.until("hook runs: down", 60)
    watch.until("well again", BACK_S)
    print(f"served again {time.monotonic() - killed:.0f} s after the kill")
    sparks[0].run("docker", "rm", "--force", "node-ray")
    assert containers(sparks[1]) == "node-ray running"
    sparks_service.boot()
    assert inv(sparks[0], "health", VLLM_API_KEY=KEY).returncode == 0


def test_a_node_that_is_short_of_memory_is_loaded_again_only_so_often(unit, sparks, take):  # noqa: F811
    """After a memory guard's kill the hook loads the model again. Where memory stays short, WATCH_MAX ends that."""
    limit = available() / GIB - LOAD_GIB
    short = unit(MEM_ABORT_GIB=f"{limit:.3f}", MEM_FLOOR_GIB=f"{limit + 0.1:.3f}", MEM_WARN_GIB="9999")
    short.boot()
    watch = short.watch(most=1)
    why = sparks[0].cache / "node-ray/ended.json"
    take(why.exists)
    assert "ended by the memory guard" in why.read_text()
    take.give_back()
    watch.until("well again", BACK_S)
    short.an_hour_passes()
    take(why.exists)
    watch.until("held back: WATCH_MAX is 1", BACK_S)
    assert watch.read().count("hook runs") == 1
