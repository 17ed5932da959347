"""Sweeps of a grid: a row for each value, one training for all of them, and a figure."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from distdiff import grid
from distdiff.config import shipped
from distdiff.grid import sweep
from distdiff.grid.spec import Ours, read

TINY = ["train.cells=256", "denoiser.width=8", "train.eval_cells=128", "train.checkpoint_cells=128"]
FAST = ["train.cells=2560", "optim.lr=0.02", "optim.warmup_cells=128"]
WHOLE = {"data": {"a": {"store": "a.zarr"}}, "protocols": [{"protocol": "mcar"}]}


def test_one_key_at_a_time_is_swept():
    row = {"train": "quick", "name": "q", "steps": 20, "method": "repaint"}
    lines = read({**WHOLE, "rows": [{**row, "sweep": {"steps": [1, 8], "attrition": [0, 0.02]}}]}).rows
    assert [line.name for line in lines] == ["q, steps=1", "q, steps=8", "q, attrition=0", "q, attrition=0.02"]
    assert [(line.options.steps, line.options.attrition) for line in lines] == [(1, 0), (8, 0), (20, 0), (20, 0.02)]
    assert [line.swept for line in lines[::3]] == [("q", "steps", 1), ("q", "attrition", 0.02)]
    assert all(line.ours for line in lines)


def test_a_baseline_and_its_negative_binomial_are_swept_by_the_name_of_the_row():
    lines = read({**WHOLE, "nb": True, "rows": [{"kind": "countsdiff", "sweep": {"attrition": [0.0, 0.02]}}]}).rows
    first = "CountsDiff as published"
    assert [line.name for line in lines] == [
        f"{first}, attrition=0", f"{first} + NB, attrition=0", f"{first}, attrition=0.02",
        f"{first} + NB, attrition=0.02",
    ]  # fmt: skip
    assert lines[2].options["attrition"] == lines[3].options["of"]["attrition"] == 0.02


@pytest.mark.parametrize(
    ("swept", "said"),
    [
        ({"stesp": [1]}, "did you mean 'steps'"),
        ({"steps": 4}, r"rows\[0\]: sweep of steps must be a list of numbers or words, got 4"),
        ({"steps": []}, "must be a list"),
        ({"steps": [1, 1]}, "holds a value twice"),
        ([1, 2], "must map options to values"),
        ({"steps": ["many"]}, "steps"),
    ],
)
def test_what_is_no_sweep(swept, said):
    with pytest.raises(ValueError, match=said):
        read({**WHOLE, "rows": [{"train": "quick", "sweep": swept}]})


def test_a_sweep_trains_one_model_and_draws_a_figure(atlas, tmp_path):
    row = {"train": "quick", "settings": [*TINY, *FAST, "data.labels=[cell_type]"], "labels": True}
    rows = [
        {**row, "name": "once", "sweep": {"steps": [1, 2], "guidance": [0, 1, 2]}},
        {**row, "name": "paint", "method": "repaint", "steps": 3, "sweep": {"steps": [2], "attrition": [0, 0.5]}},
        {"kind": "zero"},
    ]
    spec = {
        "rows": rows, "resamples": [4, 4], "cells": 12, "draws": 2, "cell_type": "cell_type",
        "answers": ["mean", "1 draw", "draws"], "protocols": [{"protocol": "mcar", "rate": 0.4}],
    }  # fmt: skip
    table = grid.run(spec, tmp_path, data=[str(atlas)], progress=False).table
    assert set(table.status) == {"done"}, table.reason.unique()
    assert len(list((tmp_path / "models").iterdir())) == 1
    rmse = table[(table.metric == "rmse") & (table.answer == "1 draw")].set_index("row").value
    assert rmse["once, steps=1"] == rmse["once, guidance=1"]  # the default of both
    assert rmse["once, guidance=0"] != rmse["once, guidance=2"]
    assert rmse["paint, attrition=0"] != rmse["paint, attrition=0.5"]
    about = table.drop_duplicates("row").set_index("row")[["of", "swept", "at"]]
    assert about.loc["paint, attrition=0.5"].tolist() == ["paint", "attrition", "0.5"]
    assert about.loc["none (zero)"].tolist() == ["none (zero)", "", ""]
    assert {p.name for p in tmp_path.glob("sweep_*.png")} == {
        f"sweep_{k}.png" for k in ("steps", "guidance", "attrition")
    }


def test_a_failing_training_of_a_sweep_is_tried_once(atlas, tmp_path, monkeypatch):
    tried = []

    def trained(name, options, store, folder, *, progress):
        tried.append(options)
        raise ValueError("it does not train")

    monkeypatch.setattr(grid, "trained", trained)
    rows = [{"train": "quick", "sweep": {"steps": [1, 2, 3]}}]
    table = grid.run({**WHOLE, "rows": rows}, tmp_path, data=[str(atlas)], progress=False).table
    assert len(tried) == 1
    assert set(table.reason) == {"no model: it does not train"}


def test_options_that_do_nothing_are_refused(atlas, tmp_path):
    plain = "process={kind: counts, head: mean, leap: plain}"
    rows = [
        {"train": "quick", "settings": TINY, "guidance": 2.0, "name": "untold"},
        {"train": "quick", "settings": TINY, "attrition": 0.1, "name": "thinned"},
        {"train": "quick", "settings": TINY, "rounding": "nearest", "name": "leap"},
        {"train": "quick", "settings": [*TINY, plain], "sweep": {"rounding": ["nearest", "random"]}, "name": "plain"},
    ]
    spec = {**WHOLE, "rows": rows, "resamples": [4, 4], "cells": 12, "draws": 2, "answers": ["1 draw"]}
    table = grid.run(spec, tmp_path, data=[str(atlas)], progress=False).table
    reasons = table[table.status == "failed"].set_index("row").reason
    assert "guidance=2 weighs labels, and this row is told none; give labels: true" in reasons["untold"]
    assert "attrition=0.1 is of method: repaint" in reasons["thinned"]
    assert "rounding='nearest' is of plain steps" in reasons["leap"]
    rmse = table[table.metric == "rmse"].set_index("row").value
    assert rmse["plain, rounding=nearest"] != rmse["plain, rounding=random"]


def test_values_of_a_figure_rise_and_words_come_last(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    ticks = []
    monkeypatch.setattr(Axes, "set_xticks", lambda ax, places, labels=None, **k: ticks.append(labels))
    lines = pd.DataFrame({
        "data": "a", "protocol": "p", "of": "r", "swept": "k", "at": ["10", "2", "auto", "1"], "metric": "crps",
        "answer": "draws", "value": [1.0, 2.0, 3.0, 4.0], "error": 0.1,
    })  # fmt: skip
    assert sweep.figures(lines, {"crps": "CRPS"}, tmp_path) == [tmp_path / "sweep_k.png"]
    assert ["1", "2", "10", "auto"] in ticks


def test_the_shipped_sweep_has_two_trainings():
    made = read("sweeps", ["cell_type=louvain"], ["atlas.zarr"])
    assert all(isinstance(line.options, Ours) and line.swept for line in made.rows)
    trainings = {(line.options.train, line.options.settings) for line in made.rows}
    assert {train for train, _ in trainings} == {"default", "published"}
    assert len(trainings) == 2
    assert {train for train, _ in trainings} <= set(shipped())
    assert {line.swept[1] for line in made.rows} == {"steps", "guidance", "attrition", "rounding"}
    assert {f.name for f in dataclasses.fields(Ours)} >= {"steps", "guidance", "attrition", "rounding"}
