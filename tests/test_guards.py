"""Guards: head, worker and launch refuse before anything starts, with the cause and the command to type.

Docker's Engine is made up here, and these tests hold the sentences. The stand-in Sparks of tests/rehearsal have real
Engines.
"""

import hashlib
import os
import shlex
import socket
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from docker.errors import APIError
from invoke import Exit
from requests.exceptions import JSONDecodeError

from cluster import cleanup, engine, guards, image, served, token
from cluster.models import find_model
from cluster.node import Network
from cluster.settings import load_settings

HERE, ELSEWHERE = "127.0.0.1", "192.0.2.1"
NEMOTRON = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1800",
    "RAY_CGRAPH_get_timeout": "1800",
    "VLLM_ENGINE_READY_TIMEOUT_S": "1800",
    "MEM_ABORT_GIB": "6",
    "VLLM_NVFP4_GEMM_BACKEND": "marlin",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
    "VLLM_USE_FLASHINFER_MOE_FP4": "0",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


class Container:
    """A container as the docker SDK shows it."""

    def __init__(self, name="node-ray", status="running", serving=False, **env):
        env = {"VLLM_HOST_IP": HERE, "MASTER_ADDR": HERE, "NODE_RAY_REPOSITORY": "0a"} | env
        self.name, self.id, self.status = name, name, status
        self.serving = serving
        config = {"Env": [f"{name}={value}" for name, value in env.items()], "Image": "local/vllm-ray:26.05.post1"}
        self.attrs = {"Config": config, "Created": datetime.now(UTC).isoformat()}


@pytest.fixture
def docker(operator):
    """This node's Engine. A test sets its containers, the labels of its image, and what it says of itself."""
    found = SimpleNamespace(containers=[], labels={"ray.version": "2.60.0"}, info={"CgroupDriver": "cgroupfs"})
    operator.setattr(engine, "client", lambda: SimpleNamespace(info=lambda: found.info))
    operator.setattr(engine, "our_containers", lambda *_: found.containers)
    operator.setattr(engine, "image_labels", lambda name: found.labels)
    operator.setattr(served, "server_runs", lambda head: head.serving)
    return found


@pytest.fixture
def ray_port(operator):
    """A port of this machine that answers, used instead of Ray's port."""
    with socket.create_server((HERE, 0)) as listening:
        operator.setattr(guards, "RAY_PORT", listening.getsockname()[1])
        yield listening.getsockname()[1]


def _refused(guard, *args, model=None, **shell) -> str:
    settings = load_settings(find_model(model) if model else None, {}, {"ENV_FILE": "", **shell})
    with pytest.raises(Exit) as refusal:
        guard(settings, *args)
    assert refusal.value.code
    return refusal.value.message


CDI = [{"Source": "cdi", "ID": "nvidia.com/gpu=all"}]
AT_HOME = Network(HERE, (), ("lo",))


def test_a_head_is_where_its_address_is(docker):
    """If HEAD_NODE_IP is no address of this host, this node is a worker: the message has its line."""
    said = _refused(guards.before_head, AT_HOME, model="nemotron", HEAD_NODE_IP=ELSEWHERE, RDMA_HCAS="")
    assert f"HEAD_NODE_IP (shell) is {ELSEWHERE}" in said and "so this node is a worker." in said
    assert f"Type here: ENV_FILE= HEAD_NODE_IP={ELSEWHERE} RDMA_HCAS= inv worker --model nemotron." in said
    up = replace(load_settings(find_model("nemotron"), {}, {"ENV_FILE": "", "HEAD_NODE_IP": ELSEWHERE}), typed=("up",))
    with pytest.raises(Exit, match=rf"Type on the head: ENV_FILE= HEAD_NODE_IP={ELSEWHERE} inv up --model nemotron\."):
        guards.before_head(up, AT_HOME)


def test_a_head_uses_the_address_that_workers_dial(docker):
    """A head whose PRIMARY_IF has another address than HEAD_NODE_IP is refused."""
    said = _refused(guards.before_head, Network("10.0.0.7", (), ()), HEAD_NODE_IP=HERE)
    assert HERE in said and "10.0.0.7" in said and ".env" in said


