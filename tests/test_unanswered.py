"""For how long health has waited in vain, kept from one look to the next."""

import json
import shutil
from types import SimpleNamespace

import pytest

from vitals import unanswered

NOW = 1_700_000_000.0
HANG = 300
SETTINGS = {"HANG_S": str(HANG)}


@pytest.fixture
def logs(monkeypatch, tmp_path):
    """Where it is kept, a folder of this test."""
    monkeypatch.setattr(unanswered.node, "logs", lambda _: tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def waited(logs, monkeypatch):
    """Looks so many seconds after the look before, and finds no token, or one; for how long there was none."""
    clock = SimpleNamespace(now=NOW)
    monkeypatch.setattr(unanswered, "time", SimpleNamespace(time=lambda: clock.now))

    def look(later=0.0, silent=True):
        clock.now += later
        return unanswered.note(SETTINGS, silent)

    return look


def test_a_first_look_in_vain_has_not_waited(waited):
    """What was before it is not known."""
    assert waited() == 0


@pytest.mark.parametrize("every", [1, 60, HANG / 2])
def test_looks_close_together_add_up(every, waited):
    """However long: it is for as long as none of them had a token."""
    assert [waited(every) for _ in range(20)] == [every * number for number in range(20)]


def test_a_look_long_after_begins_anew(waited):
    """More than half of HANG_S: whether a token came between is not known, and what follows counts from here."""
    assert [waited(later) for later in (0, 100, HANG / 2 + 1, 100, 3600, 10)] == [0, 100, 0, 100, 0, 10]


def test_a_token_ends_it(waited):
    """The next look in vain is a first one, however soon; so it is after tokens alone."""
    steps = [(0, True), (100, True), (1, False), (1, True), (9, True), (1, False), (1, False), (1, True)]
    assert [waited(later, silent) for later, silent in steps] == [0, 100, 0, 0, 9, 0, 0, 0]


@pytest.mark.parametrize("back", [1, 50, 86400])
def test_a_clock_that_is_set_back_begins_anew(back, waited):
    """Never less than nothing, and no silence that begins in the future."""
    assert [waited(later) for later in (0, 100, -back, 100)] == [0, 100, 0, 100]


def test_a_clock_that_is_set_forward_is_no_wait(waited):
    """A machine that learns the time after its start has not waited since 1970."""
    assert [waited(later) for later in (0, 100, 86400, 100)] == [0, 100, 0, 100]


BROKEN = ["", "null", "7", '"ab"', "{}", "[]", "[1]", "[1, 2, 3]", "[null, 1]", '["a", "b"]', "[[], []]", "[NaN, NaN]"]


@pytest.mark.parametrize("text", [*BROKEN, "[1699999900, 1699999", b"\xff\xfe"])
def test_a_file_that_cannot_be_read_begins_anew(text, logs, waited):
    """Half a file, or another one: no traceback, and the next look finds a whole one."""
    (logs / "unanswered.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert [waited(), waited(100)] == [0, 100]


def test_what_is_kept_is_read(logs, waited):
    """By whoever asks next: each `inv health` is a process of its own."""
    (logs / "unanswered.json").write_text(json.dumps([NOW - 250, NOW - 100]))
    assert waited() == 250


@pytest.mark.parametrize("silent", [True, False])
def test_what_cannot_be_kept_is_not_held_against_the_server(silent, logs, waited):
    """A folder that is not there, or where nothing can be written: nobody has waited, and health says what it sees."""
    file = logs / "unanswered.json"
    file.mkdir()
    assert [waited(later, silent) for later in (0, 100, 100)] == [0, 0, 0]
    file.rmdir()
    shutil.rmtree(logs)
    assert [waited(later, silent) for later in (0, 100, 100)] == [0, 0, 0]


def test_a_file_that_cannot_be_written_is_no_wait(logs, waited, monkeypatch):
    """Not even where it says that many waited: it would say so for ever."""
    (logs / "unanswered.json").write_text(json.dumps([NOW - 250, NOW - 100]))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unanswered.Path, "write_text", full)
    assert waited() == 0


def test_it_is_written_whole(logs, waited, monkeypatch):
    """Who looks meanwhile, or a machine that loses its power, finds what was before; nothing else stays."""
    waited()
    before = (logs / "unanswered.json").read_text()
    with monkeypatch.context() as now:
        now.setattr(unanswered.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert waited(100) == 0 and (logs / "unanswered.json").read_text() == before
    assert waited() == 100 and [file.name for file in logs.iterdir()] == ["unanswered.json"]
