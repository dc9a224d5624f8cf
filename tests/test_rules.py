"""Every disagreement of the nodes is found by a rule of its own. A fact that nobody could ask never passes for fine."""

import copy
import runpy
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import agreement, options
from cluster.agreement import Node, find_disagreements
from cluster.check import RULES
from cluster.models import find_model
from cluster.repository import ROOT
from cluster.settings import load_settings

ENV = {
    "VLLM_HOST_IP": "10.0.0.1",
    "TP_SOCKET_IFNAME": "enp1s0f1np1",
    "NCCL_SOCKET_IFNAME": "enp1s0f0np0,enp1s0f1np1",
    "NCCL_IB_HCA": "rocep1s0f0,rocep1s0f1",
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
# The two QSFP ports of a Spark, each shown as two PCIe functions, as an owner's ibdev2netdev and show_gids have them.
LINKS = {
    "rocep1s0f0": ("enp1s0f0np0", "10.0.1.0/24"),
    "rocep1s0f1": ("enp1s0f1np1", "10.0.0.0/24"),
}
GIDS = {
    "0": ["fe80:0000:0000:0000:4cbb:47ff:fe2d:0001", "IB/RoCE v1"],
    "1": ["fe80:0000:0000:0000:4cbb:47ff:fe2d:0001", "RoCE v2"],
    "2": ["0000:0000:0000:0000:0000:ffff:0a00:0001", "IB/RoCE v1"],
    "3": ["0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2"],
}
DEVICES = {
    name: {"netdev": netdev, "network": network, "speed": 200000, "gids": GIDS}
    for name, (netdev, network) in LINKS.items()
}
FACTS = {
    "weights": None,
    "host": "boot/1",
    "gpus": [{"name": "NVIDIA GB10", "memory": None, "driver": "580.95.05"}],
    "wrapper": {"sha256": "a", "words": "docker run --rm image:1"},
    "repository": "0123456789abcdef",
    "image": "sha256:aa base@sha256:bb",
    "environment": ENV,
    "token": None,
    "python": "3.12.3",
    "ray": "2.60.0",
    "vllm": "0.21.0",
    "torch": "2.11.0",
    "infiniband": ["uverbs0"],
    "memlock": -1,
    "ipc_lock": True,
    "network": "10.0.0.0/24",
    "links": {name: {"state": "up", "mtu": 9000} for name in ("enp1s0f0np0", "enp1s0f1np1")},
    "own_variables": ["NCCL_IB_HCA"],
    "devices": DEVICES,
    "kernel": "6.14.0-1013-nvidia",
    "driver": "580.95.05",
    "cgroup driver": "cgroupfs",
}

NODE_2 = FACTS | {"host": "boot/2"}


@pytest.fixture
def found(operator):
    """Finds the disagreements of a head as it should be and a worker with some facts changed."""
    operator.setattr(agreement, "repository_digest", lambda: FACTS["repository"])

    def ask(ray_gpus=1, address="10.0.0.2", **changed):
        facts = copy.deepcopy(FACTS) | {"host": "boot/2"} | changed
        nodes = [Node("10.0.0.1", "spark-1", 1, copy.deepcopy(FACTS)), Node(address, "spark-2", ray_gpus, facts)]
        return find_disagreements(nodes, load_settings(find_model("nemotron"), shell={"ENV_FILE": ""}))

    return ask


def test_an_image_that_nobody_here_built_is_a_warning(found, operator):
    """Without the label of its base an image may be anything. `check` says so and refuses nothing."""
    operator.setitem(FACTS, "image", "sha256:aa ")
    (warning,) = found()
    assert (warning.rule, warning.refuses) == (
        "image",
        False,
    ) and "The image of 10.0.0.1 has no label of its base, so two" in warning.text


def test_nodes_that_agree_have_no_finding(found):
    """Equal facts on two nodes bring no finding."""
    assert found() == []


@pytest.mark.parametrize(
    ("rule", "words", "changed"),
    [
        ("nodes", "needs 2 nodes with a GPU", {"ray_gpus": 0}),
        ("hosts", "10.0.0.2 was started on the machine of 10.0.0.1 (spark-1)", {"host": "boot/1"}),
        ("gpus", "10.0.0.2 has 0 GPUs", {"gpus": []}),
        ("wrapper", "10.0.0.2 alone has --privileged", {"wrapper": {"sha256": "b", "words": "docker --privileged"}}),
        ("variables", "10.0.0.1 has marlin, 10.0.0.2 has cutlass", {
            "environment": ENV | {"VLLM_NVFP4_GEMM_BACKEND": "cutlass"}}),
        ("variables", "10.0.0.2 has none", {"environment": {
            name: value for name, value in ENV.items() if name != "VLLM_ALLOW_LONG_MAX_MODEL_LEN"}}),
        ("image", "The images differ: 10.0.0.1 runs sha256:aa", {"image": "sha256:cc base@sha256:dd"}),
        ("versions", "ray is 2.60.0 on 10.0.0.1 and 2.59.0 on 10.0.0.2", {"ray": "2.59.0"}),
        ("rdma", "no device in /dev/infiniband", {"infiniband": []}),
        ("rdma", "IPC_LOCK", {"ipc_lock": False}),
        ("memlock", "may lock 8192 KiB", {"memlock": 8 * 2**20}),
        ("network", "10.0.0.2 in 10.0.9.0/24", {"network": "10.0.9.0/24"}),
        ("links", "10.0.0.2: enp1s0f0np0 is down", {
            "links": FACTS["links"] | {"enp1s0f0np0": {"state": "down", "mtu": 9000}}}),
        ("mtu", "of 10.0.0.2 has 1500", {"links": {name: {"state": "up", "mtu": 1500} for name in FACTS["links"]}}),
        ("mtu", "enp1s0f0np0 of 10.0.0.1 has 9000, enp1s0f0np0 of 10.0.0.2 has 1500", {
            "links": FACTS["links"] | {"enp1s0f0np0": {"state": "up", "mtu": 1500}}}),
        ("token", "10.0.0.1 has none, 10.0.0.2 has hmac:1", {"token": "hmac:1"}),
        ("subnets", "rocep1s0f0 (enp1s0f0np0, 10.0.1.0/24) of 10.0.0.1 with rocep1s0f0 (enp1s0f0np0, None) of", {
            "devices": DEVICES | {"rocep1s0f0": DEVICES["rocep1s0f0"] | {"network": None}}}),
        ("subnets", "of 10.0.0.1 with rocep1s0f0 (enp1s0f0np0, 10.0.0.0/24) of 10.0.0.2", {  # the cables are crossed
            "devices": dict(zip(DEVICES, reversed(DEVICES.values()), strict=True)) | {
                "rocep1s0f0": DEVICES["rocep1s0f0"] | {"network": "10.0.0.0/24"}}}),
    ],
)  # fmt: skip
def test_each_disagreement_is_refused_by_its_rule(found, rule, words, changed):
    """Exactly one rule finds the disagreement. The text names both values, and --allow takes the rule's name."""
    said = [one for one in found(**changed) if one.refuses]
    assert {one.rule for one in said} == {rule} and rule in RULES
    assert words in said[0].text


def test_an_interface_of_a_device_is_judged_even_if_no_socket_uses_it(found):
    """The twin of a port has no IPv4 address, so it is in no list of sockets. Its MTU and state count all the same."""
    twin = {"rocep1s0f0": DEVICES["rocep1s0f0"] | {"netdev": "enP2p1s0f0np0"}}
    links = FACTS["links"] | {"enP2p1s0f0np0": {"state": "down", "mtu": 1500}}
    said = found(devices=DEVICES | twin, links=links)
    assert {(one.rule, one.refuses) for one in said} == {("links", True), ("mtu", True), ("mtu", False)}
    assert all("enP2p1s0f0np0" in one.text for one in said if one.rule == "links" or not one.refuses)


def test_a_small_mtu_on_both_nodes_is_a_warning(found, operator):
    """Nodes that agree on 1500 lose most of the rate. The control link may have what it has."""
    operator.setitem(FACTS["links"], "enp1s0f0np0", {"state": "up", "mtu": 1500})
    operator.setitem(ENV, "TP_SOCKET_IFNAME", "lan")
    operator.setitem(FACTS["links"], "lan", {"state": "up", "mtu": 1500})
    said = found()
    assert [(one.rule, one.refuses) for one in said] == [("mtu", False)] * 2
    assert "10.0.0.2: an MTU below 9000" in said[1].text and "enp1s0f0np0 has 1500. On" in said[1].text


def test_twins_without_an_address_on_both_nodes_are_fine(found, operator):
    """NCCL then takes each device's first GID, and both are of one type."""
    operator.setitem(DEVICES["rocep1s0f0"], "network", None)
    assert found() == []


@pytest.mark.parametrize(
    ("index", "table", "words"),
    [
        ("3", GIDS, None),
        ("3", {at: GIDS[at] for at in ("0", "1", "2")}, "10.0.0.2 rocep1s0f1 has none at 3"),
        ("3", GIDS | {"3": GIDS["2"], "4": GIDS["3"]}, "10.0.0.2 rocep1s0f1 has IB/RoCE v1 at 3"),
        ("5", GIDS | {"5": GIDS["3"]}, "10.0.0.1 rocep1s0f0 has none at 5"),
    ],
    ids=["there", "gone after a reboot", "moved to 4", "only there"],
)
def test_a_pinned_gid_must_be_on_every_device(found, operator, index, table, words):
    """A device without that GID, or with one of the other RoCE, is refused, and every device is named."""
    operator.setitem(ENV, "NCCL_IB_GID_INDEX", index)
    said = found(devices=DEVICES | {"rocep1s0f1": DEVICES["rocep1s0f1"] | {"gids": table}})
    assert [(one.rule, one.refuses) for one in said] == ([("gid", True)] if words else [])
    assert all(words in one.text for one in said)


@pytest.mark.parametrize("devices", [{}, {"unknown": "no answer"}])
def test_devices_that_a_container_does_not_see_are_a_warning(found, operator, devices):
    """Stand-in devices are not in /sys. Nothing is judged about them, and the operator is told."""
    operator.setitem(ENV, "NCCL_IB_GID_INDEX", "3")
    (said,) = found(devices=devices)
    assert (said.rule, said.refuses) == ("subnets", False) and "does not show rocep1s0f0, rocep1s0f1, so" in said.text


@pytest.mark.parametrize(
    ("fact", "value"), [("kernel", "6.14.0-1015-nvidia"), ("driver", "580.126"), ("cgroup driver", "systemd")]
)
def test_hosts_that_were_not_updated_alike_are_a_warning(found, fact, value):
    """The text has both values. A value that could not be asked is a warning too."""
    (said,) = found(**{fact: value})
    assert said.rule == "host-software" and not said.refuses and f"is {FACTS[fact]} on" in said.text
    assert value in said.text
    (said,) = found(**{fact: {"unknown": "it broke"}})
    assert said.rule == "host-software" and not said.refuses and "it broke" in said.text


def test_the_probe_reads_each_device_from_sys(operator, tmp_path):
    """An index without a GID is left out, and so are an address and a speed that the interface does not have."""
    device = tmp_path / "class/infiniband/rocep1s0f0"
    for path, text in {
        "device/net/no-such-link/mtu": "9000",
        "ports/1/gids/0": GIDS["0"][0],
        "ports/1/gids/3": GIDS["3"][0],
        "ports/1/gids/4": "0000:0000:0000:0000:0000:0000:0000:0000",
        "ports/1/gid_attrs/types/0": GIDS["0"][1],
        "ports/1/gid_attrs/types/3": GIDS["3"][1],
    }.items():
        (device / path).parent.mkdir(parents=True, exist_ok=True)
        (device / path).write_text(f"{text}\n")
    devices = runpy.run_path(str(ROOT / "cluster/inside/probe.py"))["devices"]
    operator.setitem(devices.__globals__, "SYS", str(tmp_path))
    told = devices()
    assert told.keys() == {"rocep1s0f0"} and told["rocep1s0f0"]["netdev"] == "no-such-link"
    assert told["rocep1s0f0"]["gids"] == {at: GIDS[at] for at in ("0", "3")}
    assert (told["rocep1s0f0"]["network"], told["rocep1s0f0"]["speed"]) == (None, 0)


WARNED = {"devices", "kernel", "driver", "cgroup driver"}


@pytest.mark.parametrize("fact", [*FACTS.keys() - {"own_variables", "repository"} - WARNED])
def test_an_unknown_fact_is_refused(found, fact):
    """A fact that the probe could not find out is refused, with the reason."""
    said = found(**{fact: {"unknown": "it broke"}})
    assert any(one.refuses and "it broke" in one.text for one in said)


def test_a_node_that_does_not_answer_at_all_is_refused(found):
    """Each rule that needs a fact of that node refuses."""
    assert all("silent" in one.text for one in found(**{fact: {"unknown": "silent"} for fact in FACTS}) if one.refuses)


def test_a_node_without_any_fact_is_one_finding(operator):
    """Ray lists a node that has ended for some seconds. The first line of Ray's reason is enough."""
    operator.setattr(agreement, "repository_digest", lambda: FACTS["repository"])
    silent = {"unknown": "ActorDiedError: The actor died.\n\tclass_name: Asker"}
    nodes = [Node("10.0.0.1", "spark-1", 1, FACTS), *(Node("10.0.0.2", "b", 1, facts) for facts in (silent, NODE_2))]
    (said,) = find_disagreements(nodes, load_settings(find_model("nemotron"), shell={"ENV_FILE": ""}))
    assert (said.rule, said.refuses) == ("nodes", True) and said.text == (
        "10.0.0.2 does not answer (ActorDiedError: The actor died.). If it was started again just now, wait 15 s and "
        "type the same line."
    )


def test_the_mtu_is_compared_device_by_device(found, operator):
    """Both nodes have 9000 and 1500, but the first devices, which NCCL connects, differ. So do the second ones."""
    small, large = {"state": "up", "mtu": 1500}, {"state": "up", "mtu": 9000}
    operator.setitem(FACTS["links"], "enp1s0f1np1", small)
    said = [one.text for one in found(links={"enp1s0f0np0": small, "enp1s0f1np1": large}) if one.refuses]
    assert ["enp1s0f0np0 of 10.0.0.1 has 9000, enp1s0f0np0 of 10.0.0.2 has 1500" in said[0], len(said)] == [True, 2]


LINE = "ENV_FILE= PORT=1 inv {} --model nemotron"


@pytest.mark.parametrize(
    ("typed", "anew", "missing"),
    [
        (
            "launch",
            f"Type here: inv down; then {LINE.format('head')}; then on every other node: "
            "PORT=1 inv worker --model nemotron",
            "Type on each that is missing: PORT=1 inv worker --model nemotron",
        ),
        ("up", f"Type here: inv down; then {LINE.format('up')}", f"Type on the head: {LINE.format('up')}"),
    ],
)
def test_a_remedy_has_whole_lines_and_the_place_of_each(typed, anew, missing, operator):
    """Head and worker have a line each. After an `up` the remedy is `up`, which belongs on the head."""
    operator.setattr(agreement, "repository_digest", lambda: FACTS["repository"])
    other = NODE_2 | {"environment": ENV | {"VLLM_NVFP4_GEMM_BACKEND": "cutlass"}}
    nodes = [Node("10.0.0.1", "spark-1", 1, FACTS), Node("10.0.0.2", "spark-2", 0, other)]
    settings = load_settings(find_model("nemotron"), shell={"ENV_FILE": "", "PORT": "1"})
    texts = {one.rule: one.text for one in find_disagreements(nodes, replace(settings, typed=(typed,)))}
    assert texts["variables"].endswith(anew) and texts["nodes"].endswith(missing)


def test_another_build_of_one_base_is_a_warning(found):
    """The warning has the line that copies the head's image."""
    (said,) = found(image="sha256:cc base@sha256:bb")
    assert not said.refuses and "inv ship-image --model nemotron" in said.text


def test_images_without_a_known_base_are_refused(found):
    """Two images without the label of their base are refused as if the bases differed."""
    (said,) = found(image="sha256:cc")
    assert said.rule == "image" and said.refuses


def test_two_workers_on_one_machine_are_found_too(operator):
    """A worker may share a machine with another worker, not only with the head."""
    operator.setattr(agreement, "repository_digest", lambda: FACTS["repository"])
    told = [("10.0.0.1", "boot/1"), ("10.0.0.2", "boot/2"), ("10.0.0.3", "boot/2")]
    nodes = [Node(at, f"spark-{at[-1]}", 1, copy.deepcopy(FACTS) | {"host": host}) for at, host in told]
    (said,) = find_disagreements(nodes, load_settings(find_model("nemotron"), shell={"ENV_FILE": ""}))
    assert said.rule == "hosts" and "10.0.0.3 was started on the machine of 10.0.0.2 (spark-2)" in said.text


@pytest.mark.parametrize(
    ("vllm", "kept", "refused"),
    [("0.21.0", [], 0), ("0.20.1", [], 1), ("0.20.1", ["NCCL_IB_HCA"], 0), ("dev", [], 1), ("dev", ["NCCL_IB_HCA"], 0)],
)
def test_lists_of_devices_that_differ(found, operator, vllm, kept, refused):
    """From vLLM 0.21 on each node keeps its own list. An earlier vLLM needs a file that names the variable."""
    operator.setitem(FACTS, "vllm", vllm)
    operator.setitem(FACTS, "own_variables", kept)
    devices = DEVICES | {"roceP2p1s0f0": DEVICES["rocep1s0f0"]}
    said = found(environment=ENV | {"NCCL_IB_HCA": "roceP2p1s0f0,rocep1s0f1"}, devices=devices)
    assert [one.rule for one in said] == ["nic-lists"] and said[0].refuses == bool(refused)


def test_tcp_on_purpose_needs_no_rdma(found, operator):
    """With NCCL_IB_DISABLE=1 no RDMA device is required."""
    operator.setitem(FACTS, "environment", ENV | {"NCCL_IB_DISABLE": "1"})
    assert found(infiniband=[], memlock=65536) == []


def test_a_node_over_tcp_uses_no_device(found):
    """A node without a list of devices does not count as a node with one device."""
    env = {name: value for name, value in ENV.items() if name != "NCCL_IB_HCA"} | {"NCCL_IB_DISABLE": "1"}
    (counted,) = [one for one in found(environment=env) if one.rule == "link-count"]
    assert counted.text.startswith("10.0.0.1 uses 2 RoCE devices, 10.0.0.2 0.")


@pytest.mark.parametrize(("digest", "told"), [("fedcba9876543210", "fedcba987654"), (None, "none")])
def test_a_node_of_another_version_is_a_warning(found, digest, told):
    """All that decides how the nodes run is compared by itself, so another version alone refuses nothing."""
    (said,) = found(repository=digest)
    assert said.rule == "wrapper" and not said.refuses
    assert f"started 10.0.0.2 ({told}). In both" in said.text and "inv down; then ENV_FILE= inv up" in said.text


def test_a_checkout_that_has_changed_since_the_start_is_a_warning(found, operator):
    """The containers keep what they were started with, so every node is named."""
    operator.setattr(agreement, "repository_digest", lambda: "fedcba9876543210")
    (said,) = found()
    assert "Another version than this checkout (sha256 fedcba987654) started" in said.text
    assert "10.0.0.1 (0123456789ab), 10.0.0.2 (0123456789ab)" in said.text


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": 1}',
        "[]",
        "[null]",
        '[{"address": 1}]',
        '[{"address": "a", "hostname": "b", "ray_gpus": 1, "facts": null}]',
    ],
)
def test_an_answer_that_is_no_list_of_nodes_is_an_error(operator, answer):
    """An answer that cannot be read does not count as a cluster without nodes."""
    operator.setattr(options, "ask_container", lambda *_: answer)
    head = SimpleNamespace(name="node-ray", attrs={"Config": {"Env": ["NODE_RAY_REPOSITORY=0123"]}})
    with pytest.raises(Exit, match=r"probe\.py in node-ray gave an unreadable answer"):
        agreement.ask_nodes(head)