def test_a_worker_is_not_on_the_heads_host(docker):
    """A worker on the head's host is refused: Ray would count two nodes on one Spark."""
    said = _refused(guards.before_worker, AT_HOME, model="nemotron", HEAD_NODE_IP=HERE, VLLM_IMAGE="mine:1")
    before, model = f"HEAD_NODE_IP={HERE} VLLM_IMAGE=mine:1 inv", "--model nemotron"
    assert f"Type here: ENV_FILE= {before} head {model}; on the other node: {before} worker {model}" in said


@pytest.fixture
def silent(monkeypatch):
    """No head answers. Nothing is sent to its address, which may be somebody else's here."""
    monkeypatch.setattr(guards, "port_answers", lambda *_: False)


def test_a_worker_does_not_wait_for_a_head_for_ever(docker, ray_port, silent):
    """After WAIT_HEAD_S the message names the address and inv head. `ray start --address` alone would say nothing."""
    said = _refused(guards.before_worker, AT_HOME, HEAD_NODE_IP=ELSEWHERE, WAIT_HEAD_S="0")
    assert f"No head answers at {ELSEWHERE}:{ray_port} after 0 s (WAIT_HEAD_S)" in said and "inv head" in said


@pytest.mark.parametrize(
    ("guard", "address", "status"),
    [(guards.before_head, HERE, "running"), (guards.before_worker, ELSEWHERE, "exited")],
)
def test_a_container_that_is_left_is_not_removed(guard, address, status, docker):
    """A node-ray in any state is refused, and the message names inv cleanup."""
    docker.containers = [Container(status=status)]
    said = _refused(guard, AT_HOME, HEAD_NODE_IP=address)
    assert "A node-ray is here already" in said and status in said and "inv cleanup" in said


@pytest.mark.parametrize("name", ["node-ray", "node-17"])
def test_a_container_of_the_article_is_refused_too(name, docker):
    """The article's containers hold the same port and the same GPU. A person decides whether their run is over."""
    docker.containers = [Container(name=name, status="exited")]
    assert f"A {name} is here already (exited" in _refused(guards.before_head, AT_HOME, HEAD_NODE_IP=HERE)


NGC = "nvcr.io/nvidia/vllm:25.11-py3"


@pytest.mark.parametrize(
    ("shell", "remedy"),
    [
        ({}, "local/vllm-ray:26.05.post1 (default). Type: inv build-image"),
        ({"VLLM_IMAGE": "mine:1", "TAG": "mine:1"}, "mine:1 (shell). Type: inv build-image"),
        ({"VLLM_IMAGE": NGC}, f"{NGC} (shell). Type: docker pull {NGC}"),
        (
            {"VLLM_IMAGE": "local/a:2"},
            "local/a:2 (shell). Type: inv build-image --base-image BASE --tag local/a:2; then set VLLM_IMAGE=local/a:2",
        ),
    ],
)
def test_a_missing_image_is_named(shell, remedy, docker):
    """The remedy leads to the image that was asked for, and `build-image` alone makes only what it names itself."""
    docker.labels = None
    said = _refused(guards.before_head, AT_HOME, HEAD_NODE_IP=HERE, **shell)
    assert said == f"Docker has no image {remedy}"


