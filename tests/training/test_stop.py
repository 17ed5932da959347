"""Reasons to save and to leave."""

from __future__ import annotations

import os
import signal
import time

import pytest

from distdiff import cli, experiment
from distdiff.training.stop import GO_ON, LEAVE, MARGIN, REPEAT, SAVE, Stop, Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_once_and_then_does_what_it_did_before(number, monkeypatch):
    """SLURM signals a whole job, the launcher its processes again: that is one request."""
    heard, now = [], [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    old = signal.signal(number, lambda *_: heard.append(1))
    try:
        with Stop(every=60) as stop:
            assert stop.agreed() == GO_ON
            os.kill(os.getpid(), number)
            assert stop.agreed() == LEAVE
            assert stop.reason == number.name
            os.kill(os.getpid(), number)
            assert not heard
            now[0] += REPEAT + 1
            os.kill(os.getpid(), number)
            assert heard == [1]
        assert signal.getsignal(number) is not stop._note
    finally:
        signal.signal(number, old)


def test_saves_are_due_after_an_interval_and_from_the_last_save_on():
    with Stop(every=0.05 / 60) as stop:
        assert stop.agreed() == GO_ON
        time.sleep(0.06)
        assert stop.agreed() == SAVE
        stop.saved()
        assert stop.agreed() == GO_ON


def test_a_run_leaves_before_its_time_is_over():
    with Stop(60, 0.05 / 60, {}) as stop:
        assert stop.agreed() == GO_ON
        time.sleep(0.06)
        assert (stop.agreed(), stop.reason) == (LEAVE, "the time limit")
    for left, answer in ((MARGIN - 5, LEAVE), (MARGIN + 60, GO_ON)):
        assert Stop(60, 0, {"SLURM_JOB_END_TIME": str(int(time.time() + left))}).agreed() == answer
    assert Stop(60, 0, {}).agreed() == GO_ON


def test_the_command_line_leaves_with_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    def stopped(config, **options):
        raise Stopped("stopped by SIGTERM after step 3 of 9")

    monkeypatch.setattr(experiment, "train", stopped)
    (tmp_path / "c.yaml").write_text("data: {store: x}")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--config", str(tmp_path / "c.yaml")])
    assert left.value.code == 75
    assert capsys.readouterr().err == "distdiff: stopped by SIGTERM after step 3 of 9\n"
