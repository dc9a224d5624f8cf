"""The states of `inv health` on a real cluster: serving, under load, frozen, and without its worker.

The tests use one cluster in this order. The last test takes the cluster down.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from client import TOKENS
from operating import KEY, SHELL, containers, inv, serving, settled, slowness

from rehearsal.flow import ALLOW
from rehearsal.hosts import INV, Host
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
CLIENT = str(Path(__file__).with_name("client.py"))
URL = "http://10.0.0.1:8000"
FLEET = {"VLLM_API_KEY": KEY, "WORKER_HOSTS": "spark-2"}
LONG = """
import json, os, sys, urllib.request
body = {"model": "tiny", "prompt": "a" * 90_000, "max_tokens": 1}
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["KEY"]}
request = urllib.request.Request(sys.argv[1] + "/v1/completions", json.dumps(body).encode(), headers)
print(json.load(urllib.request.urlopen(request, timeout=300))["usage"]["prompt_tokens"])
"""


@pytest.fixture(scope="module")
def pair(rig, shells) -> Iterator[list[Host]]:
    """Two hosts that serve the tiny model with room for a long prompt."""
    words = ("up", "--model", "rehearsal", "--max-len", "128K", "--allow", ALLOW)
    done = rig.hosts[0].run(*INV, *words, env=SHELL | FLEET, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    yield rig.hosts
    for host in rig.hosts:
        host.run("docker", "rm", "--force", "node-ray")


def health(pair, **env) -> tuple[int, str]:
    """Exit status of `inv health`, and its last line."""
    done = inv(pair[0], "health", **FLEET | env)
    return done.returncode, done.stderr.strip().splitlines()[-1]


def becomes(pair, code: int, seconds: float = 60, **env: str) -> str:
    """Type `inv health` until it ends with this status, and return its last line."""
    said: list[tuple[int, str]] = []
    assert wait(lambda: said.append(health(pair, **env)) or said[-1][0] == code, seconds, pause=0.5), said
    return said[-1][1]


# The command lines of the processes that a kernel without memory may kill.
API_SERVER, ENGINE_CORE, RANK = "/vllm serve", "^VLLM::EngineCore", "^ray::RayWorker"
GAUGE, RAYLET = "^ray::Gauge", "/raylet/raylet "
RECORDER, GUARD = "^python3 /opt/inside/recorder.py /run", "/memory_guard.py"


def processes(host: Host, name: str) -> set[str]:
    """Return the ids of these processes in the host's container."""
    return set(host.run("docker", "exec", "node-ray", "pgrep", "-f", name).stdout.split())


def kill(pair, host: Host, name: str, *codes: int, within: float = 15) -> str:
    """Kill these processes. Within so many seconds `inv health` ends with the last of these codes, and keeps to it.

    Fails on any other state on the way. If the last code is 0, the processes are also back in time. A machine that is
    busy has more time, in proportion. Returns the last line of `inv health`, and prints how long it took.
    """
    dead, limit, states = processes(host, name), within * max(1, slowness()), []
    assert dead and host.run("docker", "exec", "node-ray", "kill", "-KILL", *dead).returncode == 0
    begun = time.monotonic()

    def back() -> float:
        assert wait(lambda: (now := processes(host, name)) and not now & dead, limit), f"{name} is not back"
        return time.monotonic() - begun

    with ThreadPoolExecutor() as pool:
        again = pool.submit(back) if codes[-1] == 0 else None
        while not states or states[-1][0] != codes[-1]:
            states.append(health(pair))
            took = time.monotonic() - begun
            assert states[-1][0] in codes and took < limit, (took, states)
        while time.monotonic() - begun < took + (4 if codes[-1] else 11):  # a look of the recorder is fresh for 10 s
            states.append(health(pair))
            assert states[-1][0] == codes[-1], states
        took = again.result() if again else took
    print(
        f"{name} of {host.name}: after {took:.1f} s (limit here: {limit:.1f} s) {'back; ' if again else ''}{states[-1]}"
    )
    return states[-1][1]


