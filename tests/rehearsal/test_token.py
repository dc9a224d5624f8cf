"""Ray's token on stand-in Sparks: with it the nodes join and work. A client without it is refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from operating import containers, inv
from test_nodes_disagree import ALLOW, check, joined

from rehearsal.flow import IMAGE

pytestmark = pytest.mark.rehearsal
ASK = "import ray; ray.init(address='10.0.0.1:6379', log_to_driver=False); print(len(ray.nodes()), 'nodes')"


@pytest.fixture
def token(sparks, tmp_path):
    """A token that `inv token` made, and a copy for the worker: for each node the environment that names its file."""
    files = [tmp_path / name / "auth_token" for name in ("head", "worker")]
    made = inv(sparks[0], "token", RAY_AUTH_TOKEN_PATH=str(files[0]))
    assert made.returncode == 0 and "  ssh 10.0.0.2 'umask 077; " in made.stderr, made.stderr
    assert files[0].stat().st_mode & 0o777 == 0o600 and files[0].read_text() not in made.stderr
    files[1].parent.mkdir()
    files[1].write_text(files[0].read_text())
    return [{"RAY_AUTH_TOKEN_PATH": str(file)} for file in files]


def client(host, **env) -> str:
    """The output of a Ray client in another container on the host."""
    names = [word for name, value in env.items() for word in ("-e", f"{name}={value}")]
    words = ["docker", "run", "--rm", "--network", "host", *names, "--entrypoint", "timeout", "rehearsal/vllm-ray"]
    done = host.run(*words, "60", "python3", "-c", ASK, timeout=90)
    return done.stdout + done.stderr


def test_with_the_token_the_nodes_work_and_other_clients_are_refused(sparks, terminal, token):
    """Both nodes join and agree. No environment has the token. Clients without it, or with another, are refused."""
    terminal(sparks[0], "head", "--model", "rehearsal", **token[0]).until("Ray runtime started")
    terminal(sparks[1], "worker", "--model", "rehearsal", **token[1])
    assert joined(sparks[0])
    done = check(sparks[0])
    assert done.returncode == 0, done.stderr
    secret = (sparks[0].run("cat", token[0]["RAY_AUTH_TOKEN_PATH"])).stdout
    assert secret and secret not in sparks[0].run("docker", "inspect", "node-ray").stdout
    others = ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"})
    with ThreadPoolExecutor() as pool:
        told = list(pool.map(lambda env: client(sparks[1], **env), others))
    for said in told:
        assert "nodes" not in said.splitlines()[-1] and "oken" in said
    inside = sparks[1].run("docker", "exec", "node-ray", "python3", "-c", ASK, timeout=90)
    assert "2 nodes" in inside.stdout, inside.stderr


def refused(host, sentence, *flags, **env) -> None:
    """Type `inv worker`, which ends with the sentence, without a traceback or a container. Ray asks for 20 s before."""
    worker = inv(host, "worker", "--model", "rehearsal", *flags, **env)
    assert worker.returncode == 1 and containers(host) == ""
    said = worker.stdout or worker.stderr  # in the foreground the container's own output
    assert sentence in said.strip().splitlines()[-1] and "Traceback" not in said, said


def test_a_worker_without_it_is_refused(sparks, terminal, token, tmp_path):
    """The last line names what differs, and the head's task that prints the copy line. Ray keeps only the head."""
    terminal(sparks[0], "head", "--model", "rehearsal", **token[0]).until("Ray runtime started")
    tells = "The head (10.0.0.1) has a token, and this node has {}. Type on the head: inv token; then the line "
    refused(sparks[1], tells.format("none"), RAY_AUTH_TOKEN_PATH="/none")
    (tmp_path / "other").write_text("another")
    refused(sparks[1], tells.format("another"), "--detach", RAY_AUTH_TOKEN_PATH=str(tmp_path / "other"))
    found = check(sparks[0], "--allow", f"{ALLOW},nodes")
    assert "10.0.0.2" not in found.stdout


def test_a_worker_with_another_ray_is_refused(sparks, terminal):
    """The last line has the versions of both images, and the line that copies the head's image."""
    there = sparks[1]
    own = there.run("docker", "image", "inspect", "--format", "{{.Id}}", IMAGE).stdout.strip()
    change = (
        """sed -i 's/^version = .*/version = "2.58.0"/' $(python3 -c 'import ray._version as v; print(v.__file__)')"""
    )
    made = there.run(
        "docker", "build", "--network", "host", "--tag", IMAGE, "-", input=f"FROM {own}\nRUN {change}\n", stdin=None
    )
    assert made.returncode == 0, made.stderr
    try:
        terminal(sparks[0], "head", "--model", "rehearsal").until("Ray runtime started")
        sentence = (
            f"has Ray 2.58.0 and Python 3.11.2. Type on the head: VLLM_IMAGE={IMAGE} inv ship-image --to 10.0.0.2."
        )
        refused(there, sentence)
    finally:
        there.run("docker", "tag", own, IMAGE)


def test_a_second_token_is_not_made_over_the_first(sparks, token):
    """Every node would need the new token, so a person has to remove the old token first."""
    again = inv(sparks[0], "token", **token[0])
    assert again.returncode != 0 and "is there already" in again.stderr
    assert "  ssh 10.0.0.2 'umask 077; " in again.stderr


def test_without_a_token_the_head_says_what_is_open(sparks, terminal):
    """The head warns of the open port, and names the task that makes a token."""
    head = terminal(sparks[0], "head")
    head.until("Ray runtime started")
    assert "Ray runs code for anyone" in head.read() and "inv token" in head.read()