@pytest.mark.parametrize(
    ("ray", "token", "said"),
    [
        ("", False, "has no Ray. Type: inv build-image --base-image nvcr.io/nvidia/vllm:25.11-py3 --tag local/"),
        ("2.51.0", True, "is 2.51.0, and tokens came with 2.52. Go on without the token"),
        ("2.53.0", True, "Ray cannot listen"),
        ("2.40.0", False, "Ray cannot listen"),
    ],
)
def test_an_image_without_our_labels_is_asked_for_its_ray(ray, token, said, docker, ray_port, tmp_path, operator):
    """An image of NGC's with Ray in it is taken. One without Ray becomes the base of an image with Ray."""
    docker.labels = {}
    operator.setattr(image, "run", lambda command, capture, seconds: ray if NGC in command.words else "asked another")
    if token:
        (tmp_path / "token").write_text("0a")
    shell = {"HEAD_NODE_IP": HERE, "VLLM_IMAGE": NGC, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert said in _refused(guards.before_head, AT_HOME, **shell)


@pytest.mark.parametrize("version", ["2.51.1", "unknown"])
def test_an_image_whose_ray_knows_no_tokens_is_refused(version, docker, tmp_path):
    """A Ray before 2.52 would ignore the token, and the operator would believe that its port is closed."""
    docker.labels = {"ray.version": version}
    (tmp_path / "token").write_text("0a")
    said = _refused(guards.before_head, AT_HOME, HEAD_NODE_IP=HERE, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert f"is {version}, and tokens came with 2.52" in said and "inv build-image" in said


@pytest.mark.parametrize(
    ("info", "warns"),
    [
        ({"CgroupDriver": "systemd"}, True),
        ({"CgroupDriver": "systemd", "DiscoveredDevices": [], "ServerVersion": "29.2.1"}, True),
        ({"CgroupDriver": "systemd", "DiscoveredDevices": CDI, "ServerVersion": "28.5.1"}, True),
        ({"CgroupDriver": "systemd", "DiscoveredDevices": CDI, "ServerVersion": "29.2.1"}, False),
        ({"CgroupDriver": "cgroupfs"}, False),
    ],
)
def test_a_gpu_that_a_daemon_reload_would_take_is_said_beforehand(info, warns, docker, ray_port, silent, capfd):
    """Head and worker warn where systemd holds the devices of containers, and `--gpus` does not go by CDI."""
    docker.info = info
    _refused(guards.before_head, AT_HOME, HEAD_NODE_IP=HERE)
    _refused(guards.before_worker, AT_HOME, HEAD_NODE_IP=ELSEWHERE, WAIT_HEAD_S="0")
    said = capfd.readouterr().err
    assert said.count("which unattended upgrades run too") == 2 * warns
    assert said.count("Warning: `systemctl daemon-reload`") == said.count("native.cgroupdriver=cgroupfs") == 2 * warns


def test_a_held_ray_port_is_named_with_its_holder(docker, ray_port):
    """If Ray's port is taken, the program that holds it is named. Ray would fail later, with another message."""
    said = _refused(guards.before_head, AT_HOME, HEAD_NODE_IP=HERE)
    assert f"Ray cannot listen: port {ray_port} is held by " in said and "inv cleanup" in said


KEYS = {"HF_TOKEN": "hf_x", "VLLM_API_KEY": "sk_x", "HEAD_NODE_IP": HERE, "HOST": HERE, "PORT": "1"}


def _launch(model="nemotron", **shell) -> str:
    return _refused(guards.before_launch, model=model, **(KEYS | shell))


EARLIER = Container(**NEMOTRON)
EARLIER.attrs["Config"]["Env"].remove("NODE_RAY_REPOSITORY=0a")


@pytest.mark.parametrize(
    ("container", "said"),
    [
        (
            None,
            "No node-ray runs on this node. Type: "
            f"ENV_FILE= HEAD_NODE_IP={HERE} HOST={HERE} PORT=1 inv head --model nemotron",
        ),
        (Container(status="exited"), "node-ray is here but exited. Type: inv cleanup"),
        (
            Container(VLLM_HOST_IP="10.0.0.2"),
            f"This node is a worker (10.0.0.2). Type the same command on the head, {HERE}.",
        ),
        (EARLIER, "An earlier version of this repository started the containers. Type: inv down"),
        (Container(serving=True, **NEMOTRON), "A server runs in this container already. Type: inv stop"),
    ],
    ids=["none", "exited", "worker", "earlier", "serving"],
)
def test_launch_without_a_head_that_is_ready(container, said, docker):
    """Launch is refused before the server takes memory, and the message has the next command."""
    docker.containers = [container] if container else []
    assert said in _launch()


@pytest.mark.parametrize(("model", "names"), [("nemotron", "HF_TOKEN and VLLM_API_KEY"), ("qwen-30b", "VLLM_API_KEY")])
def test_launch_without_the_secrets_of_the_profile(model, names, docker):
    """Each required secret that is unset or empty is named."""
    docker.containers = [Container(**NEMOTRON)]
    assert _launch(model, HF_TOKEN="", VLLM_API_KEY="").startswith(f"{names} must be set for {model}")


def test_launch_with_a_variable_of_the_profile_emptied(docker):
    """A rank without the variable would choose other kernels, so launch is refused. An operator's own name may be."""
    docker.containers = [Container(**NEMOTRON)]
    said = _launch(VLLM_NVFP4_GEMM_BACKEND="", VLLM_FORWARD_VARS="MINE")
    assert said.startswith("VLLM_NVFP4_GEMM_BACKEND must not be empty for nemotron: its profile lists it")
    docker.containers = []
    assert "must not be empty" not in _launch(VLLM_FORWARD_VARS="MINE", MINE="")


def test_launch_where_the_containers_started_without_the_models_variables(docker):
    """The message tells missing from different values, and has both lines that bring the nodes up again."""
    env = NEMOTRON | {"VLLM_NVFP4_GEMM_BACKEND": "cutlass"}
    del env["VLLM_ALLOW_LONG_MAX_MODEL_LEN"]
    docker.containers = [Container(**env)]
    said = _launch()
    assert "VLLM_NVFP4_GEMM_BACKEND: has 'cutlass', needs 'marlin'" in said
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN: missing, needs '1'" in said
    assert "TRTLLM" not in said.upper()
    assert "inv head --model nemotron" in said and "inv worker --model nemotron" in said


def test_launch_on_a_taken_port(docker, ray_port):
    """Launch is refused if the API's port is taken, on the address where the API would listen."""
    docker.containers = [Container(**NEMOTRON)]
    assert f"The API cannot listen: port {ray_port} is held by " in _launch(PORT=str(ray_port))


def test_launch_without_an_answer_from_ray(docker, operator):
    """Launch is refused at once if Ray's port does not answer."""
    docker.containers = [Container(**NEMOTRON)]
    with socket.create_server((HERE, 0)) as closed:
        port = closed.getsockname()[1]
    operator.setattr(guards, "RAY_PORT", port)
    assert f"Ray does not answer at {HERE}:{port}" in _launch(PORT=str(port))


def test_launch_where_nothing_is_wrong(docker, ray_port):
    """The guard returns the head's container."""
    docker.containers = [Container(**NEMOTRON)]
    with socket.create_server((HERE, 0)) as closed:
        port = closed.getsockname()[1]
    settings = load_settings(find_model("nemotron"), {}, {"ENV_FILE": "", **KEYS, "PORT": str(port)})
    assert guards.before_launch(settings) is docker.containers[0]


def test_cleanup_without_a_terminal_removes_nothing(docker, capfd, operator):
    """Without a terminal nothing is removed. The message shows what is left, and names --yes."""
    docker.containers = [Container(name="node-17", status="exited")]
    operator.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    operator.setattr(cleanup, "run", lambda command, whole: pytest.fail("removed"))
    assert "inv cleanup --yes" in _refused(cleanup.clean_up, False)
    assert "node-17: exited" in capfd.readouterr().err


def test_cleanup_says_what_to_do_about_another_process(docker, ray_port, capfd, operator):
    """A port may be held by a process that is in no container of ours. Removing containers would not free it."""
    operator.setattr(cleanup, "RAY_PORT", ray_port)
    cleanup.clean_up(load_settings(None, {}, {"ENV_FILE": "", "PORT": "1"}), False)
    said = capfd.readouterr().err
    assert f"Ray: port {ray_port} is held by " in said and "Nothing to remove." in said
    assert (
        f"No container of this project holds it. To see what does: systemctl status {os.getpid()}; to end it: " in said
    )
    docker.containers = [Container()]
    operator.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: "n"))
    _refused(cleanup.clean_up, False)
    assert "No container of this project" not in capfd.readouterr().err
    operator.setattr(cleanup, "run", lambda command, whole: None)
    cleanup.clean_up(load_settings(None, {}, {"ENV_FILE": "", "PORT": "1"}), True)
    assert capfd.readouterr().err.count("No container of this project") == 1  # once the containers are gone


