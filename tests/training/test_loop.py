"""The loop: exact resume, the same losses on one process and two, loud stops."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import distdiff
from distdiff import config, experiment
from distdiff.data.feed.loader import Loading
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.process.survival import Survival
from distdiff.training import checkpoint, loop, losses, validation
from distdiff.training.noise import Noise
from distdiff.training.settings import Optim, Recipe, Training
from distdiff.training.times import Times

SETTINGS = {
    "denoiser": {"kind": "mlp", "width": 16, "depth": 1},
    "optim": {"warmup_cells": 100},
    "train": {"cells": 1280, "batch": 32, "grain": 8, "eval_cells": 320, "checkpoint_cells": 640, "patience": 100},
    "evaluate": {"enabled": False},
    "tracking": {"enabled": False},
}


def make(store: Path, out: Path, survival=None, **train) -> config.Config:
    tree = json.loads(json.dumps(SETTINGS)) | {"survival": survival or {}}
    tree["train"] |= {"out": str(out), **train}
    return config.parse({"data": {"store": str(store), "labels": ["cell_type"]}, **tree})


def final(out: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(checkpoint.latest(out / "checkpoints"), {})
    return {f"{n}:{k}": v for n in ("weights", "ema", "optimizer") for k, v in getattr(saved, n).items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


DROPS = {"kind": "csdi", "width": 8, "depth": 1, "heads": 1, "dropout": 0.5}


@pytest.mark.parametrize(
    ("times", "denoiser"), [("uniform", None), ("stratified", None), ("learned", None), ("uniform", DROPS)]
)
def test_twenty_and_twenty_steps_are_forty_bit_for_bit(atlas, tmp_path, monkeypatch, times, denoiser):
    survival = {"time": times}
    if denoiser:
        monkeypatch.setitem(SETTINGS, "denoiser", denoiser)
    first = experiment.train(make(atlas, tmp_path / "whole", survival)).progress
    assert (len(set(first.times["density"])) > 1) == (times == "learned")
    real = loop.train

    def stops(recipe, accelerator, hooks, **kwargs):
        def on_step(step, loss):
            if step == 20:
                raise KeyboardInterrupt

        return real(recipe, accelerator, dataclasses.replace(hooks, on_step=on_step), **kwargs)

    monkeypatch.setattr(experiment, "fit", stops)
    torch.manual_seed(1)  # torch's own generator is nobody's
    with pytest.raises(KeyboardInterrupt):
        experiment.train(make(atlas, tmp_path / "parts", survival))
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-000000020"]
    monkeypatch.setattr(experiment, "fit", real)
    outcome = experiment.train(make(atlas, tmp_path / "parts", survival))
    assert outcome.progress.step == 40
    assert_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_every_step_is_logged_and_the_best_model_kept(atlas, tmp_path):
    outcome = experiment.train(make(atlas, tmp_path / "run"))
    history = outcome.progress.history
    assert [h["cells"] for h in history] == [320, 640, 960, 1280]
    assert history[-1]["val/deviance"] < history[0]["val/deviance"]
    assert outcome.progress.best == min(h["val/deviance"] for h in history)
    assert (outcome.model / "weights.safetensors").exists()
    assert (tmp_path / "run" / "training.png").stat().st_size > 1000


def test_a_run_starts_from_a_trained_model_of_other_genes(atlas, counts, tmp_path, capsys):
    """Genes that both have keep their weights, in any order; new ones start fresh; a wrong network is refused."""
    from distdiff.data.ingest.shard import shard
    from distdiff.model import Model

    trained = Model.load(experiment.train(make(atlas, tmp_path / "first")).model)
    other = counts[:, ::-1][:, :25].copy()
    other.var_names = [*other.var_names[:-2], "new1", "new2"]
    other.write_h5ad(tmp_path / "other.h5ad")
    shard([tmp_path / "other.h5ad"], tmp_path / "other.zarr", labels=("cell_type",), workers=0, progress=False)
    start = str(tmp_path / "first" / "model")
    one_step = {"cells": 32, "eval_cells": 32, "start": start}
    got = experiment.train(make(tmp_path / "other.zarr", tmp_path / "second", **one_step))
    assert "23 of 25 genes start from" in capsys.readouterr().out
    model = Model.load(got.model)
    here = [g for g in model.spec.genes if g in trained.spec.genes]
    there = [trained.spec.genes.index(g) for g in here]
    mine = model.denoiser.evidence.weight[:, [model.spec.genes.index(g) for g in here]]
    moved = (mine - trained.denoiser.evidence.weight[:, there]).abs().max()
    assert moved < 0.01  # one warm-up step from where the other run ended
    tree = {"denoiser": {"kind": "mlp", "width": 24, "depth": 1}}
    odd = config.parse(make(atlas, tmp_path / "third", start=start).as_dict() | tree)
    with pytest.raises(ValueError, match=r"train.start=.*has shape"):
        experiment.train(odd)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"evaluate": {"cell_type": "celltype"}},
            "evaluate.cell_type: .*'celltype'; did you mean 'cell_type'",
        ),
        ({"loader": {"strata": "celltype"}}, "loader.strata: .* no label 'celltype'"),
        ({"data": {"labels": ["celltype"]}}, "data.labels: .* no label 'celltype'"),
    ],
)
def test_labels_that_the_store_lacks_are_named_before_training(atlas, tmp_path, change, words):
    tree = make(atlas, tmp_path / "run").as_dict()
    for section, values in change.items():
        tree[section] |= {"enabled": True, **values} if section == "evaluate" else values
    with pytest.raises(ValueError, match=words):
        experiment.train(config.parse(tree))
    assert not (tmp_path / "run").exists()


def of_twenty_cells(score, first=0.0):
    """What `validation.scores` finds if all validation cells of the atlas have this score, and the first one more."""
    cells = torch.full((20,), float(score))
    cells[0] += first
    return {"val/deviance": cells, "val/loss": cells}


def test_a_run_trains_on_for_longer(atlas, tmp_path, monkeypatch, capsys):
    """As the message of an early stop, and of a model that a regression beats, says: more patience, more cells."""
    real = loop.scores
    rising = itertools.count(1.0)
    monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(next(rising)))
    short = experiment.train(make(atlas, tmp_path / "run", patience=1, eval_cells=320))
    assert short.progress.step == 20
    said = capsys.readouterr().out
    assert "after step 20 of 40: val/deviance was worse than 1.0000, that of step 10, by more than chance in 1" in said
    more = experiment.train(make(atlas, tmp_path / "run", patience=100, eval_cells=320))
    assert more.progress.step == 40
    assert "stopped early" not in capsys.readouterr().out
    monkeypatch.setattr(loop, "scores", real)
    longer = experiment.train(make(atlas, tmp_path / "run", cells=1920))
    assert longer.progress.step == 60
    with pytest.raises(ValueError, match=r"made with another config: train.seed was 0, is 1"):
        experiment.train(make(atlas, tmp_path / "run", cells=2560, seed=1))
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    state = json.loads((newest / "state.json").read_text())
    state["config"]["train"] |= {"cells": 1920, "patience": 100}  # as older versions of distdiff wrote them
    state.pop(checkpoint.SEAL)
    (newest / "state.json").write_text(json.dumps({**state, checkpoint.SEAL: checkpoint._seal(state)}))
    assert experiment.train(make(atlas, tmp_path / "run", cells=2048)).progress.step == 64


def test_early_stop(atlas, tmp_path, monkeypatch):
    scores = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(next(scores)))
    outcome = experiment.train(make(atlas, tmp_path / "run", patience=2))
    assert outcome.progress.step == 40
    scores = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    outcome = experiment.train(make(atlas, tmp_path / "short", patience=2, eval_cells=160))
    assert (outcome.progress.step, outcome.progress.best_step, outcome.progress.best) == (20, 10, 2.0)
    noise = iter([0.0, 9.0, 9.0, 9.0, 9.0])  # worse on average, as one cell is
    monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(2.0, first=next(noise)))
    outcome = experiment.train(make(atlas, tmp_path / "noise", patience=1, eval_cells=320))
    assert (outcome.progress.step, outcome.progress.best_step) == (40, 10)


def test_a_run_that_goes_on_stops_where_it_would_have(atlas, tmp_path, monkeypatch):
    scores = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(next(scores)))
    first = experiment.train(make(atlas, tmp_path / "run", patience=2, cells=640))
    assert (first.progress.step, first.progress.bad) == (20, 1)
    outcome = experiment.train(make(atlas, tmp_path / "run", patience=2))  # knows the cells of step 10 as they were
    assert (outcome.progress.step, outcome.progress.best_step, outcome.progress.bad) == (30, 10, 2)
    assert outcome.progress.best_cells == [1.0] * 20


def test_length_by_the_data(atlas, tmp_path, monkeypatch, capsys):
    from distdiff.model import Model
    from distdiff.training import fit

    monkeypatch.setattr(fit, "length", lambda cells: 8 * cells)
    outcome = experiment.train(config.parse({**make(atlas, tmp_path).as_dict(), "train": {
        "out": str(tmp_path), "cells": "auto", "eval_cells": "auto", "batch": 32, "grain": 8, "checkpoint_cells": 10**9,
    }}))  # fmt: skip
    assert "train.cells=1272, 8 passes over 159 training cells" in capsys.readouterr().out
    assert outcome.progress.step == 40  # ceil(1272 / 32)
    assert len(outcome.progress.history) == 20
    assert Model.load(outcome.model).info["config"]["train"]["cells"] == 1272


def test_a_loss_that_is_not_finite_names_step_and_rows(atlas, tmp_path, monkeypatch):
    real = losses.of_cells

    def bad(*args, **law):
        loss = real(*args, **law)
        return loss * float("nan") if args[-1] >= 5 * 32 else loss

    monkeypatch.setattr(losses, "of_cells", bad)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 5, rows \d+, .*resume=never"):
        experiment.train(make(atlas, tmp_path / "run"))


def test_a_changed_store_or_config_is_not_continued(atlas, tmp_path):
    experiment.train(make(atlas, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"another config: train.seed was 0, is 1"):
        experiment.train(make(atlas, tmp_path / "run", seed=1))
    with pytest.raises(ValueError, match="has no label 'celltype'; did you mean 'cell_type'"):
        experiment.train(config.parse({"data": {"store": str(atlas), "labels": ["celltype"]}}))
    with pytest.raises(ValueError, match=r"cannot be shared by 1 processes in groups of train\.grain=7"):
        experiment.train(make(atlas, tmp_path / "other", grain=7))


def test_validation_shards_by_blocks_and_adds_up(atlas, monkeypatch):
    """The sums of two ranks are the sums of one, uneven last block included."""
    from accelerate import Accelerator

    from distdiff.model import Model
    from distdiff.training.optim import Optim

    store = CountStore.open(atlas)
    model = Model.new(store.spec(()), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    recipe = Recipe(store, model.process, model.denoiser, Survival(), Optim(), Training())
    monkeypatch.setattr(validation, "BLOCK", 10)

    class Rank:
        device, autocast = torch.device("cpu"), contextlib.nullcontext

        def __init__(self, index, world):
            self.process_index, self.num_processes, self.sums = index, world, None

        def reduce(self, tensor, _):
            self.sums = tensor
            return tensor

    def sums(index, world):
        rank = Rank(index, world)
        rows = store.rows("all")[:37]
        validation.scores(recipe, rows, model.denoiser, rank)
        return rank.sums

    assert torch.allclose(sums(0, 1), sums(0, 2) + sums(1, 2))
    assert Accelerator().num_processes == 1


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--cpu", "--num_processes", "2"], 2),
        (["--cpu", "--num_processes=2"], 2),
        (["--num-processes=3", "--multi_gpu"], 3),
        (["--config_file", "multi.yaml"], 2),
        (["--config_file=multi.yaml", "--num_processes=1"], 1),
        (["--cpu"], None),
    ],
)
@pytest.mark.parametrize("launcher", [["accelerate", "launch"], ["python", "-m", "accelerate.commands.launch"]])
def test_what_a_launcher_was_asked_for(tmp_path, monkeypatch, launcher, words, asked):
    from distdiff.training.launched import options_of

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", "none")
    Path("multi.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
        "mixed_precision: bf16\nnum_machines: 1\nmachine_rank: 0\n"
    )
    rest = ["launch/train.py", "--config", "c.yaml", "--num_processes=9"]
    found = options_of([*launcher, *words, "--gradient_accumulation_steps=4", *rest])
    assert (found["num_processes"], found["gradient_accumulation_steps"]) == (asked, 4)
    assert found["mixed_precision"] == ("bf16" if "multi.yaml" in words[0] + words[-1] else None)
    assert options_of(["bash", "-c", "accelerate launch --num_processes 2 x.py"]) == {}


def test_options_of_the_launcher_that_do_nothing_are_told(atlas, tmp_path, monkeypatch, capsys):
    asked = {"mixed_precision": "bf16", "gradient_accumulation_steps": 4}
    monkeypatch.setattr("distdiff.training.launched._launcher", lambda: asked)
    experiment.train(make(atlas, tmp_path / "told", cells=320, precision="fp32"))
    said = capsys.readouterr().out
    assert "the launcher's mixed_precision=bf16 has no effect; train.precision decides: no" in said
    assert "the launcher's gradient_accumulation_steps=4 has no effect; train.accumulate decides" in said
    monkeypatch.setattr("distdiff.training.launched._launcher", lambda: {"mixed_precision": "no"})
    experiment.train(make(atlas, tmp_path / "quiet", cells=320, precision="fp32"))
    assert "no effect" not in capsys.readouterr().out
    assert_equal(final(tmp_path / "told"), final(tmp_path / "quiet"))


@pytest.mark.distributed
def test_a_launcher_that_silently_runs_one_process_is_caught(atlas, tmp_path):
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(make(atlas, tmp_path / "run").as_dict()))
    launch = Path(__file__).parents[2] / "launch" / "train.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", str(launch)]
    done = subprocess.run([*command, "--config", str(settings)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "2 processes were asked for, 1 is running" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mixture_that_hides_nothing_is_judged_by_its_loss(atlas, tmp_path):
    alike = {"hidden": 0, "two_level": 0, "uniform": 1}
    progress = experiment.train(make(atlas, tmp_path, survival=alike, cells=640)).progress
    assert progress.judge == "val/loss"
    assert progress.best == min(h["val/loss"] for h in progress.history)


@pytest.mark.parametrize("process", [{"kind": "counts"}, {"kind": "gaussian"}, {"kind": "masked", "clamp": True}])
@pytest.mark.parametrize(
    ("times", "source"),
    [("uniform", "streams"), ("stratified", "streams"), ("learned", "streams"), ("stratified", "rows")],
)
def test_what_the_network_sees_is_the_same_for_any_number_of_ranks(atlas, process, times, source):
    """Bit for bit: counts, survival and withheld labels of a step's 48 cells, on 1, 2 and 3 processes."""
    from distdiff.model import Model
    from distdiff.training.times import Times

    store, settings = CountStore.open(atlas), Training(batch=48, grain=8, label_dropout=0.5, noise=source)
    cells = store.cells(np.arange(48), ("cell_type",))
    model = Model.new(store.spec(("cell_type",)), process, {"kind": "mlp", "width": 8, "depth": 1})

    def seen(world):
        parts = []

        def network(x, p, cond):
            parts.append((x, p, cond.labels["cell_type"]))
            return model.denoiser(x, p, cond)

        for rank in range(world):
            first, n = 5 * 48 + rank * 48 // world, 48 // world
            drawn = Times(times, 48, 0, torch.device("cpu"))
            mine = cells[slice(first - 5 * 48, first - 5 * 48 + n)]
            noise = Noise(model.process, Survival(time=times), drawn, settings)
            losses.of_cells(noise, network, mine, 5, first)
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    one = seen(1)
    assert (one[1] < 1).any()
    assert (one[2] < 0).any()
    for world in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, seen(world), strict=True))


