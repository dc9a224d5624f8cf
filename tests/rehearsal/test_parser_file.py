"""The file of the reasoning parser arrives whole or not at all, and its commit is printed.

A small server at the head's own address stands in for the model's repository. The real `hf download` fetches the file.
"""

import shutil
import subprocess
import sys

import pytest
from operating import KEY, inv, serving

from rehearsal.flow import ALLOW

pytestmark = pytest.mark.rehearsal
# A model of 120 billion parameters is refused on a stand-in for its memory. These tests look at its parser's file only.
TOO_BIG = f"{ALLOW},memory-floor,memory-context,memory-sequences,memory-unknown"
COMMIT, WHOLE = "c" * 40, b"# a parser\n" * 999
REPOSITORY = f"""
import http.server, sys
whole, cut = {WHOLE!r}, "cut" in sys.argv
class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        for name, value in (("ETag", '"{"e" * 40}"'), ("X-Repo-Commit", "{COMMIT}"), ("Content-Length", len(whole))):
            self.send_header(name, str(value))
        self.end_headers()
    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(whole[:99] if cut else whole)
        self.close_connection = True
server = http.server.ThreadingHTTPServer(("10.0.0.1", 8999), Answer)
print("up", flush=True)
server.serve_forever()
"""
ENV = {
    "TP_SIZE": "1",
    "HF_TOKEN": "hf-marker",
    "VLLM_API_KEY": KEY,
    "VLLM_FORWARD_VARS": "HF_ENDPOINT",
    "HF_ENDPOINT": "http://10.0.0.1:8999",
}


@pytest.fixture
def launch(sparks, terminal):
    """Launches nemotron on one stand-in Spark; returns its messages, and the parser's file if there is one."""
    shutil.rmtree(sparks[0].cache / "huggingface/parsers", ignore_errors=True)
    terminal(sparks[0], "head", "--model", "nemotron", **ENV).until("Ray runtime started")

    def type_it():
        done = inv(sparks[0], "launch", "--model", "nemotron", "--allow", TOO_BIG, **ENV)
        return done.stderr, list((sparks[0].cache / "huggingface/parsers").rglob("super_v3_reasoning_parser.py"))

    return type_it


@pytest.fixture
def repository(sparks):
    """Starts the model's repository. With "cut" the repository breaks off in the middle of a file."""
    started = []

    def start(*words: str):
        started.append(sparks[0].popen(sys.executable, "-c", REPOSITORY, *words, stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_it_comes_with_its_commit_and_then_needs_no_network(launch, repository, sparks):
    """The file is whole, and its commit is printed. The next launch uses the file as it is, without a network."""
    there = repository()
    for _ in range(2):
        said, files = launch()
        assert f"is here, from commit {COMMIT}." in said and "could not be fetched" not in said
        assert [file.read_bytes() for file in files] == [WHOLE]
        there.kill()
        there.wait()


def test_cut_off_it_is_not_there_and_no_server_starts(launch, repository, sparks):
    """A download that breaks off is refused, with two ways to go on. It leaves no file."""
    repository("cut")
    said, files = launch()
    assert "could not be fetched" in said and "Traceback" not in said
    assert "REASONING_PARSER=nemotron_v3" in said and "ENABLE_REASONING_PARSER=0" in said
    assert files == [] and not serving(sparks[0])
