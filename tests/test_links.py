"""Links, read from made-up sysfs trees: which are used, what the operator is told, and what is refused."""

import re
import shlex

import pytest

from cluster.links import ipv4_address

UP = ("enp1s0f0np0", "enp1s0f1np1", "enP2p1s0f0np0", "enP2p1s0f1np1")
PORT_0, PORT_1 = (UP[0], UP[2]), (UP[1], UP[3])
HCAS = {"enp1s0f0np0": "rocep1s0f0", "enp1s0f1np1": "rocep1s0f1"}
HCAS |= {"enP2p1s0f0np0": "roceP2p1s0f0", "enP2p1s0f1np1": "roceP2p1s0f1"}
SOCKETS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")


@pytest.fixture
def head(inv, sysfs):
    """Types `inv --dry head` on a machine with these links. Returns exports, remarks, all that was said."""

    def typed(flags: str = "", tree: dict | None = None, **shell: str):
        said = inv(f"--dry head {flags}", **({"SYSFS": str(sysfs(**tree))} if tree else {}), **shell)
        exports = [shlex.split(line)[1] for line in re.findall("^export .*$", said.out, re.M)]
        remarks = [line for line in said.err.splitlines() if line.startswith(("Note", "Warning"))]
        return dict(item.split("=", 1) for item in exports), remarks, said

    return typed


def _uses(env: dict[str, str], netdevs: set[str], hcas: set[str]) -> None:
    assert [set(env[name].split(",")) for name in SOCKETS] == [netdevs] * 3
    assert set(env["NCCL_IB_HCA"].split(",")) == hcas
    assert set(env["UCX_NET_DEVICES"].split(",")) == {f"{hca}:1" for hca in hcas}
    assert "NCCL_IB_DISABLE" not in env


def test_all_links_up(head):
    """With both cables in, all four links carry data, and no remark is made."""
    env, remarks, _ = head()
    _uses(env, set(UP), {HCAS[netdev] for netdev in UP})
    assert remarks == []


@pytest.mark.parametrize(
    ("down", "said"),
    [
        (PORT_0, [f"Note: port f0 is down ({PORT_0[0]}, {PORT_0[1]}); one cable is normal."]),
        (PORT_1, [f"Note: port f1 is down ({PORT_1[0]}, {PORT_1[1]}); one cable is normal."]),
        ((UP[2],), [f"Warning: {UP[2]} is down, but the other half of port f0 is up"]),
        ((*PORT_0, UP[1]), ["Note: port f0 is down", f"Warning: {UP[1]} is down"]),
    ],
)
def test_links_that_are_down_are_named_and_not_used(down, said, head):
    """A port that is down is a note, half a port a warning. NCCL gets neither, because it could stall."""
    env, remarks, _ = head(tree={"down": down})
    up = set(UP) - set(down)
    _uses(env, up, {HCAS[netdev] for netdev in up})
    assert len(remarks) == len(said) and all(map(str.startswith, remarks, said))


@pytest.mark.parametrize(
    ("task", "tree"), [("head", {"devices": ()}), ("head --model nemotron", {"down": UP}), ("worker", {"down": UP})]
)
def test_no_link_at_all_is_refused(task, tree, inv, sysfs):
    """Without a link two nodes would be very slow. The message has the cold boot, and the setting for TCP."""
    said = inv(f"--dry {task}", SYSFS=str(sysfs(**tree)))
    assert said.code and said.out == ""
    assert "No data-plane link is up" in said.err and "cold boot" in said.err and "RDMA_HCAS=" in said.err


def test_a_model_for_one_node_needs_no_link(head):
    """A model with one rank needs no other node. It is not refused, and NCCL's RDMA is off."""
    env, _, said = head("--model qwen-30b", {"down": UP}, TP_SIZE="1")
    assert said.code == 0 and env["NCCL_IB_DISABLE"] == "1" and "NCCL_IB_HCA" not in env