@pytest.mark.parametrize(
    ("line", "memory", "power"),
    [(None, None, 12.5), ("NVIDIA H200, 143771, 580.95, 345, [Not Supported], 31", 143771 * 2**20, None)],
)
def test_the_gpus_of_a_node(line, memory, power, operator):
    """The stand-in answers as a GB10, which has no memory of its own. A field that is not supported is None."""
    script, run = ROOT / "rehearsal/standin/nvidia-smi", subprocess.run
    stub = ["echo", line] if line else ["sh", str(script)]
    operator.setattr(subprocess, "run", lambda words, **rest: run(stub if line else [*stub, *words[1:]], **rest))
    (gpu,) = runpy.run_path(str(ROOT / "cluster/inside/probe.py"))["gpus"]()
    assert (gpu["memory"], gpu["power_w"]) == (memory, power)
    assert {"name", "driver", "clock_mhz", "temperature_c"} < set(gpu) and None not in (gpu["name"], gpu["driver"])


# --- The weights ------------------------------------------------------------------------------------------------------


def cached(revision="c" * 40, **changed) -> dict:
    whole = {"revision": revision, "files": {}, "missing": [], "wrong": [], "bad": [], "parts": {}, "have": 75 * 10**9}
    return whole | {"total": 75 * 10**9, "unfinished": 0, "free": 10**12} | changed