def freeze(host: Host, name: str) -> None:
    """Send a signal to the server's whole process group."""
    host.run("docker", "exec", "node-ray", "bash", "-c", f"kill -{name} -- -$(cat /run/vllm-serve.pid)")


def test_healthy_within_five_seconds(pair):
    """A token was generated. --json prints the same state. A machine that is busy has more time, in proportion."""
    slow, start = slowness(), time.monotonic()
    done = inv(pair[0], "health", "--json", **FLEET)
    assert time.monotonic() - start < 5 * max(slow, slowness())
    told = json.loads(done.stdout)
    assert (done.returncode, told["state"], told["code"]) == (0, "healthy", 0), done.stderr
    assert "one token" in told["parts"]["API"]["says"] and "10.0.0.2 (ranks: 1)" in told["parts"]["Ray"]["says"]
    assert KEY not in done.stdout + done.stderr


def test_status_is_one_screen(pair):
    """The screen and the JSON have nodes, image, model, context, memory now and at its lowest, links, and times."""
    done = inv(pair[0], "status", "--json", **FLEET)
    told = json.loads(done.stdout)
    assert told["state"] == "healthy" and told["server"]["model"] == "tiny" and told["server"]["context"] == 131072
    assert [node["hostname"] for node in told["nodes"]] == ["spark-1", "spark-2"]
    assert all(node["lowest"] <= node["available"] + 2**30 and node["image"] for node in told["nodes"])
    assert all(set(node["links"].values()) == {"up"} for node in told["nodes"])
    assert 0 < time.time() - told["nodes"][0]["since"] < 3600
    assert max(len(line) for line in done.stderr.splitlines()) <= 120 and "131,072 tokens" in done.stderr
    assert "worker of 10.0.0.1" in inv(pair[1], "status").stderr


def test_the_fabric_is_not_proved_while_a_server_has_the_gpus(pair):
    """`check --fabric` refuses at once, because the all-reduce would wait for the GPUs."""
    done = inv(pair[0], "check", "--model", "rehearsal", "--fabric", "--allow", ALLOW, **FLEET)
    assert done.returncode != 0 and "A server runs in this container already. Type: inv stop" in done.stderr


def test_memory_is_a_line_for_each_node(pair, terminal, tmp_path):
    """`inv memory` also prints the lowest memory of each node, and writes CSV. Ctrl-C ends it."""
    file = tmp_path / "memory.csv"
    typed = terminal(pair[0], "memory", "--csv", str(file))
    typed.until("10.0.0.2 ")
    typed.until("GiB available")
    assert wait(lambda: len(file.read_text().splitlines()) >= 5, 60)
    typed.end(signal.SIGINT)
    rows = [row.split(",") for row in file.read_text().splitlines()]
    assert rows[0] == ["time", "node", *(f"{name}_bytes" for name in ("available", "free", "cached", "swap"))]
    assert {row[1] for row in rows[1:]} == {"10.0.0.1", "10.0.0.2"} and {len(row) for row in rows} == {6}
    assert "Lowest while the last server ran: " in typed.said and "Traceback" not in typed.said


def test_logs_are_the_servers_and_the_nodes(pair):
    """The head has the server's log and its own. The worker has its own log."""
    assert "Application startup complete" in inv(pair[0], "logs").stdout
    assert "Ray runtime started" in inv(pair[1], "logs", "--node").stdout


@pytest.mark.parametrize(
    ("env", "code", "said"),
    [
        ({"VLLM_API_KEY": "wrong"}, 15, "API key wrong: "),
        ({"VLLM_API_KEY": ""}, 15, "API key wrong: "),
    ],
    ids=["another key", "no key"],
)
def test_a_trouble_has_its_own_exit_status(pair, env, code, said):
    """Each trouble also has its own message with the next command."""
    found, line = health(pair, **env)
    assert (found, line[: len(said)]) == (code, said) and "Next: " in line


