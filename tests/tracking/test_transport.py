"""Servers that misbehave: the end of a run does not wait for them, and their answers do not fill the memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import socket
import threading
import time
from pathlib import Path

import pytest
import requests

from distdiff import tracking
from distdiff.tracking import background, transport
from distdiff.tracking.address import load_mlflow
from distdiff.tracking.spool import spools
from tests import forkserver

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drip(data, send):
    for byte in data:
        send(bytes([byte]))
        time.sleep(0.1)


def endless(send, piece=b"a" * 65536):
    while True:
        send(piece)


ANSWERS = {
    "429": lambda send: send(b"HTTP/1.1 429 Slow down\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"),
    "429 without end": lambda send: (send(b"HTTP/1.1 429 Slow down\r\nRetry-After: 3600\r\n\r\n"), endless(send)),
    "endless": lambda send: (send(HEAD + b"\r\n"), endless(send)),
    "endless chunks": lambda send: (send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
                                    endless(send, b"10000\r\n" + b"a" * 65536 + b"\r\n")),
    "compressed": lambda send: (send(HEAD + b"Content-Encoding: gzip\r\n\r\n"), send(gzip.compress(bytes(1 << 29), 1))),
    "drip": lambda send: (send(HEAD + b"Content-Length: 100000\r\n\r\n"), drip(b"{" + b" " * 100_000, send)),
    "dripping header": lambda send: drip(HEAD + b"X: " + b"a" * 60_000, send),
}  # fmt: skip
"""What a server sends to each request."""


@contextlib.contextmanager
def misbehaving(kind):
    """A server that answers each request in one way; gives its address."""

    def answer(client):
        with contextlib.suppress(OSError), client:
            client.recv(1 << 16)
            ANSWERS[kind](client.sendall)

    def accept(listener):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def run(folder, uri, limits):
    """A run against a server; what it says and how it went go to files. Forked, and it ends as any process does."""
    os.chdir(folder)
    with open("said", "w") as said:
        os.dup2(said.fileno(), 2)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    transport.MOST_SECONDS, background.MOST_SILENCE = limits
    load_mlflow()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tracking.run(experiment="e", name="n", params={}, tags={}, folder="run") as run:
        for step in range(100):
            run.metrics({"loss": 1.0}, step)
        time.sleep(1)
        began = time.time()
    tracking.attach("run", "table.txt")
    rose = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path("found").write_text(json.dumps([began, rose / 1024]))


def ended(kind, folder, limits):
    """Seconds from the end of a run's block to the end of its process, and the MiB by which its memory rose."""
    (folder / "table.txt").write_text("a table")
    with misbehaving(kind) as uri:
        task = forkserver.process(run, (folder, uri, limits))
        task.start()
        task.join(200)
        now = time.time()
        task.kill()
    said = (folder / "said").read_text()
    assert task.exitcode == 0, said
    assert "entries were not sent" in said
    began, mib = json.loads((folder / "found").read_text())
    assert spools(folder / "run")[0].n_unsent > 100, "all stays in the spool"
    return now - began, mib


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_server_that_misbehaves_costs_the_end_of_a_run_little(kind, tmp_path):
    seconds, mib = ended(kind, tmp_path, (2.0, 4.0))
    assert seconds < 15
    assert mib < 300


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["drip", "dripping header"])
def test_with_the_limits_as_they_are_a_run_ends_within_ninety_seconds(kind, tmp_path):
    from distdiff.tracking.background import MOST_SILENCE

    seconds, _ = ended(kind, tmp_path, (transport.MOST_SECONDS, MOST_SILENCE))
    assert seconds < 90


@pytest.fixture
def session():
    """A session of MLflow with limits."""
    from mlflow.utils import request_utils

    transport.limit_requests()
    return request_utils._get_request_session(1, 0, 0.0, frozenset([429]), True, True)


def test_an_answer_is_read_as_before(session):
    text = json.dumps({"a": "b" * 200_000}).encode()
    packed = gzip.compress(text)
    for head, body in ((b"", text), (b"Content-Encoding: gzip\r\n", packed)):
        ANSWERS["right"] = lambda send, head=head, body=body: send(
            HEAD + head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        with misbehaving("right") as uri:
            assert session.get(uri).json() == json.loads(text)
            with session.get(uri, stream=True) as answer:
                assert b"".join(answer.iter_content(1000)) == text
            assert transport.silent_seconds() == 0
    del ANSWERS["right"]


@pytest.mark.parametrize(
    ("kind", "words"), [("endless", "has more than 1,000 bytes"), ("drip", "in . seconds and has not ended")]
)
def test_an_answer_without_end_is_a_sentence(session, monkeypatch, kind, words):
    monkeypatch.setattr(transport, "MOST_BYTES", 1000)
    monkeypatch.setattr(transport, "MOST_SECONDS", 1.0)
    with misbehaving(kind) as uri:
        with pytest.raises(requests.ConnectionError, match=words):
            session.get(uri)
        if kind == "drip":  # a file that comes too slowly
            with session.get(uri, stream=True) as answer, pytest.raises(requests.ConnectionError, match=words):
                b"".join(answer.iter_content(1000))


def test_a_request_that_a_busy_server_refuses_is_sent_again_as_often_as_mlflow_is_set_to(session):
    number = [0]

    def busy_once(send):
        number[0] += 1
        if number[0] == 1:
            ANSWERS["429"](send)
        else:
            send(HEAD + b"Content-Length: 2\r\n\r\n{}")

    ANSWERS["busy once"] = busy_once
    with misbehaving("busy once") as uri:
        assert session.post(uri, json={"a": 1}).json() == {}
    del ANSWERS["busy once"]
    with misbehaving("429") as uri:
        assert session.get(uri).status_code == 429


def test_an_upload_that_goes_on_is_not_silent(session, tmp_path):
    """The server takes a file slowly: the request lasts for seconds, and is silent for a fraction of one."""
    (tmp_path / "weights").write_bytes(bytes(20 << 20))
    longest, stop = [0.0], threading.Event()

    def slow(listener):
        client, _ = listener.accept()
        with client:
            left = 20 << 20
            while left > 0:
                left -= len(client.recv(1 << 17))
                time.sleep(0.01)
            client.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")

    def look():
        while not stop.wait(0.02):
            longest[0] = max(longest[0], transport.silent_seconds())

    with socket.create_server(("127.0.0.1", 0)) as listener, (tmp_path / "weights").open("rb") as file:
        for target, args in ((slow, (listener,)), (look, ())):
            threading.Thread(target=target, args=args, daemon=True).start()
        began = time.monotonic()
        assert session.put(f"http://127.0.0.1:{listener.getsockname()[1]}/", data=file).json() == {}
        stop.set()
    assert longest[0] < (time.monotonic() - began) / 2
