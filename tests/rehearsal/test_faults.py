"""Faults on real engines: the task names the fault, and the command in the message corrects it."""

import os
import pty
import signal
import subprocess

import pytest
from operating import KEY, bring_up, containers, gone, inv, serving, settled

from rehearsal.flow import ALLOW
from rehearsal.hosts import INV
from rehearsal.shell import wait

pytestmark = pytest.mark.rehearsal
ENDINGS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_head_goes_with_its_terminal(sparks, terminal, number):
    """SIGHUP, SIGTERM or Ctrl-C at `inv head` leaves no container."""
    head = terminal(sparks[0], "head")
    head.until("Ray runtime started")
    head.end(number)
    assert gone(sparks[0]), containers(sparks[0])


@pytest.mark.parametrize("number", ENDINGS, ids=lambda number: number.name)
def test_a_worker_goes_with_its_terminal_and_the_head_stays(cluster, sparks, number):
    """The same signals at `inv worker` leave no container. Ray's head loses one node and runs on."""
    cluster[1].end(number)
    assert gone(sparks[1]), containers(sparks[1])
    assert containers(sparks[0]) == "node-ray running"


def test_what_a_killed_head_leaves_is_named_by_the_next(sparks, terminal):
    """After a SIGKILL the container stays. The next `inv head` names the container, and `inv cleanup` removes it."""
    head = terminal(sparks[0], "head")
    head.until("Ray runtime started")
    head.end(signal.SIGKILL)
    second = inv(sparks[0], "head")
    assert second.returncode != 0 and "A node-ray is here already (running" in second.stderr
    assert "inv cleanup" in second.stderr
    assert inv(sparks[0], "cleanup", "--yes").returncode == 0
    assert containers(sparks[0]) == ""
    again = terminal(sparks[0], "head")
    again.until("Ray runtime started")
    again.end(signal.SIGTERM)


def test_a_worker_on_the_heads_host_is_refused(sparks):
    """The address alone shows that both ranks would run on one Spark."""
    done = inv(sparks[0], "worker")
    assert done.returncode != 0 and "both ranks would be on it" in done.stderr


def test_a_head_on_the_workers_host_is_refused(sparks):
    """HEAD_NODE_IP is no address of the worker's host."""
    done = inv(sparks[1], "head")
    assert done.returncode != 0 and "no address of this host" in done.stderr


def test_a_worker_without_a_head_is_refused_in_time(sparks):
    """The worker waits WAIT_HEAD_S. `ray start --address` alone would wait without a message."""
    done = inv(sparks[1], "worker", WAIT_HEAD_S="2")
    assert done.returncode != 0 and "No head answers at 10.0.0.1:6379 after 2 s" in done.stderr
    assert containers(sparks[1]) == ""


def test_the_ports_holder_is_named(sparks):
    """If another program holds Ray's port, the head names the program."""
    listen = "import socket, time; s = socket.create_server(('', 6379)); print(1, flush=True); time.sleep(60)"
    holder = sparks[0].popen("python3", "-c", listen, stdout=subprocess.PIPE)
    holder.stdout.readline()
    done = inv(sparks[0], "head")
    holder.kill()
    assert done.returncode != 0 and f"6379 is held by python3 (process {holder.pid})" in done.stderr


def test_a_missing_image_is_named(sparks):
    """The message has the image, and the task that builds it."""
    done = inv(sparks[0], "head", VLLM_IMAGE="local/none")
    assert done.returncode != 0 and "no image local/none (shell)" in done.stderr and "inv build-image" in done.stderr


