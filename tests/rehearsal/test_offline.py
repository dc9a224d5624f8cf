"""The rule `weights` on two stand-in Sparks. test_first_token.py proves that a whole cache asks the hub nothing."""

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


def test_vllm_downloads_what_is_missing_and_damage_is_refused(hub, sparks, shells):
    """`check` warns of the download, and the load shows its bytes. A cache that is damaged is refused before a load."""
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
    seen = wait(lambda: "vLLM downloads the weights: 10.0.0." in loading(), 120, pause=0.5)
    assert seen, inv(sparks[0], "logs").stdout[:6000]
    assert hub.requests("GET /stand-in"), "without a whole cache the ranks ask the hub"
    hub.order()
    assert inv(sparks[0], "stop").returncode == 0

    done = inv(sparks[0], "weights", "--model", "rehearsal", **shell)
    assert done.returncode == 0, done.stderr
    whole = json.loads(inv(sparks[0], "check", "--model", "rehearsal", "--json", **shell).stdout)
    assert len({node["weights"]["revision"] for node in whole["nodes"]}) == 1
    assert "weights" not in {one["rule"] for one in whole["findings"]}
    shard = next((sparks[1].cache / "huggingface/hub").rglob("snapshots/*/model-00002-of-00003.safetensors"))
    shard.unlink()
    refused = inv(sparks[0], "check", "--model", "rehearsal", "--allow", ALLOW, **shell)
    assert refused.returncode != 0
    assert "REFUSED weights: 10.0.0.2: model-00002-of-00003.safetensors is missing. Type: " in refused.stderr
