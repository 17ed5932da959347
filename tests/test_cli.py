"""The command line as a user meets it; in processes of their own where that is what is tested."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest


def in_a_process(*words, cwd):
    command = [sys.executable, "-m", "distdiff.cli", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def distdiff(tmp_path, monkeypatch, capsys):
    """``distdiff WORDS...`` in an empty folder, in this process: its exit code and what it said."""
    from distdiff.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        return done.value.code, *capsys.readouterr()

    return run


def test_import_is_light():
    code = "import sys, distdiff; print([m for m in ('mlflow', 'scanpy', 'dask', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    code = (
        "import sys, distdiff, distdiff.model, distdiff.data.store.store;"
        "print([m for m in ('mlflow', 'scanpy', 'dask', 'deepspeed', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_whole_job_command_by_command(counts, tmp_path, distdiff):
    counts.write_h5ad("a.h5ad")
    code, out, err = distdiff("shard", "a.h5ad", "--out", "atlas.zarr", "--labels", "cell_type", "--workers", 1)
    assert code == 0, err
    assert "199 cells x 30 genes" in out
    assert "dashboard" in out.lower()
    Path("c.yaml").write_text(
        "data: {store: atlas.zarr}\ndenoiser: {kind: mlp, width: 16, depth: 1}\n"
        "train: {out: run, cells: 640, batch: 32, eval_cells: 320}\n"
        "evaluate: {cell_type: cell_type, repaint_steps: 3}\ntracking: {model: small}\n"
    )
    code, out, err = distdiff("train", "--config", "c.yaml", "train.cells=320")
    assert code == 0, err
    assert "registered: small version 1, now 'champion'" in out
    assert "RePaint" in out
    champion = ("--model", "models:/small@champion")
    code, _, err = distdiff("evaluate", *champion, "--data", "a.h5ad", "--repaint-steps", 0, "--out", "table")
    assert code == 0, err
    assert json.loads(Path("table/table.json").read_text())
    assert Path("table/calibration.png").exists()
    words = ("impute", *champion, "--data", "a.h5ad", "--out", "b.h5ad", "--sites", "dropout", "--groups", "cell_type")
    done = in_a_process(*words, "--draws", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 cells without evidence" in done.stdout
    out = ad.read_h5ad("b.h5ad")
    observed = counts.X.toarray() > 0
    assert (np.asarray(out.layers["imputed"])[observed] == counts.X.toarray()[observed]).all()


MISTAKES = [
    (["shard", "nowhere.h5ad", "--out", "x.zarr"], "nowhere.h5ad does not exist"),
    (["shard", "a.h5ad", "--out", "x.zarr", "--split", "a,b"], "must be three numbers"),
    (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    (["train", "mine.zarr"], "override 'mine.zarr' must read key=value, for example data.store=mine.zarr"),
    (["train", "--config", "bad.yaml"], "unknown key 'dat'; did you mean 'data'"),
    (["impute", "--model", "nowhere", "--data", "a.h5ad", "--out", "b.h5ad"], "no model folder at nowhere"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(counts, distdiff, words, message):
    counts.write_h5ad("a.h5ad")
    Path("bad.yaml").write_text("dat: {store: x}")
    code, _, err = distdiff(*words)
    assert code == 2
    assert message in err
    assert err.startswith("distdiff: error: ")
    assert "Traceback" not in err


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = in_a_process(*MISTAKES[2][0], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("distdiff: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_interrupted_then_run_twice(counts, tmp_path, distdiff, monkeypatch):
    """On a small file with a short training; tests/test_walk.py runs all of it."""
    from distdiff import quickstart
    from distdiff.training.engine import Engine

    real = quickstart.settings

    def short(*given):
        settings = real(*given)
        settings["train"] |= {"cells": 640, "eval_cells": 320, "checkpoint_cells": 320}
        settings["evaluate"] |= {"cells": 20, "repaint_steps": 3}
        return settings | {"denoiser": {"kind": "mlp", "width": 16, "depth": 1}}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "settings", short)
    counts.write_h5ad("mine.h5ad")
    words = ("quickstart", "--data", "mine.h5ad")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        assert distdiff(*words)[0] == 130
    assert list((tmp_path / "distdiff-quickstart").rglob(".*tmp*")) == []
    for _ in range(2):
        code, out, err = distdiff(*words)
        assert code == 0, err
        assert "in Poisson deviance" in out
        assert (tmp_path / "distdiff-quickstart" / "figures" / "umap.png").stat().st_size > 1000


def test_the_quickstart_goes_on_with_the_model_it_made():
    from distdiff.quickstart import after
    from tests.test_launch import parse

    text = after(Path("my runs/run/model"), Path("a.zarr"), Path("b.h5ad"), Path("c.h5ad"), groups="T cells", layer="x")
    lines = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("distdiff ")]
    assert [words[1] for words in lines] == ["denoise", "impute", "evaluate"]
    for words in lines:
        assert words[words.index("--model") + 1] == "my runs/run/model"
        parse(words[1:])
    assert lines[0][lines[0].index("--layer") + 1] == "x"


@pytest.mark.parametrize("word", ["--model=~/m", "~/m"])
def test_the_home_folder_is_known_where_no_shell_expands_it(tmp_path, monkeypatch, capsys, word):
    from distdiff.cli import main

    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word] if word.startswith("--") else ["--model", word]
    with pytest.raises(SystemExit):
        main(["impute", *words, "--data", "x.h5ad", "--out", "y.h5ad"])
    assert f"no model folder at {tmp_path}/m" in capsys.readouterr().err


def test_tasks_on_files(atlas, tmp_path, distdiff):
    from distdiff.data.store.store import CountStore
    from distdiff.model import Model

    def said(*words):
        code, out, err = distdiff(*words)
        assert code == 0, err
        return out

    spec = CountStore.open(atlas).spec(("cell_type",))
    Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1}).save(tmp_path / "m")
    (tmp_path / "genes.txt").write_text("gene3\ngene1\n")
    given = ("--model", "m", "--data", atlas)
    told = said("denoise", *given, "--out", "a.zarr", "--genes", "genes.txt", "--dtype", "float16")
    assert "bytes a cell" in told
    assert "199 cells x 2 genes" in told
    assert "network calls (1.0 a cell)" in told
    out = ad.read_zarr(tmp_path / "a.zarr")
    assert list(out.var_names) == ["gene3", "gene1"]
    assert out.uns["distdiff"]["command"].startswith("distdiff denoise --model m --data atlas.zarr --out a.zarr")
    assert "are as written" in said("denoise", *given, "--out", "a.zarr", "--verify")
    said("generate", "--model", "m", "--n", 20, "--out", "b.h5ad", "--obs", "cell_type=T", "--steps", 2)
    assert set(ad.read_h5ad(tmp_path / "b.h5ad").obs["cell_type"]) == {"T"}
    table = said(
        "evaluate", *given, "--task", "generate", "--cells", 4, "--steps", 1, "--depth", 50, "--no-scvi", "--out", "r"
    )
    assert "labels with 15 training cells or more are recognised" in table
    assert '"depth": "50.0"' in (tmp_path / "r" / "generate.json").read_text()
    said("deepen", *given, "--out", "c.zarr", "--times", 2, "--beyond", "allow")
    assert "deepened" in ad.read_zarr(tmp_path / "c.zarr").layers


@pytest.mark.long  # tests/batch/test_engines.py has accelerate's launcher
@pytest.mark.distributed
def test_torchs_launcher_with_two_processes(atlas, tmp_path):
    from pathlib import Path

    from distdiff.data.store.store import CountStore
    from distdiff.model import Model

    spec = CountStore.open(atlas).spec(())
    Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1}).save(tmp_path / "m")
    np.save(tmp_path / "mask.npy", np.random.default_rng(0).random((199, 30)) < 0.1)
    script = Path(__file__).parents[1] / "launch" / "impute.py"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "--model", "m",
        "--data", atlas, "--out", "out.zarr", "--mask", "mask.npy", "--shard-cells", "16", "--batch-size", "16",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("199 cells x 30 genes") == 1  # one process speaks for both
    assert ad.read_zarr(tmp_path / "out.zarr").shape == (199, 30)


def test_an_interrupted_command_ends_in_a_sentence(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("distdiff.data.ingest.shard.shard", interrupted)
    from distdiff.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["shard", "a.h5ad", "--out", "b"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("distdiff: interrupted; nothing half-written was published")