def test_an_image_that_nobody_here_built(sparks, terminal):
    """An image without our labels is asked for its Ray: refused without one, and taken with one, as NGC's 25.11 is."""
    spark, ours = sparks[0], "rehearsal/vllm-ray"
    listed = spark.run("docker", "image", "ls", "--filter", "reference=rehearsal/vllm", "--format", "{{.Tag}}")
    bare = f"rehearsal/vllm:{listed.stdout.split()[0]}"
    refused = inv(spark, "head", VLLM_IMAGE=bare)
    assert refused.returncode != 0
    assert f"{bare} (shell) has no Ray. Type: inv build-image --base-image {bare} --tag local/" in refused.stderr
    unlabelled = "LABEL ray.version= org.opencontainers.image.base.digest="
    spark.run("docker", "create", "--name", "made", ours, "true")
    spark.run("docker", "commit", "--change", unlabelled, "made", "rehearsal/pulled")
    spark.run("docker", "rm", "made")
    image = {"VLLM_IMAGE": "rehearsal/pulled"}
    head = terminal(spark, "head", "--model", "rehearsal", **image)
    head.until("Ray runtime started")
    checked = inv(spark, "check", "--model", "rehearsal", **image)
    head.end(signal.SIGTERM)
    spark.run("docker", "image", "rm", "rehearsal/pulled")
    assert "WARNING image: The image of 10.0.0.1 has no label of its base" in checked.stderr


def test_an_engine_that_does_not_answer_is_named(sparks):
    """The message has the command that starts Docker."""
    done = inv(sparks[0], "head", DOCKER_HOST="unix:///nowhere.sock")
    assert done.returncode != 0 and "unix:///nowhere.sock" in done.stderr and "systemctl start docker" in done.stderr