@pytest.mark.parametrize(("asked", "imputed", "drawn"), [(0.2, 0.6, 0.2), (0.8, 0.8, 0.8), (0.0, 0.0, 0.0)])
def test_cells_that_are_imputed_mostly_go_without_labels(atlas, asked, imputed, drawn):
    """As a user's cells do; those drawn from nothing keep theirs, and 0 withholds none."""
    from distdiff.model import Model
    from distdiff.training.times import Times

    store, n = CountStore.open(atlas), 4096
    settings = Training(batch=n, grain=n, label_dropout=asked)
    model = Model.new(store.spec(("cell_type",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    noise = Noise(model.process, Survival(), Times("uniform", n, 0, torch.device("cpu")), settings)
    seen = noise.draw(store.cells(np.arange(n) % 100, ("cell_type",)), 0, 0)
    evidence, without = (seen.p == 1).any(1), seen.cond.labels["cell_type"] < 0
    assert without[evidence].float().mean() == pytest.approx(imputed, abs=0.03)
    assert without[~evidence].float().mean() == pytest.approx(drawn, abs=0.04)
    assert model.denoiser.condition.tables[0].weight.detach().std() == pytest.approx(
        1, abs=0.5
    )  # told apart from the start


def test_a_run_that_goes_on_elsewhere_has_a_best_model_all_the_same(atlas, tmp_path, monkeypatch):
    """Its best weights stayed in the first folder, and no later validation is better."""
    experiment.train(make(atlas, tmp_path / "first"))
    middle = sorted((tmp_path / "first" / "checkpoints").iterdir())[0]
    monkeypatch.setattr(loop, "scores", lambda *_: of_twenty_cells(1e6))
    outcome = experiment.train(make(atlas, tmp_path / "second", resume=str(middle)))
    assert outcome.progress.step == 40
    assert (tmp_path / "second" / "model" / "model.json").exists()


def test_trainings_of_one_process_may_differ_in_precision(atlas, tmp_path):
    for precision in ("fp32", "bf16", "fp32"):
        history = experiment.train(
            make(atlas, tmp_path / precision, precision=precision, resume="never")
        ).progress.history
        assert np.isfinite(history[-1]["val/deviance"])


@pytest.mark.parametrize(("natural", "even"), [("auto", True), (False, False)])
def test_imputation_is_learned_in_the_proportions_of_the_data(natural, even, tmp_path):
    """Rare labels are read more often; the weights of cells with evidence add up to the data's, others stay."""
    counts = np.random.default_rng(0).poisson(1.0, (800, 12)).astype(np.float32)
    kind = np.array(["common", "rare"])[(np.arange(800) % 10 == 0).astype(int)]
    adata = ad.AnnData(counts, obs=pd.DataFrame({"kind": kind}, index=np.arange(800).astype(str)))
    distdiff.shard(adata, tmp_path / "x.zarr", labels=["kind"], workers=0, progress=False)
    store = CountStore.open(tmp_path / "x.zarr")
    model = Model.new(store.spec(("kind",)), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    loading = Loading(natural=natural)
    recipe = Recipe(store, model.process, model.denoiser, Survival(), Optim(), Training(batch=400), loading, ("kind",))
    index = store.rows("train")
    shares = recipe.loading.shares(store, index, recipe.labels)
    assert (shares is not None) == even
    noise = Noise(
        recipe.process, recipe.survival, Times("uniform", 400, 0, torch.device("cpu")), recipe.settings, shares
    )
    plan = recipe.loading.plan(store, index, 400, 0)
    found = []
    for step in range(20):
        cells = store.cells(index[plan.rows(step)], ("kind",))
        noised = noise.draw(cells, step, 400 * step)
        found += zip(
            cells.labels.labels["kind"].tolist(), (noised.p == 1).any(1).tolist(), noised.weight.tolist(), strict=True
        )
    label, evidence, weight = (np.array(x) for x in zip(*found, strict=True))
    rare = list(store.manifest.labels["kind"]).index("rare")
    assert np.mean(label == rare) == pytest.approx(0.25, abs=0.01)  # read: 1 of 1 + sqrt(9)
    assert (weight[~evidence] == 1).all()
    share = weight[evidence & (label == rare)].sum() / weight[evidence].sum()
    assert share == pytest.approx(0.1 if even else 0.25, abs=0.02)
