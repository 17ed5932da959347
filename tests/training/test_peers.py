"""Machines that watch each other: two of them in one process, on a store of torch's."""

from __future__ import annotations

import socket
import threading
import time
from socket import AF_INET

import psutil
import pytest
import torch.distributed as dist

from distdiff.training import peers
from distdiff.training.peers import Lost, Peers

GLOO = "[/src/third_party/gloo/gloo/pair.cc:534] Connection closed by peer [10.0.0.2]:7. This is typical\nof it"


def wait(what, seconds=20.0):
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until:
        time.sleep(0.02)
    return what()


@pytest.fixture
def two(monkeypatch):
    """Two machines of one launch that know each other, and what their processes were ended with."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(peers, "BEAT", 0.05)
    monkeypatch.setattr(peers, "DIAGNOSIS", 1.0)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "GROUP_WORLD_SIZE": "2"}
    common |= {"DISTDIFF_SILENCE": "2"}
    machines, ended = [Peers({**common, "GROUP_RANK": rank}) for rank in ("0", "1")], []

    def end(code):
        ended.append(code)
        for machine in machines:
            machine.close()

    monkeypatch.setattr("os._exit", end)
    for machine in machines:
        machine.__enter__()
    assert wait(lambda: all(len(m.names) == 2 for m in machines))
    machines[0].where = lambda: "after step 3 of 9; the last checkpoint is run/step-2"
    yield *machines, ended
    for machine in machines:
        machine.close()
        machine.signs.join(5)


def test_machines_that_give_signs_are_left_alone(two):
    time.sleep(3)
    assert two[2] == []
    assert [two[i]._silent(2) for i in (0, 1)] == [[], []]
    two[0].close()
    assert not two[0].signs.is_alive()  # in torch's code when Python ends, it would abort the process


def test_a_machine_that_is_silent_is_lost(two, capfd):
    _, b, ended = two
    b.close()  # as if the cable was pulled
    assert wait(lambda: ended) == [75]
    assert capfd.readouterr().err.strip() == (
        f"distdiff: host 2 of 2 ({socket.gethostname()}) is lost (no sign of life for 2 s) after step 3 of 9; the last "
        "checkpoint is run/step-2; the same command on all hosts goes on"
    )


def test_a_machine_that_does_not_hear_itself_lost_the_first():
    """Nobody's signs come through to a store that is away, so nothing is known of the others."""
    for rank, lost in (("0", [1, 2]), ("1", [0]), ("2", [0])):
        machine = Peers({"GROUP_RANK": rank, "GROUP_WORLD_SIZE": "3"})
        machine.seen = dict.fromkeys(range(3), time.monotonic() - 9)
        assert machine._silent(5) == lost
        assert machine._silent(50) == []


def test_an_error_of_one_machine_is_told_to_the_other(two, capfd):
    _, b, ended = two
    assert b.__exit__(ValueError, ValueError("no store at /x\nmore"), None) is None
    assert wait(lambda: ended) == [75]
    assert f"host 2 of 2 ({socket.gethostname()}) is lost (it ended: no store at /x) after" in capfd.readouterr().err


def test_an_exchange_that_failed_is_explained(two):
    a, b, _ = two
    b.close()
    with pytest.raises(Lost, match=r"host 2 of 2 .* is lost \(torch: Connection closed by peer \[10.0.0.2\]:7\) after"):
        a.__exit__(RuntimeError, RuntimeError(GLOO), None)
    assert a.closed.is_set()


def test_processes_of_one_machine_watch_nobody():
    before = threading.active_count()
    alone = Peers({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"})
    with (
        pytest.raises(Lost, match=r"^the exchange with another process failed \(torch: x\) before the first step; the"),
        alone,
    ):
        raise dist.DistBackendError("x")
    assert threading.active_count() == before
    for other in (ValueError("gloo"), RuntimeError("out of memory")):
        with pytest.raises(type(other), match=str(other)), Peers({}):
            raise other


def test_gloo_takes_the_interface_that_leads_to_the_first_machine():
    known = [(name, a.address) for name, found in psutil.net_if_addrs().items() for a in found if a.family == AF_INET]
    for name, address in known:
        environment = {"MASTER_ADDR": address}
        inside = address.startswith("127.")
        assert peers._reach(environment) == ("" if inside else address)
        assert environment.get("GLOO_SOCKET_IFNAME") == (None if inside else name)
        environment = {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": "mine"}
        peers._reach(environment)
        assert environment["GLOO_SOCKET_IFNAME"] == "mine"
