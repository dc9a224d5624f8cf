"""The server as the host sees it: what was launched, whether it runs, and who started its container."""

from types import SimpleNamespace

import pytest

from cluster.served import Served, ask_server, is_earlier, server_runs

LINE = "vllm serve org/model --served-model-name name --port 8001 --tensor-parallel-size 2 --max-model-len 131072"


def served(line):
    """A server with this command line."""
    return Served(True, 7, line.split())


def test_the_line_that_runs_is_read():
    """Model, context, ranks and address come from the command line of the running server."""
    found = served(LINE + " --host 10.0.0.1")
    assert (found.model, found.context, found.world_size) == ("name", 131072, 2)
    assert found.url == "http://10.0.0.1:8001"


def test_a_line_may_leave_everything_to_vllm():
    """Without options vLLM's defaults count. A server that listens on all addresses is asked on its own host."""
    found = served("vllm serve org/model")
    assert (found.model, found.context, found.world_size) == ("org/model", 0, 1)
    assert found.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize("words", ["--max_model_len 7", "--max-model-len=7", "--max-model-len 9 --max-model-len 7"])
def test_an_option_is_read_as_vllm_reads_it(words):
    """Underscores and an equals sign are understood, and the last of two options counts."""
    assert served(f"vllm serve org/model {words} --host ::1").context == 7
    assert served(f"vllm serve org/model {words} --host ::1").url == "http://[::1]:8000"


@pytest.fixture
def head(operator, tmp_path):
    """The head's container, in which serve.sh says what the file `says` holds."""
    (tmp_path / "docker").write_text(f"#!/bin/sh\n/bin/cat >/dev/null\nexec /bin/cat {tmp_path}/says\n")
    (tmp_path / "docker").chmod(0o755)
    operator.setenv("PATH", str(tmp_path))
    return SimpleNamespace(name="node-ray", says=(tmp_path / "says").write_text)


@pytest.mark.parametrize(
    ("says", "runs", "server"),
    [
        ("", False, None),
        ("0\n1700000000\nvllm\nserve\nm\n", True, Served(True, 1700000000, ("vllm", "serve", "m"))),
        ("1\n1700000000\nvllm\nserve\nm\n", False, Served(False, 1700000000, ("vllm", "serve", "m"))),
        ("2\n1700000000\nvllm\nserve\nm\n", True, Served(False, 1700000000, ("vllm", "serve", "m"))),
        ("0\n1700000000\n", True, None),
        ("1\n1700000000\n", False, None),
    ],
    ids=["never launched", "runs", "crashed", "API server gone", "is being stopped", "was stopped"],
)
def test_the_state_of_the_server(says, runs, server, head):
    """After `inv stop` there is no server to judge, even if its processes still hold the GPUs."""
    head.says(says)
    assert (server_runs(head), ask_server(head)) == (runs, server)


def test_a_container_of_an_earlier_version_is_recognized():
    """Such a container lacks the digest of the repository."""
    assert is_earlier(SimpleNamespace(attrs={"Config": {"Env": ["VLLM_HOST_IP=10.0.0.1"]}}))
    assert not is_earlier(SimpleNamespace(attrs={"Config": {"Env": ["NODE_RAY_REPOSITORY=0a"]}}))