def test_the_floor_is_the_one_of_the_launch(pair):
    """`inv health` has no model. Its limit is the one with which the recorder was started."""

    def record(floor: str) -> None:
        words = ("bash", "/opt/inside/serve.sh", "record", "http://127.0.0.1:8000", floor, "1")
        assert pair[0].run("docker", "exec", "node-ray", *words).returncode == 0

    record("999")
    assert "memory low: " in (line := becomes(pair, 16)) and "MEM_FLOOR_GIB (999)" in line
    record("1")
    becomes(pair, 0)


def test_a_link_that_went_down_is_degraded(pair, rig):
    """A link of the other node counts too. The server goes on serving over the other links."""
    rig.link_down(pair[1], "enp1s0f0np0")
    try:
        assert "enp1s0f0np0 of 10.0.0.2 is down" in becomes(pair, 17)
    finally:
        rig.link_up(pair[1], "enp1s0f0np0")
    becomes(pair, 0)


def test_200_requests_at_once_while_health_is_asked_every_second(pair):
    """No request is lost, and each `inv health` says healthy or busy."""
    client = pair[1].popen(sys.executable, CLIENT, URL, "200", env={"KEY": KEY}, stdout=subprocess.PIPE, text=True)
    states = []
    while client.poll() is None:
        states.append(health(pair))
        time.sleep(1)
    answers = json.loads(client.stdout.read())
    assert answers == [[200, TOKENS]] * 200
    assert states and {code for code, _ in states} <= {0, 10}, states


def test_a_long_prompt_is_busy_and_never_hung(pair):
    """The prefill takes several times HANG_S. The KV cache fills with each step, so the state is never hung."""
    client = pair[1].popen(sys.executable, "-c", LONG, URL, env={"KEY": KEY}, stdout=subprocess.PIPE, text=True)
    becomes(pair, 10, HANG_S="6")  # once the prefill has begun
    states = []
    while client.poll() is None:
        states.append(health(pair, HANG_S="6"))
    # The last looks may come after the prompt, while the client ends.
    codes = [code for code, _ in states]
    assert codes.count(10) >= 5 and {*codes} <= {0, 10} and codes == sorted(codes, reverse=True), states
    assert client.wait(300) == 0 and client.stdout.read().strip() == "90000"
    becomes(pair, 0)


def test_a_frozen_server_is_hung(pair):
    """The server is hung after HANG_S without a move, and not before. When it runs again, it is healthy."""
    freeze(pair[0], "STOP")
    try:
        assert health(pair, HANG_S="300")[0] == 10
        line = becomes(pair, 13, 120, HANG_S="8")
    finally:
        freeze(pair[0], "CONT")
    assert "HANG_S: 8" in line and "inv stop" in line
    becomes(pair, 0)


def test_watch_sees_a_kill_and_runs_the_hook_once(pair, terminal, tmp_path):
    """After WATCH_FAILURES the hook runs, without a secret. WATCH_MAX forbids a second run.

    The API server alone is killed, as an OOM killer does it. Within 10 s the recorder ends what that server leaves.
    """
    seen, hook = tmp_path / "seen", tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\nenv >>{seen}\n")
    hook.chmod(0o755)
    env = {"WATCH_INTERVAL_S": "1", "WATCH_FAILURES": "2", "WATCH_COOLDOWN_S": "0", "WATCH_MAX": "1"}
    watch = terminal(pair[1], "watch", "--url", URL, VLLM_API_KEY=KEY, WATCH_HOOK=str(hook), **env)
    watch.until("armed")
    line = kill(pair, pair[0], API_SERVER, 12, within=10)
    watch.until("held back: WATCH_MAX is 1")
    assert wait(seen.exists, 20)
    assert settled(lambda: seen.read_text().count("WATCH_EVENT=down") == 1, 4)
    assert "WATCH_URL=http://10.0.0.1:8000" in seen.read_text() and KEY not in seen.read_text()
    assert watch.end(signal.SIGTERM) == 0 and watch.said.rstrip().endswith("stopped")
    assert "was ended by the recorder: its API server (process " in line and "inv logs" in line
    assert not [pid for host in pair for name in (ENGINE_CORE, RANK) for pid in processes(host, name)]