@pytest.mark.parametrize(
    ("env", "told"), [({}, "missing"), ({"VLLM_CPU_KVCACHE_SPACE": "2"}, "has '2'")], ids=["missing", "different"]
)
def test_a_forwarded_variable_that_is_not_the_heads_is_refused(sparks, terminal, env, told):
    """The message names the variable, both values, and the commands that bring the nodes up again."""
    head = terminal(sparks[0], "head", *(("--model", "rehearsal") if env else ()), **env)
    head.until("Ray runtime started")
    done = inv(sparks[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    assert done.returncode != 0
    assert f"VLLM_CPU_KVCACHE_SPACE: {told}, needs '1'" in done.stderr
    assert "inv worker --model rehearsal" in done.stderr
    assert not serving(sparks[0])


def test_too_few_nodes_are_refused(sparks, terminal):
    """One node is too few for TP=2. Ray itself is asked for its nodes."""
    head = terminal(sparks[0], "head", "--model", "rehearsal")
    head.until("Ray runtime started")
    done = inv(sparks[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    assert done.returncode != 0 and "needs 2 nodes with a GPU" in done.stderr and "10.0.0.1" in done.stderr


def test_launch_is_refused_without_key_container_or_on_a_worker(cluster, sparks):
    """Each refusal has a message of its own, and nothing starts."""
    for host, env, told in (
        (sparks[0], {}, "VLLM_API_KEY must be set"),
        (sparks[1], {"VLLM_API_KEY": KEY}, "This node is a worker"),
        (sparks[0], {"VLLM_API_KEY": KEY, "HEAD_NODE_IP": "10.0.0.9"}, "Ray does not answer at 10.0.0.9:6379"),
    ):
        done = inv(host, "launch", "--model", "rehearsal", **env)
        assert done.returncode != 0 and told in done.stderr
    assert not serving(sparks[0])


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_server_outlives_its_terminal_and_stop_ends_it(cluster, sparks, terminal, number):
    """The server goes on serving and its log is kept. `stop` ends the server, and Ray stays up."""
    launch = terminal(sparks[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    launch.until("non-default args")
    launch.end(number)
    log = sparks[0].cache / "node-ray/serve.log"
    assert settled(lambda: serving(sparks[0])) and "non-default args" in log.read_text()
    if number == signal.SIGTERM:  # a process that `stop` takes for a rank, and that does not end
        held = "cp /bin/sleep /tmp/ray::RayWorkerHeld; exec /tmp/ray::RayWorkerHeld 900"
        sparks[1].run("docker", "exec", "--detach", "node-ray", "bash", "-c", held)
        stop = inv(sparks[0], "stop")
        sparks[1].run("docker", "exec", "node-ray", "pkill", "-f", "^/tmp/ray::RayWorkerHeld")
        assert "60 s after the server's end 10.0.0.2 still has ranks: 1" in stop.stderr and stop.returncode == 0
        assert not serving(sparks[0])
        return
    if number != signal.SIGHUP:  # the rest does not depend on the signal, so it is looked at once
        assert inv(sparks[0], "stop").returncode == 0 and not serving(sparks[0])
        return
    second = inv(sparks[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    assert second.returncode != 0 and "inv stop" in second.stderr
    assert inv(sparks[0], "stop").returncode == 0
    assert not serving(sparks[0])
    health = inv(sparks[0], "health")
    assert health.returncode == 12 and "Ray: 2 nodes" in health.stderr
    assert inv(sparks[0], "stop").returncode != 0, "there was nothing left to stop"


def test_ctrl_c_stops_the_server(cluster, sparks, terminal):
    """Ctrl-C at `launch` leaves no process of the server on any node."""
    launch = terminal(sparks[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY)
    launch.until("non-default args")
    launch.end(signal.SIGINT)
    assert not serving(sparks[0]), launch.said
    assert "The server is stopped" in launch.said


def test_no_secret_is_seen_anywhere(cluster, sparks, terminal):
    """No command line, container environment, log or terminal shows a secret."""
    launch = terminal(
        sparks[0], "launch", "--model", "rehearsal", "--allow", ALLOW, VLLM_API_KEY=KEY, HF_TOKEN="hf-stand-in-marker"
    )
    launch.until("non-default args")
    seen = [launch.read(), (sparks[0].cache / "node-ray/serve.log").read_text()]
    seen += [host.run("docker", "inspect", "node-ray").stdout for host in sparks]
    seen.append(subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout)
    launch.end(signal.SIGINT)
    assert "vllm serve" in seen[-1]
    assert not [text for text in seen if KEY in text or "hf-stand-in-marker" in text]


def test_cleanup_asks_a_person(sparks, terminal):
    """Without a terminal `cleanup` refuses. Only the answer yes removes containers, even those that run."""
    head = terminal(sparks[0], "head")
    head.until("Ray runtime started")
    alone = inv(sparks[0], "cleanup")
    assert alone.returncode != 0 and "inv cleanup --yes" in alone.stderr and "node-ray: running" in alone.stderr
    assert "Ray: port 6379 is held by" in alone.stderr
    for answer, left in (("n", "node-ray running"), ("y", "")):
        ours, theirs = pty.openpty()
        asked = sparks[0].popen(*INV, "cleanup", stdin=theirs, stderr=subprocess.PIPE)
        os.write(ours, f"{answer}\n".encode())
        assert b"Did the previous run finish?" in asked.communicate(timeout=60)[1]
        os.close(ours)
        os.close(theirs)
        assert containers(sparks[0]) == left
    assert head.process.wait(60) != 0


def test_somebody_elses_container_is_not_ours(sparks):
    """node-exporter stays. The head refuses beside node- and digits, as in the article, and cleanup removes it."""
    for name in ("node-exporter", "node-17"):
        sparks[0].run("docker", "create", "--name", name, "rehearsal/vllm-ray", "true")
    refused = inv(sparks[0], "head")
    done = inv(sparks[0], "cleanup", "--yes")
    left = containers(sparks[0])
    sparks[0].run("docker", "rm", "node-exporter")
    assert refused.returncode != 0 and "A node-17 is here already (created" in refused.stderr
    assert "node-17" in done.stderr and left == "node-exporter created"


def test_a_link_that_is_down_is_left_out(rig, sparks):
    """If the switch's end of a cable is down, NCCL does not get the devices of that port."""
    for netdev in ("enp1s0f0np0", "enP2p1s0f0np0"):
        rig.link_down(sparks[0], netdev)
    assert wait(lambda: "port f0 is down" in inv(sparks[0], "--dry", "head").stderr, 20)
    said = inv(sparks[0], "--dry", "head")
    for netdev in ("enp1s0f0np0", "enP2p1s0f0np0"):
        rig.link_up(sparks[0], netdev)
    assert "export NCCL_IB_HCA=rocep1s0f1,roceP2p1s0f1\n" in said.stdout
    assert wait(lambda: "rocep1s0f0" in inv(sparks[0], "--dry", "head").stdout, 20)


def test_the_worker_dies_and_health_says_so(sparks, terminal):
    """Ray reports one node less within its own time limit."""
    _, worker = bring_up(sparks, terminal)
    worker.end(signal.SIGTERM)
    assert wait(lambda: "Ray: 1 nodes" in inv(sparks[0], "health").stderr, 120, pause=2)
