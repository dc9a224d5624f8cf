"""The recorder's file, as the host reads it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from invoke import Exit

from cluster import recorder
from cluster.recorder import FRESH_S, GIB

NOW = 1_700_000_000.0
HEAD, WORKER = "10.0.0.1", "10.0.0.2"
STILL = {"cpu 10.0.0.1": 9, "cpu 10.0.0.2": 7, "memory 10.0.0.1": 5, "memory 10.0.0.2": 6, "server_cpu": 1}
VITALS = {"at": NOW - 2, "nodes": {HEAD: {"ranks": 2}, WORKER: None}, "quiet": STILL, "silent": {}, "floor": 8}


@pytest.fixture
def vitals(monkeypatch, tmp_path):
    """The recorder's folder, which is a folder of this test."""
    monkeypatch.setattr(recorder, "log_folder", lambda _: tmp_path)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(time=lambda: NOW))
    return tmp_path


def test_the_recorders_file_is_read(vitals):
    """The file has the number of ranks, and for how many seconds each thing has not moved."""
    (vitals / "vitals.json").write_text(json.dumps(VITALS))
    found = recorder.read_recorded({})
    assert found.ranks == 2
    assert (found.quiet("cpu"), found.quiet("memory"), found.quiet("cpu", "memory")) == (7, 5, 5)


def test_the_floor_is_that_of_the_launch(vitals):
    """`inv health` is typed without a model, so the model's limit comes from the recorder, if the recorder has it."""
    for kept, floor in ((VITALS, 8), ({name: VITALS[name] for name in VITALS if name != "floor"}, 5)):
        (vitals / "vitals.json").write_text(json.dumps(kept))
        assert recorder.read_recorded({"MEM_FLOOR_GIB": "5"}).floor == floor


def test_a_thing_without_a_look_has_not_been_quiet(vitals):
    """A thing that the recorder did not look at counts as moving. `server` is not `server_cpu`."""
    (vitals / "vitals.json").write_text(json.dumps(VITALS))
    found = recorder.read_recorded({})
    assert (found.quiet("gpu"), found.quiet("waiting"), found.quiet("server"), found.quiet()) == (0, 0, 0, 0)


@pytest.mark.parametrize(("age", "fresh"), [(-1.5, False), (-1, True), (FRESH_S, True), (FRESH_S + 0.1, False)])
def test_an_old_look_is_none(age, fresh, vitals):
    """If a clock was set back, the age of the file is unknown."""
    (vitals / "vitals.json").write_text(json.dumps(VITALS | {"at": NOW - age}))
    assert bool(recorder.read_recorded({})) is fresh


@pytest.mark.parametrize("text", [None, "", '{"at": 1'], ids=["no file", "nothing", "half a file"])
def test_a_file_that_cannot_be_read_is_none(text, vitals):
    """A missing file and a broken file are unknown, without a traceback."""
    if text is not None:
        (vitals / "vitals.json").write_text(text)
    assert recorder.read_recorded({}) is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, None),
        (
            {"at": NOW, "why": "ended by the memory guard: 10.0.0.2 had 3.9 GiB", "by": "memory guard"},
            (
                "The server was ended by the memory guard: 10.0.0.2 had 3.9 GiB.",
                "inv logs, inv memory; then: inv up --model NAME, with a lower GPU_MEM_UTIL",
            ),
        ),
        (
            {"at": NOW, "why": "ended by the recorder: no API server", "by": "recorder"},
            (
                "The server was ended by the recorder: no API server.",
                "sudo dmesg | tail, inv logs; then: inv up --model NAME",
            ),
        ),
    ],
    ids=["nothing", "memory guard", "recorder"],
)
def test_what_has_ended_the_server_is_told(told, said, vitals):
    """The sentence has the reason, and the next command corrects it. Without the file the server ended by itself."""
    if told:
        (vitals / "ended.json").write_text(json.dumps(told))
    assert recorder.read_ended({}) == said


def test_inv_memory_shows_free_pages_and_what_is_low(vitals, monkeypatch, capsys):
    """A node below the floor of the launch is LOW, and so is one that does not answer. CSV has the same in bytes."""
    (vitals / "vitals.json").write_text(json.dumps(VITALS))
    told = {"available": 9 * GIB, "free": 2 * GIB, "cached": 7 * GIB, "swap": 0}
    nodes = {HEAD: told, WORKER: told | {"available": 7.9 * GIB}, "10.0.0.3": None}
    monkeypatch.setattr(recorder, "stream", lambda _: nullcontext([json.dumps(nodes)]))
    recorder.time.strftime = lambda _: "03:04:05"
    with pytest.raises(Exit, match="does not answer any more"):
        recorder.watch_memory({"MEM_FLOOR_GIB": "5"}, str(vitals / "memory.csv"))
    head, worker, silent = capsys.readouterr().err.splitlines()
    words = "9.0 GiB available 2.0 free 7.0 in the page cache 0.0 in swap"
    assert " ".join(head.split()[2:]) == words and worker.endswith("LOW")
    assert silent.count("unknown") == 4 and silent.endswith("LOW")
    rows = (vitals / "memory.csv").read_text().splitlines()
    assert rows[0] == "time,node,available_bytes,free_bytes,cached_bytes,swap_bytes"
    assert rows[1] == f"03:04:05,{HEAD},{9 * GIB},{2 * GIB},{7 * GIB},0" and rows[3] == "03:04:05,10.0.0.3,,,,"