def test_a_launch_whose_terminal_is_closed_while_detached_serves_on(pair, terminal):
    """A detached launch loads and serves without its terminal."""
    launch = terminal(pair[0], "launch", "--model", "rehearsal", "--detach", "--allow", ALLOW, **FLEET)
    launch.until("The server is loading")
    launch.end(signal.SIGHUP)
    becomes(pair, 11)
    becomes(pair, 0, 240)


@pytest.fixture
def served(pair) -> list[Host]:
    """The two hosts serve. A server that the test before has ended is launched again."""
    if health(pair)[0] != 0:
        done = inv(pair[0], "launch", "--model", "rehearsal", "--detach", "--allow", ALLOW, **FLEET)
        assert done.returncode == 0, done.stderr[-3000:]
        becomes(pair, 0, 240)
    return pair


@pytest.mark.parametrize(
    ("number", "name", "codes", "within"),
    [
        (0, RECORDER, [0], 5),
        (1, GUARD, [0], 5),
        (1, GAUGE, [0], 15),
        (0, ENGINE_CORE, [14, 12], 15),
        (1, RANK, [14, 12], 15),
        (0, RANK, [14, 12], 15),
    ],
    ids=["recorder", "memory guard", "gauge", "engine core", "rank of the worker", "rank of the head"],
)
def test_each_process_that_is_killed_is_answered(number, name, codes, within, served):
    """What can be started again is back while the server serves. Otherwise the state says that the server has ended."""
    line = kill(served, served[number], name, *codes, within=within)
    assert codes == [0] or "ended by itself" in line


def alive(pair) -> dict[str, bool]:
    """Return the facts of each node in `inv status --json`, by address."""
    told = json.loads(inv(pair[0], "status", "--json", **FLEET).stdout)
    return {node["address"]: node["alive"] for node in told["nodes"]}


def test_a_worker_that_dies_under_load_is_a_rank_lost_and_down_cleans(served):
    """A container ends with its Ray. The head's container stays until `down` removes it."""
    pair = served
    client = pair[1].popen(sys.executable, CLIENT, URL, "50", env={"KEY": KEY}, stderr=subprocess.DEVNULL)
    time.sleep(1)
    line = kill(pair, pair[1], RAYLET, 12, 14)
    assert "10.0.0.1" in line and "inv down" in line
    assert wait(lambda: alive(pair) == {"10.0.0.1": True, "10.0.0.2": False}, 60, pause=1), alive(pair)
    client.kill()
    client.wait(10)
    assert wait(lambda: not serving(pair[0]), 60)
    assert containers(pair[0]) == "node-ray running"
    down = inv(pair[0], "down", **FLEET)
    assert down.returncode == 0 and "node-ray was removed" in down.stderr
    assert [containers(host) for host in pair] == ["", ""]
    assert health(pair)[0] == 12


def test_a_head_that_dies_while_it_serves_does_not_linger_elsewhere(pair):
    """The state is not running. `down` takes the worker down too, and `up` brings both nodes up again."""
    words = ("up", "--model", "rehearsal", "--allow", ALLOW)
    assert pair[0].run(*INV, *words, env=SHELL | FLEET, timeout=400).returncode == 0
    pair[0].run("docker", "kill", "node-ray")
    becomes(pair, 12)
    assert containers(pair[1]) == "node-ray running"
    down = inv(pair[0], "down", **FLEET)
    assert down.returncode == 0 and "spark-2 | node-ray was removed" in down.stderr, down.stderr
    assert [containers(host) for host in pair] == ["", ""]
    elsewhere = inv(pair[1], "down", **FLEET)
    assert elsewhere.returncode != 0 and "This host is not the head" in elsewhere.stderr
