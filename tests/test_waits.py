"""Lines on what takes its time."""

from __future__ import annotations

import logging
import time

from distdiff import waits


def test_a_long_wait_is_told_and_a_short_one_is_not(monkeypatch, capfd):
    monkeypatch.setattr(waits, "PATIENCE", 0.01)
    with waits.waiting("clusters cells"):
        time.sleep(0.1)
    assert capfd.readouterr().err == "distdiff clusters cells; this takes a while\n"
    with waits.waiting("clusters cells", show=False):
        time.sleep(0.05)
    logging.getLogger("distdiff").setLevel(logging.ERROR)  # as --quiet does
    try:
        with waits.waiting("clusters cells"):
            time.sleep(0.05)
    finally:
        logging.getLogger("distdiff").setLevel(logging.NOTSET)
    monkeypatch.setattr(waits, "PATIENCE", 60.0)
    with waits.waiting("clusters cells"):
        pass
    assert capfd.readouterr().err == ""


def test_the_expected_time_is_told_once_and_not_of_a_short_run():
    clock = iter(range(1000))
    pace = waits.Pace(1005, 10, clock=lambda: float(next(clock)))
    texts = [text for step in range(1, 100) if (text := pace.after(step))]
    assert texts == ["about 17 min for 10,050 cells (10 a second), less if validation stops improving"]
    fast = waits.Pace(50, 10, clock=lambda: 0.0)
    assert not any(fast.after(step) for step in range(1, 51))
