"""All that is found before a load is told in one report: to a person line by line, to a machine as JSON."""

import json
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import check
from cluster.agreement import Node
from cluster.check import Inspection
from cluster.finding import Finding
from cluster.memory import Loaded
from cluster.models import find_model
from cluster.options import Known
from cluster.settings import load_settings

GIB = 2**30
MEMORY = {"MemTotal": 120, "MemAvailable": 20, "MemFree": 13, "Cached": 7, "SwapTotal": 16, "SwapFree": 12}
FACTS = {"memory": {name: size * GIB for name, size in MEMORY.items()}, "gpus": [{"memory": None}], "weights": None}
WORDS = ("vllm", "serve", "x", "--gpu-memory-utilization", "0.75")
SERVED = SimpleNamespace(alive=True, model="nemotron-3", context=131072, world_size=2, words=WORDS)


@pytest.fixture
def settings(operator, tmp_path):
    """The settings of a run with nemotron."""
    return load_settings(find_model("nemotron"), shell={"ENV_FILE": "", "CACHE_DIR": str(tmp_path)})


@pytest.fixture
def inspected(operator, settings):
    """Inspects two nodes that agree, and of whose memory 20 GiB are left, beside the server that is given."""
    nodes = [Node(f"10.0.0.{number}", f"spark-{number}", 1, FACTS) for number in (1, 2)]
    operator.setattr(check, "known_options", lambda *_: Known("0.21.0", {}))
    operator.setattr(check, "gated", lambda settings, *_: (settings, (), ()))
    operator.setattr(check, "ask_nodes", lambda *_: nodes)
    operator.setattr(check, "find_disagreements", lambda *_: [])

    def settled():
        inspect.settled += 1

    operator.setattr(check, "settle", settled)

    def inspect(server):
        inspect.settled = 0
        operator.setattr(check, "ask_server", lambda _: server)
        return check.inspect(settings, SimpleNamespace(image=SimpleNamespace(id="sha256:a")))

    return inspect


@pytest.mark.parametrize("server", [None, SimpleNamespace(alive=False)])
def test_the_memory_of_a_model_that_does_not_fit_is_refused(inspected, server):
    """Each node is judged, even if a server has ended there. What that server has left is waited for first."""
    found = inspected(server)
    assert inspected.settled == 1
    assert [one.rule for one in found.findings if one.refuses] == ["memory-floor"] * 2
    head, worker = json.loads(check.as_json(found))["memory"]
    assert (head["node"], worker["node"]) == ("10.0.0.1", "10.0.0.2")
    assert [head[name] / GIB for name in ("available", "free", "cached", "swap")] == [20, 13, 7, 4]


def test_the_memory_of_a_node_that_does_not_answer_is_not_judged(inspected, operator):
    """The rule `nodes` refuses that node. Its memory would bring a second finding."""
    nodes = [Node("10.0.0.1", "spark-1", 1, FACTS), Node("10.0.0.2", "spark-2", 1, {"unknown": "ActorDiedError: it"})]
    operator.setattr(check, "ask_nodes", lambda *_: nodes)
    found = inspected(None)
    assert [one.rule for one in found.findings if one.refuses] == ["memory-floor"] and len(found.budgets) == 1


GPUS = [([{"memory": 5}], 5), ([{"memory": None}], None), ([], None), ({"unknown": "x"}, None)]


@pytest.mark.parametrize(("gpus", "device"), GPUS)
def test_the_memory_of_the_gpu_decides_vllms_defaults(gpus, device):
    """NVML's number goes into the computation. The rule `gpus` refuses a GPU that could not be asked."""
    assert check.node_memory(Node("10.0.0.1", "spark-1", 1, FACTS | {"gpus": gpus})).device == device


