"""benchmarks/gpu: a part that hangs or fails costs its own time alone, and the page says what is missing."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.scripts import loaded

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    yield loaded(GPU / "run.py")
    sys.modules.pop("page", None)


def running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


SCRIPT = """
import json, subprocess, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
open(out, "w").write(json.dumps({"mlp, 2,000 genes": {"cells/s": 5.0, "data_wait": 0.01}}))
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("child = subprocess.Popen(['sleep', '300']); print(child.pid, flush=True); time.sleep(300)", None),
        ("sys.exit('no kernel')", 1),
    ],
)
def test_a_part_that_hangs_or_fails_keeps_what_it_found(run, tmp_path, ending, status):
    (tmp_path / "train.py").write_text(SCRIPT + textwrap.dedent(ending))
    began = time.monotonic()
    found = run.run_part("train", 5, tmp_path, tmp_path / "log", scripts=tmp_path)
    assert time.monotonic() - began < 20
    assert found["ended"]["rc"] == status
    assert found["mlp, 2,000 genes"]["cells/s"] == 5.0
    words = found["ended"]["last words"]
    if status is None:  # and nothing of it goes on
        while running(int(words[-1])):
            assert time.monotonic() - began < 30
            time.sleep(0.05)
    else:
        assert words[-1] == "no kernel"
    about = {"device": "X", "memory GiB": 80.0, "torch": "2", "python": "3", "cpus": 1}
    page = run.page.made({"machine": about, "commit": "c", "dry": False, "parts": {"train": found}})
    assert ("stopped at its limit" in page) == (status is None)
    assert "| share of training that waits for data, at worst | at most 0.02 | 0.01 | met |" in page
    assert "| 1,000,000 cells x 2,000 genes, mean: seconds | at most 120 | - | not measured |" in page


def test_the_parts_fit_into_one_call(run):
    assert sum(run.PARTS.values()) <= 540
    assert all((GPU / f"{name}.py").exists() for name in run.PARTS)
    assert set(run.page.PAGES) == set(run.PARTS)


def test_a_missed_target_is_told(run):
    million = {
        "ended": {"rc": 0},
        "1,000,000, mean": {"s": 300.0, "cells/s": 3333.0},
        "1,000,000, 1 draw": {"error": "x"},
    }
    about = {"device": "X", "torch": "2", "python": "3", "cpus": 1}
    page = run.page.made({"machine": about, "commit": "c", "dry": False, "parts": {"million": million}})
    assert "| at most 120 | 300 | **missed** |" in page
    assert "| 1,000,000, 1 draw | - | - | - | - | x |" in page
