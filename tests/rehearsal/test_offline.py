"""Real weights on two stand-in Sparks: vLLM downloads them, and asks no hub once every node has them."""

import json
from collections.abc import Iterator

import pytest
from operating import KEY, inv

from rehearsal.flow import ALLOW
from rehearsal.shell import wait
from tests.rehearsal.hub import NAME, Hub

pytestmark = pytest.mark.rehearsal
SHELL = {"MODEL_CKPT": NAME, "HF_HUB_OFFLINE": "0", "SERVE_EXTRA": "--load-format auto", "VLLM_API_KEY": KEY}
LAUNCH = ("launch", "--model", "rehearsal", "--allow", ALLOW, "--detach")


@pytest.fixture(scope="module")
def hub(rig, tmp_path_factory) -> Iterator[Hub]:
    made = Hub(rig.hosts[0], tmp_path_factory.mktemp("hub"))
    yield made
    made.stop()


def test_a_whole_cache_asks_the_hub_nothing(hub, sparks, shells, terminal):
    """First vLLM downloads on both nodes, and `check` warned of it. With the same weights it then starts offline."""
    shell = SHELL | {"HF_ENDPOINT": hub.url, "WORKER_HOSTS": "spark-2"}
    for role, host in zip(("head", "worker"), sparks, strict=True):
        done = inv(host, role, "--detach", "--model", "rehearsal", **shell)
        assert done.returncode == 0, done.stderr
    assert wait(lambda: "Ray: 2 nodes" in inv(sparks[0], "health").stderr, 60, pause=1)
    hub.order(rate=20_000)
    hub.forget()
    first = inv(sparks[0], *LAUNCH, **shell)
    assert first.returncode == 0, first.stderr
    assert "WARNING weights: vLLM will download" in first.stderr and "10.0.0.1, 10.0.0.2" in first.stderr
    loading = lambda: inv(sparks[0], "health", **shell).stderr  # noqa: E731
    assert wait(lambda: "vLLM downloads the weights: 10.0.0." in loading(), 120, pause=0.5), inv(
        sparks[0], "logs"
    ).stdout
    hub.order()
    assert wait(lambda: inv(sparks[0], "health", **shell).returncode == 0, 240, pause=2), inv(sparks[0], "logs").stdout
    asked = {line.split()[-1] for line in hub.requests("GET")}
    assert asked and inv(sparks[0], "stop").returncode == 0

    for host in sparks:  # the ranks have taken what they load; the rest of the files is fetched and shipped
        assert (host.cache / "huggingface/hub/models--stand-in--tiny").is_dir()
    done = inv(sparks[0], "weights", "--model", "rehearsal", **shell)
    assert done.returncode == 0, done.stderr
    hub.forget()
    again = inv(sparks[0], *LAUNCH, **shell)
    assert again.returncode == 0 and "-e HF_HUB_OFFLINE=1" in again.stderr and "WARNING weights" not in again.stderr
    assert wait(lambda: inv(sparks[0], "health", **shell).returncode == 0, 240, pause=2), inv(sparks[0], "logs").stdout
    assert hub.requests() == []
    facts = json.loads(inv(sparks[0], "check", "--model", "rehearsal", "--json", **shell).stdout)["nodes"]
    assert len({node["weights"]["revision"] for node in facts}) == 1
    shard = next((sparks[1].cache / "huggingface/hub").rglob("snapshots/*/model-00002-of-00003.safetensors"))
    shard.unlink()
    refused = inv(sparks[0], "check", "--model", "rehearsal", "--allow", ALLOW, **shell)
    assert refused.returncode != 0
    assert "REFUSED weights: 10.0.0.2: model-00002-of-00003.safetensors is missing. Type: " in refused.stderr