def test_the_memory_beside_a_server_is_not_judged(inspected):
    """The memory of the server would count twice. The report shows the server and the memory beside it."""
    found = inspected(SERVED)
    assert inspected.settled == 0, "a server that runs is not waited for"
    assert not found.findings and not found.budgets
    (said,) = found.said
    assert "A server runs: nemotron-3, 131,072 tokens, GPU_MEM_UTIL 0.75 on each of 2 nodes" in said
    assert "10.0.0.1 20.0 GiB, 10.0.0.2 20.0 GiB" in said and "inv stop" in said


@pytest.mark.parametrize("server", [None, SERVED], ids=["no server", "beside a server"])
def test_free_pages_cache_and_swap_are_shown(inspected, server, capfd):
    """MemAvailable counts page cache as free, and a GB10 allocates from free pages. So both are in the table."""
    found = inspected(server)
    check.tell_inspection(found, check.RULES)
    rows = [line.split()[-3:] for line in capfd.readouterr().err.splitlines()]
    assert ["(MemAvailable)", "20.0", "20.0"] in rows and ["(MemFree)", "13.0", "13.0"] in rows
    assert ["(Cached)", "7.0", "7.0"] in rows and ["use", "4.0", "4.0"] in rows


def test_sizes_that_were_read_here_are_said(operator, inspected, capfd):
    """Later checks use what vLLM printed, and say so in the table, in a refusal and in the JSON."""
    operator.setattr(check, "loads_here", lambda *_: [Loaded("2026-11-24", 0.75, 2 * GIB, 0, 0)])
    found = inspected(None)
    check.tell_inspection(found, check.RULES)
    said = capfd.readouterr().err
    assert "activations (as loaded here on 2026-11-24)" in said and "allowance)" in said
    assert "leaves 2.00 on 10.0.0.1, as loaded here on 2026-11-24. The largest" in said
    assert json.loads(check.as_json(found))["memory"][0]["loaded"] == "2026-11-24"


def test_a_plan_shows_no_page_cache(settings, capfd):
    """`plan` asks no node, so it has no row of unknowns."""
    check.foretell(check.foresee(settings))
    assert "MemAvailable" in (said := capfd.readouterr().err) and "MemFree" not in said and "unknown" not in said


def told(settings, capfd, allowed=()):
    """The lines of a report with two refusals and a warning, and the message of its Exit if it has one."""
    findings = [Finding("mtu", "It differs."), Finding("links", "One is down."), Finding("wrapper", "Moved.", False)]
    try:
        check.tell_inspection(Inspection(settings, (), (), findings, ["First."]), allowed)
        ended = None
    except Exit as refusal:
        ended = refusal.message
    return capfd.readouterr().err.splitlines(), ended


def test_each_finding_is_printed_and_refusals_raise(settings, capfd):
    """The message at the end has the flag that would pass over the rules."""
    lines, ended = told(settings, capfd)
    assert lines == ["First.", "REFUSED mtu: It differs.", "REFUSED links: One is down.", "WARNING wrapper: Moved."]
    assert "Nothing was loaded" in ended and ended.endswith("--allow mtu,links")


def test_an_allowed_rule_is_printed_and_refuses_nothing(settings, capfd):
    """The last line names the rules that were passed over."""
    lines, ended = told(settings, capfd, ["mtu", "links"])
    assert ended is None and lines[1] == "ALLOWED mtu: It differs."
    assert lines[-1] == "PASSED OVER by --allow: mtu, links"


def test_a_rule_that_does_not_exist_cannot_be_allowed():
    """A mistyped name in --allow is an error. The message lists all rules."""
    assert check.rule_names("mtu,links") == ["mtu", "links"] and check.rule_names(None) == []
    with pytest.raises(Exit, match="--allow names memlok; the rules are nodes, "):
        check.rule_names("mtu,memlok")


def test_a_plan_warns_and_refuses_nothing(operator, settings, capfd):
    """`plan` asks no node. If a model would not fit on an ordinary Spark, `plan` says so and does not refuse."""
    check.foretell(check.foresee(settings.emptied(["GPU_MEM_UTIL"], "test")))
    assert "WOULD BE REFUSED memory-unknown: " in capfd.readouterr().err
