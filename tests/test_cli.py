"""The command line as a user meets it, in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest


def distdiff(*words, cwd, **more):
    command = [sys.executable, "-m", "distdiff.cli", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **more)


def test_import_is_light():
    code = "import sys, distdiff; print([m for m in ('mlflow', 'scanpy', 'dask', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    code = (
        "import sys, distdiff, distdiff.model, distdiff.data.store.store;"
        "print([m for m in ('mlflow', 'scanpy', 'dask', 'deepspeed', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_whole_job_command_by_command(counts, tmp_path):
    counts.write_h5ad(tmp_path / "a.h5ad")
    done = distdiff("shard", "a.h5ad", "--out", "atlas.zarr", "--labels", "cell_type", "--workers", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "199 cells x 30 genes" in done.stdout
    assert "dashboard" in done.stdout.lower()
    (tmp_path / "c.yaml").write_text(
        "data: {store: atlas.zarr}\ndenoiser: {kind: mlp, width: 16, depth: 1}\n"
        "train: {out: run, cells: 640, batch: 32, eval_cells: 320}\n"
        "evaluate: {cell_type: cell_type, repaint_steps: 3}\ntracking: {model: small}\n"
    )
    done = distdiff("train", "--config", "c.yaml", "train.cells=320", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "registered: small version 1, now 'champion'" in done.stdout
    assert "RePaint" in done.stdout
    champion = ("--model", "models:/small@champion")
    done = distdiff("evaluate", *champion, "--data", "atlas.zarr", "--repaint-steps", 0, "--out", "table", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "table" / "table.json").read_text())
    assert (tmp_path / "table" / "calibration.png").exists()
    done = distdiff(
        "impute", *champion, "--data", "a.h5ad", "--out", "b.h5ad", "--sites", "dropout", "--groups", "cell_type",
        "--draws", 2, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 cells without evidence" in done.stdout
    out = ad.read_h5ad(tmp_path / "b.h5ad")
    observed = counts.X.toarray() > 0
    assert (np.asarray(out.layers["imputed"])[observed] == counts.X.toarray()[observed]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard", "nowhere.h5ad", "--out", "x.zarr"], "nowhere.h5ad does not exist"),
        (["shard", "a.h5ad", "--out", "x.zarr", "--split", "a,b"], "must be three numbers"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "--config", "bad.yaml"], "unknown key 'dat'; did you mean 'data'"),
        (["impute", "--model", "nowhere", "--data", "a.h5ad", "--out", "b.h5ad"], "no model folder at nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(counts, tmp_path, words, message):
    counts.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "bad.yaml").write_text("dat: {store: x}")
    done = distdiff(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("distdiff: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_interrupted_then_run_twice(tmp_path):
    command = [sys.executable, "-m", "distdiff.cli", "quickstart"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(12)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    hidden = list((tmp_path / "distdiff-quickstart").rglob(".*tmp*"))
    assert hidden == []
    done = distdiff("quickstart", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "distdiff mean is first in Poisson deviance" in done.stdout
    pictures = [f"figures/{name}.png" for name in ("umap", "markers", "violins", "genes", "depth")]
    for name in (*pictures, "imputed.h5ad", "run/evaluation/calibration.png", "run/evaluation/table.md"):
        assert (tmp_path / "distdiff-quickstart" / name).stat().st_size > 1000
    again = distdiff("quickstart", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_the_quickstart_goes_on_with_the_model_it_made():
    from distdiff.quickstart import after
    from tests.test_launch import parse

    text = after(Path("my runs/run/model"), Path("a.zarr"), Path("b.h5ad"), Path("c.h5ad"), groups="T cells", layer="x")
    lines = [shlex.split(line) for line in text.splitlines() if line.strip().startswith("distdiff ")]
    assert [words[1] for words in lines] == ["impute", "evaluate"]
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


def test_tasks_on_files(atlas, tmp_path, monkeypatch, capsys):
    from distdiff.cli import main
    from distdiff.data.store.store import CountStore
    from distdiff.model import Model

    def distdiff(*words):
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        assert done.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    spec = CountStore.open(atlas).spec(("cell_type",))
    Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1}).save(tmp_path / "m")
    (tmp_path / "genes.txt").write_text("gene3\ngene1\n")
    given = ("--model", "m", "--data", atlas)
    said = distdiff("denoise", *given, "--out", "a.zarr", "--genes", "genes.txt", "--dtype", "float16")
    assert "bytes a cell" in said
    assert "199 cells x 2 genes" in said
    assert "network calls (1.0 a cell)" in said
    out = ad.read_zarr(tmp_path / "a.zarr")
    assert list(out.var_names) == ["gene3", "gene1"]
    assert out.uns["distdiff"]["command"].startswith("distdiff denoise --model m --data atlas.zarr --out a.zarr")
    assert "are as written" in distdiff("denoise", *given, "--out", "a.zarr", "--verify")
    distdiff("generate", "--model", "m", "--n", 20, "--out", "b.h5ad", "--obs", "cell_type=T", "--steps", 2)
    assert set(ad.read_h5ad(tmp_path / "b.h5ad").obs["cell_type"]) == {"T"}
    table = distdiff(
        "evaluate", *given, "--task", "generate", "--cells", 4, "--steps", 1, "--depth", 50, "--no-scvi", "--out", "r"
    )
    assert "labels with 15 training cells or more are recognised" in table
    assert '"depth": "50.0"' in (tmp_path / "r" / "generate.json").read_text()
    distdiff("deepen", *given, "--out", "c.zarr", "--times", 2, "--beyond", "allow")
    assert "deepened" in ad.read_zarr(tmp_path / "c.zarr").layers


@pytest.mark.slow
@pytest.mark.distributed
def test_a_launcher_with_two_processes(atlas, tmp_path):
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