@pytest.mark.parametrize(("typed", "removed"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("", False)])
def test_cleanup_asks(typed, removed, docker, capfd, operator):
    """Cleanup removes containers only after y or yes."""
    docker.containers = [Container(), Container(name="node-17")]
    ran = []
    operator.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: typed))
    operator.setattr(cleanup, "run", lambda command, whole: ran.append(command.words))
    if removed:
        cleanup.clean_up(load_settings(None, {}, {"ENV_FILE": ""}), False)
    else:
        assert "Nothing was removed." in _refused(cleanup.clean_up, False)
    assert ran == ([["docker", "rm", "--force", "node-ray", "node-17"]] if removed else [])


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (engine.our_containers, APIError("500 Server Error")),
        (engine.engine_info, APIError("500 Server Error")),
        (lambda: engine.image_labels("an image"), JSONDecodeError("Expecting value", "", 0)),
        (engine.our_containers, TypeError("'NoneType' object is not subscriptable")),
    ],
    ids=["containers", "info", "labels", "another form"],
)
def test_an_error_of_docker_is_a_sentence(asked, error, operator):
    """An Engine that answers with an error ends in one sentence with what to type."""

    def fails(*_, **__):
        raise error

    ill = SimpleNamespace(list=fails, get=fails)
    operator.setattr(engine, "client", lambda *_: SimpleNamespace(containers=ill, images=ill, info=fails))
    with pytest.raises(Exit, match=r"^Docker could not .*\. Type: docker ps$"):
        asked()