@pytest.mark.parametrize("tree", [{}, {"devices": ()}], ids=["all up", "no RoCE"])
def test_tcp_on_purpose(tree, head):
    """`RDMA_HCAS=` turns RDMA off, tells the operator so, and keeps the interfaces for sockets."""
    env, _, said = head("", tree, RDMA_HCAS="")
    assert env["NCCL_IB_DISABLE"] == "1" and "NCCL_IB_HCA" not in env
    assert set(env["UCX_NET_DEVICES"].split(",")) == (set(UP) if tree == {} else {"enp1s0f1np1"})
    assert "TCP" in said.err


def test_a_half_without_an_address_carries_only_rdma(head, addresses):
    """A half without IPv4 is in the RoCE lists, but not in the socket lists, where it would be an error."""
    del addresses["enP2p1s0f0np0"], addresses["enP2p1s0f1np1"]
    env, remarks, _ = head()
    _uses(env, {"enp1s0f0np0", "enp1s0f1np1"}, set(HCAS.values()))
    assert remarks == []


def test_without_any_address_the_sockets_use_the_control_link(head, addresses):
    """If no link has an IPv4 address, sockets use PRIMARY_IF."""
    addresses.clear()
    env, _, _ = head(VLLM_HOST_IP="10.0.0.1", PRIMARY_IF="eth0")
    _uses(env, {"eth0"}, set(HCAS.values()))


def test_interfaces_may_have_any_name(head, addresses):
    """Nothing depends on the interface names of a Spark: two cards of one function each are two ports."""
    addresses |= {"eth0": "10.1.0.1", "ibs5": "10.1.1.1"}
    env, remarks, _ = head(
        tree={"devices": (("mlx5_0", "eth0"), ("mlx5_1", "ibs5"), ("mlx5_2", "eth9")), "down": ("eth9",)}
    )
    _uses(env, {"eth0", "ibs5"}, {"mlx5_0", "mlx5_1"})
    assert [remark.split(":")[0] for remark in remarks] == ["Note"]


@pytest.mark.parametrize("tree", [{}, {"devices": ()}], ids=["all up", "no RoCE"])
def test_the_operators_links_win(tree, head):
    """DATA_IFS and RDMA_HCAS that an operator sets are used unchanged, whatever sysfs says."""
    env, _, said = head("", tree, RDMA_HCAS="mlx5_7,mlx5_8", DATA_IFS="eth7")
    _uses(env, {"eth7"}, {"mlx5_7", "mlx5_8"})
    assert "RDMA_HCAS = mlx5_7,mlx5_8 (shell)" in said.err


def test_the_gid_index_is_never_made_up(head):
    """NCCL_IB_GID_INDEX is set only if the operator sets it."""
    assert "NCCL_IB_GID_INDEX" not in head()[0]
    assert head(NCCL_IB_GID_INDEX="3")[0]["NCCL_IB_GID_INDEX"] == "3"


def test_a_link_is_up_when_carrier_and_operstate_say_so(head, sysfs):
    """A link is up with both carrier and operstate. An interface whose carrier cannot be read is down, not an error."""
    root = sysfs(down=("none",))
    (root / "class/net/enp1s0f0np0/carrier").unlink()
    (root / "class/net/enp1s0f1np1/operstate").write_text("dormant\n")
    env, _, _ = head(SYSFS=str(root))
    _uses(env, {UP[2], UP[3]}, {HCAS[UP[2]], HCAS[UP[3]]})


def test_the_nodes_own_address_is_that_of_the_control_link(head, addresses):
    """VLLM_HOST_IP is PRIMARY_IF's address unless it is set. An interface without an address is named."""
    addresses["enp1s0f1np1"] = "192.168.5.5"
    assert head()[0]["VLLM_HOST_IP"] == "192.168.5.5"
    assert head(VLLM_HOST_IP="10.7.7.7")[0]["VLLM_HOST_IP"] == "10.7.7.7"
    _, _, said = head(PRIMARY_IF="eth5")
    assert said.code and "PRIMARY_IF (shell) is eth5, which has no IPv4 address" in said.err


def test_the_address_of_a_real_interface(operator):
    """This machine's loopback has its known address, and a missing interface has none."""
    assert ipv4_address("lo") == "127.0.0.1"
    assert ipv4_address("no-such-if") is None