def caches(*told, **shell) -> tuple[list, bool]:
    settings = load_settings(find_model("nemotron"), shell={"ENV_FILE": "", **shell})
    nodes = [Node(f"10.0.0.{at}", f"spark-{at}", 1, {"weights": one}) for at, one in enumerate(told, 1)]
    found = agreement.weights_findings(nodes, settings, 80e9)
    return [(one.refuses, one.text) for one in found], agreement.whole_everywhere(nodes, settings)


def test_weights_that_are_whole_on_every_node_need_no_hub():
    """Every rank then starts offline. A word that may name another model keeps the hub reachable."""
    assert caches(cached(), cached()) == ([], True)
    assert caches(cached(), cached(), SERVE_EXTRA="--speculative-config {'model':'a/b'}") == ([], False)
    assert caches(cached(), {"unknown": "PermissionError"}) == ([], False)


@pytest.mark.parametrize(
    ("there", "text"),
    [
        (cached(missing=["model-2.safetensors"]), "10.0.0.2: model-2.safetensors is missing. Type: "),
        (
            cached(wrong=["a has 1 bytes and should have 2"]),
            "10.0.0.2: a has 1 bytes and should have 2. Type: ",
        ),
        (
            cached("d" * 40),
            "Two revisions of nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4: 10.0.0.1 has ccc",
        ),
    ],
    ids=["missing", "wrong size", "another revision"],
)
def test_a_damaged_cache_refuses(there, text):
    """vLLM would stop in the middle of the load, or its ranks would serve different weights."""
    ((refuses, said),), offline = caches(cached(), there)
    assert refuses and said.startswith(text) and "inv weights --model nemotron" in said and not offline


@pytest.mark.parametrize(("here", "size"), [(cached(), "75 GB"), (cached(None, total=None), "80 GB")])
def test_weights_that_are_not_there_are_a_warning_with_their_size(here, size):
    """vLLM would download them inside the load. The size comes from another node, or from the profile."""
    ((refuses, said),), offline = caches(here, cached(None, total=None))
    assert not refuses and f"vLLM will download about {size} on 10.0.0" in said and not offline


def test_dummy_weights_and_folders_are_exempt():
    """Nothing is downloaded for them."""
    for shell in ({"SERVE_EXTRA": "--load-format dummy"}, {"MODEL_CKPT": "/models/x"}):
        assert caches(cached(None), cached(None), **shell) == ([], False)