@pytest.mark.parametrize("text", ["[]", "null", '{"currentContext": 5}'])
def test_a_configuration_of_docker_in_another_form_is_named(text, operator, tmp_path):
    """The cause names the folder of the file, and not only an attribute that a list lacks."""
    operator.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Exit, match=r"^Docker cannot be reached: a file in ~/\.docker .*\. Type: docker ps$"):
        engine.client.__wrapped__()


def test_a_wrong_address_of_docker_is_a_sentence(operator):
    """A port out of range ends in a sentence, not in a traceback."""
    operator.setenv("DOCKER_HOST", "tcp://127.0.0.1:99999")
    with pytest.raises(Exit, match=r"^Docker cannot be reached at tcp://127\.0\.0\.1:99999 \(DOCKER_HOST\): "):
        engine.client.__wrapped__()


def test_the_printed_lines_copy_the_token(operator, tmp_path, capfd):
    """Pasted into bash, a line copies the token to a worker, for its owner only. Without workers there is no line."""
    place = tmp_path / "a b/tok'$x"
    (tmp_path / "ssh").write_text(f'#!/bin/sh\nshift; cd {tmp_path}; exec sh -c "$(echo "$*" | sed s,/a,/there/a,g)"\n')
    (tmp_path / "ssh").chmod(0o755)
    operator.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shell = {"RAY_AUTH_TOKEN_PATH": str(place), "ENV_FILE": ""}
    token.make_token(load_settings(shell=shell | {"WORKER_HOSTS": "spark-2"}))
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("  ssh spark-2 ")
    subprocess.run(["bash", "-c", line], check=True)
    copied = tmp_path / "there/a b/tok'$x"
    assert copied.read_text() == place.read_text() and copied.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Exit, match=r"^Nothing was made") as again:
        token.make_token(load_settings(shell=shell | {"WORKER_HOSTS": "spark-2"}))
    assert line in capfd.readouterr().err.splitlines()
    assert again.value.message.endswith(f"rm {shlex.quote(str(place))}")
    with pytest.raises(FileExistsError, match="tok"):
        token.make_token(load_settings(shell=shell | {"RAY_AUTH_TOKEN_PATH": f"{place}/token"}))
    place.unlink()
    token.make_token(load_settings(shell=shell | {"WORKER_HOSTS": ""}))
    assert "ssh" not in capfd.readouterr().err


def test_a_corrupt_context_of_docker_is_a_sentence(operator, tmp_path):
    """A context whose file is corrupt ends in a sentence, not in a traceback."""
    operator.setenv("DOCKER_CONFIG", str(tmp_path))
    operator.setenv("DOCKER_CONTEXT", "sparks")
    folder = tmp_path / "contexts/meta" / hashlib.sha256(b"sparks").hexdigest()
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Exit, match=r"^Docker cannot be reached: .*sparks.*\. Type: docker ps$"):
        engine.client.__wrapped__()


def test_an_age_in_words():
    """Minutes up to two hours, hours up to two days, then days."""
    assert [engine.age_in_words(seconds) for seconds in (59, 7199, 7200, 172800)] == ["0 min", "119 min", "2 h", "2 d"]
