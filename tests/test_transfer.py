"""Bars of bytes: what a file or a journal gets instead, and that several threads may advance them."""

from concurrent.futures import ThreadPoolExecutor

from cluster import transfer


def test_without_a_terminal_lines_come_now_and_then(monkeypatch, capsys):
    """A line has the name, the bytes so far and all bytes. The end brings a last one."""
    monkeypatch.setattr(transfer, "EVERY_S", 0)
    with transfer.transferring() as bars:
        bars.show("spark-2", 0, 2 * 10**9)
        bars.show("spark-2", 5 * 10**8)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "spark-2: 0.000 of 2.000 GB" and said[1].startswith("spark-2: 0.500 of 2.000 GB")
    assert said[-1].startswith("spark-2: 0.500 of 2.000 GB") and len(said) == 3


def test_transfers_to_several_hosts_advance_at_once(capsys):
    """Each host has one line, whatever thread has advanced it. A transfer of unknown size has no total."""
    names = [f"spark-{number}" for number in range(2, 6)]
    with transfer.transferring() as bars, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: [bars.show(name, done) for done in range(0, 10**9, 10**7)], names))
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(",")[0] for line in said) == [f"{name}: 0.990 GB" for name in names]
