"""The recipes of data_prep/, each on a toy file as its source has it: a store, a config beside it, two steps."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from distdiff import config, experiment
from distdiff.data.store.store import CountStore

FOLDER = Path(__file__).parents[1] / "data_prep"
SMALL = {"mlp": {"width": 8, "depth": 1}, "transformer": {"width": 8, "depth": 1, "heads": 2}}


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """``recipe("heart")`` is that module, in an empty folder; recipes import their neighbour ``_recipe`` by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def load(name):
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def call(module, *words):
    """As from the command line: what cannot be done is a SystemExit of one line."""
    from _recipe import run

    run(lambda: module.main([str(word) for word in words]))


def trained(beside, **changes):
    """Two steps of the config that a recipe wrote, with a network of a test's size."""
    tree = config.load(beside).as_dict()
    tree["denoiser"] |= SMALL.get(tree["denoiser"]["kind"], {})
    for section, values in {"evaluate": {"enabled": False}, "tracking": {"enabled": False}, **changes}.items():
        tree[section] |= values
    tree["train"] |= {"cells": 16, "batch": 8, "grain": 8, "compile": False, "eval_cells": 16, "checkpoint_cells": 16}
    assert experiment.train(config.parse(tree)).model.exists()
    return tree


def counts(cells, genes, seed=0):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(1.0, (cells, genes)).astype(np.float32))


def atlas_2023():
    """60 cells with the columns of the heart atlas of 2023."""
    obs = pd.DataFrame(
        {
            "sangerID": [f"HCAHeart{i % 3}" for i in range(60)], "donor": [f"D{i % 4}" for i in range(60)],
            "age": ["50-55", "60-65"] * 30, "gender": ["Male", "Female", "Female"] * 20,
            "cell_or_nuclei": "Nuclei", "kit_10x": "3prime-v3",
            "cell_type": pd.Categorical(["Fibroblast", "Ventricular Cardiomyocyte"] * 30),
        }, index=[f"c{i}" for i in range(60)],
    )  # fmt: skip
    return ad.AnnData(counts(60, 12), obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(12)]))


def test_heart(recipe, capsys):
    atlas_2023().write_h5ad("heart.h5ad")
    call(recipe("heart"), "heart.h5ad", "heart.zarr", "--min-cells", 5, "--genes", "cv:8")
    assert "60 cells x 8 genes; next: distdiff train --config heart.yaml" in capsys.readouterr().out
    store = CountStore.open("heart.zarr")
    assert list(store.manifest.labels) == ["cell_type", "sangerID", "gender", "age"]
    tree = trained("heart.yaml")
    assert tree["data"]["labels"] == ["cell_type", "sangerID", "gender", "age"]
    assert (tree["denoiser"]["kind"], tree["evaluate"]["cell_type"]) == ("transformer", "cell_type")
    x = atlas_2023().X.toarray()  # the 8 of 12 genes with the largest coefficient of variation of training cells
    train = store.rows("train")
    assert store.read(train).shape == (48, 8)
    assert set(store.manifest.genes) <= set(atlas_2023().var_names)
    assert store.read(np.arange(60)).sum() < x.sum()


def test_fetal_takes_raw_counts(recipe):
    """CELLxGENE's layout: normalised X, counts in raw, Ensembl names."""
    obs = pd.DataFrame(
        {
            "cell_type": ["erythroblast", "neuron"] * 20, "disease": "normal", "sex": ["male", "female"] * 20,
            "Batch": [f"b{i % 3}" for i in range(40)], "Development_day": [89, 110] * 20,
        }, index=[f"c{i}" for i in range(40)],
    )  # fmt: skip
    data = ad.AnnData(counts(40, 10), obs=obs, var=pd.DataFrame(index=[f"ENSG{i:05}" for i in range(10)]))
    data.raw = data.copy()
    data.X = np.log1p(data.X.toarray() * 0.3)
    data.write_h5ad("fetal.h5ad")
    call(recipe("fetal"), "fetal.h5ad", "fetal.zarr", "--min-cells", 1, "--genes", "cv:10")
    tree = trained("fetal.yaml")
    assert tree["data"]["labels"] == ["cell_type", "disease", "sex", "Batch", "Development_day"]
    store = CountStore.open("fetal.zarr")
    assert store.manifest.labels["Development_day"] == ("110", "89")
    assert store.read(np.arange(40)).sum() == data.raw.X.sum()


def written_dge(path, cells, genes, seed):
    """As R writes it: names in quotes, a header one shorter than the lines."""
    x = counts(len(genes), len(cells), seed).toarray().astype(int)
    pd.DataFrame(x, genes, cells).to_csv(path, sep=" ", quoting=2, index_label=False)
    return x.T


def test_mouse_cell_atlas(recipe):
    lung, brain = [f"Lung_1.AC{i}" for i in range(30)], [f"FetalBrain_1.GT{i}" for i in range(20)]
    genes = [f"Gene{i}" for i in range(12)]
    x = written_dge("Lung1_rm.batch_dge.txt.gz", lung, genes, 0)
    z = written_dge("FetalBrain_rm.batch_dge.txt.gz", brain, genes[2:], 1)
    known = pd.DataFrame(
        {
            "Cell.name": [*lung, *brain[:10]], "ClusterID": "x_1", "Tissue": ["Lung"] * 30 + ["Fetal_Brain"] * 10,
            "Batch": "b", "Cell.Barcode": "AC", "Annotation": ["AT2 Cell(Lung)", "B cell(Lung)"] * 20,
        }
    )  # fmt: skip
    known.to_csv("MCA_CellAssignments.csv")
    files = ["Lung1_rm.batch_dge.txt.gz", "FetalBrain_rm.batch_dge.txt.gz"]
    call(recipe("mca"), *files, "mca.zarr", "--cells", "MCA_CellAssignments.csv", "--genes", "all", "--min-cells", 1)
    assert trained("mca.yaml")["data"]["labels"] == ["Annotation", "Tissue", "Batch"]
    store = CountStore.open("mca.zarr")
    assert store.manifest.labels["Batch"] == ("FetalBrain_1", "Lung_1")
    assert len(store.manifest.genes) == 12
    assert store.read(np.arange(store.n_cells)).sum() == x.sum() + z.sum()
    tissue = store.labels(np.arange(store.n_cells), ["Tissue"])["Tissue"]
    assert (tissue == -1).sum() == 10  # cells without an assignment
    assert not list(Path().glob(".mca*"))


def test_ten_x_samples(recipe):
    folder, genes = Path("A"), ["MT-ND1", *[f"G{i}" for i in range(9)]]
    folder.mkdir()
    mitochondria = sp.csr_matrix(([9.0, 9.0], ([0, 1], [0, 0])), (2, 10), np.float32)  # two cells of nothing else
    one, two = (sp.vstack([mitochondria, counts(n, 10, n)], format="csr") for n in (28, 18))
    scipy.io.mmwrite(folder / "matrix.mtx", one.T.astype(int))
    (folder / "barcodes.tsv").write_text("".join(f"AAC{i}-1\n" for i in range(30)))
    (folder / "features.tsv").write_text("".join(f"ENSG{i}\t{g}\tGene Expression\n" for i, g in enumerate(genes)))
    with h5py.File("B.h5", "w") as f:
        group = f.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(two, name).astype(np.int64)
        group["shape"], group["barcodes"] = np.array([10, 20]), np.array([f"AAC{i}-1" for i in range(20)], "S9")
        features = group.create_group("features")
        features["name"], features["id"] = np.array(genes, "S9"), np.array(genes, "S9")
        features["feature_type"] = np.array(["Gene Expression"] * 10, "S15")
    small = ["--min-genes", 1, "--genes", "all", "--max-mito", 90]
    call(recipe("tenx"), "two.zarr", "healthy=A", "sick=B.h5", *small)
    assert trained("two.yaml")["data"]["labels"] == ["sample"]
    store = CountStore.open("two.zarr")
    code = store.labels(np.arange(store.n_cells), ["sample"])["sample"]
    assert store.manifest.labels["sample"] == ("healthy", "sick")
    assert np.bincount(code).tolist() == [28, 18]


def test_cells_of_the_census_become_a_store(recipe, monkeypatch):
    """What the query gives is in tests/test_census.py; here it gave two pieces."""
    census = recipe("census")

    def write(experiment, folder, **asked):
        folder.mkdir()
        assert asked["columns"] == ["cell_type", "donor"]
        for i in range(2):
            atlas_2023()[30 * i : 30 * i + 30].copy().write_h5ad(folder / f"{i}.h5ad")
        return sorted(folder.glob("*.h5ad"))

    monkeypatch.setattr(census, "local", contextlib.nullcontext)
    monkeypatch.setattr(census, "write", write)
    words = ["heart", "--soma", "experiment", "--columns", "cell_type,donor", "--store", "census.zarr"]
    with pytest.raises(SystemExit, match="only 12 genes have a count; ask for at most that many"):
        call(census, *words)
    shutil.rmtree("heart")
    call(census, *words, "--genes-kept", "all")
    assert config.load("census.yaml").data.labels == ("cell_type", "donor")
    assert CountStore.open("census.zarr").n_cells == 60


def test_splat(recipe):
    call(recipe("splat"), "sets", "--only", "splat16", "--genes", "hvg:20")
    assert trained("sets/splat16.yaml")["evaluate"]["cell_type"] == "group"
    assert len(CountStore.open("sets/splat16.zarr").manifest.labels["group"]) == 4


SMALL_UNET = {"channels": [8, 8], "attention": [], "layers": 1, "groups": 4}


def test_digits(recipe):
    call(recipe("images"), "digits", "digits.zarr")
    store = CountStore.open("digits.zarr")
    assert (store.n_cells, len(store.manifest.genes), len(store.manifest.labels["label"])) == (1797, 64, 10)
    if importlib.util.find_spec("diffusers"):
        trained("digits.yaml", denoiser=SMALL_UNET)


def test_images_from_files(recipe):
    from PIL import Image

    Path("cifar").mkdir()
    raw = np.random.default_rng(0).integers(0, 256, (20, 3073), dtype=np.uint8)
    raw[:, 0] %= 10
    raw.tofile("cifar/data_batch_1.bin")
    call(recipe("images"), "cifar10", "cifar", "cifar10.zarr")
    assert config.load("cifar10.yaml").denoiser["shape"] == [3, 32, 32]
    Path("faces").mkdir()
    for i in range(24):
        noise = np.random.default_rng(i).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"faces/{i:06}.jpg")
    lines = [f"{i:06}.jpg {1 if i % 2 else -1}  1" for i in range(24)]
    Path("list_attr_celeba.txt").write_text("\n".join(["24", "Male Smiling ", *lines]))
    words = ["--size", 8, "--crop", 16, "--attributes", "list_attr_celeba.txt"]
    call(recipe("images"), "celeba", "faces", "celeba.zarr", *words)
    store = CountStore.open("celeba.zarr")
    assert {**store.manifest.labels} == {"Male": ("no", "yes"), "Smiling": ("yes",)}
    if importlib.util.find_spec("diffusers"):
        tree = trained("celeba.yaml", denoiser=SMALL_UNET)
        assert (tree["denoiser"]["shape"], tree["data"]["labels"]) == ([3, 8, 8], ["Male", "Smiling"])


def wrong_files():
    """Each thing that is given wrongly: its name, the file, the words of the recipe, what is said."""
    Path("table.csv").write_text("a,b\n1,2\n")
    Path("dge.txt").write_text('"c1" "c2"\n"Gene1" 1 0\n"Gene2" x 1\n')
    written_dge("good.txt", ["Lung_1.A", "Lung_1.C"], ["G1", "G2"], 0)
    Path("python").mkdir()
    (Path("python") / "batches.meta").write_bytes(b"\x80\x03")
    Path("attr.txt").write_text("2\nMale\n0.jpg 7\n1.jpg 1\n")
    data = atlas_2023()
    data.obs = data.obs.drop(columns="gender")
    data.write_h5ad("columns.h5ad")
    data = atlas_2023()
    data.X = data.X * 0.7
    data.write_h5ad("decimals.h5ad")


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("heart", ["none.h5ad", "o.zarr"], "none.h5ad does not exist"),
        ("heart", ["table.csv", "o.zarr"], "table.csv .*table of text"),
        ("heart", ["columns.h5ad", "o.zarr"], r"no column for gender \(gender or sex\); .* out of: sangerID, donor"),
        ("heart", ["decimals.h5ad", "o.zarr", "--min-cells", 1, "--genes", "all"], "is not a whole number"),
        ("heart", ["decimals.h5ad", "o.zarr", "--labels", "celltype"], "no column 'celltype'"),
        ("heart", ["columns.h5ad", "out", "--labels", "donor"], r"give a name that ends in .zarr \(out.zarr\)"),
        ("fetal", ["columns.h5ad", "o.zarr"], r"no column for disease \(disease\)"),
        ("mca", ["dge.txt", "o.zarr"], "dge.txt is no table of the Mouse Cell Atlas"),
        ("mca", ["table.csv", "o.zarr"], "table.csv .*table of text"),
        ("mca", ["good.txt", "o.zarr", "--cells", "table.csv"], "table.csv has no column Cell.name"),
        ("tenx", ["o.zarr", "A"], "sample 'A': write NAME=PATH"),
        ("tenx", ["o.zarr", "A=x", "A=y"], "sample 'A' is given twice"),
        ("tenx", ["o.zarr", "A=python"], "python"),
        ("images", ["cifar10", "python", "o.zarr"], "the Python version: it is pickled"),
        ("images", ["celeba", "python", "o.zarr"], "holds no image"),
        ("images", ["celeba", "python", "o.zarr", "--attributes", "attr.txt"], "attr.txt is no list_attr_celeba.txt"),
        ("images", ["cifar10", "o.zarr"], "give the folder of its files too"),
    ],
)  # fmt: skip
def test_what_is_given_wrongly(recipe, name, words, said):
    wrong_files()
    with pytest.raises(SystemExit, match=f"^error: .*{said}") as raised:
        call(recipe(name), *words)
    assert "\n" not in str(raised.value)
    assert not list(Path().glob("*o.zarr*"))
    assert not Path("o.yaml").exists()


def test_nothing_is_replaced_unasked(recipe):
    Path("splat55.yaml").write_text("mine")
    atlas_2023().write_h5ad("heart.h5ad")
    words = ["heart.h5ad", "splat55.zarr", "--min-cells", 1, "--genes", "all"]
    with pytest.raises(SystemExit, match=r"splat55\.yaml exists already"):
        call(recipe("heart"), *words)
    assert Path("splat55.yaml").read_text() == "mine"
    call(recipe("heart"), *words, "--overwrite")
    assert config.load("splat55.yaml").data.store == "splat55.zarr"


NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help_says_how(recipe, name, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe(name).main(["--help"])
    assert ended.value.code == 0
    assert f"python data_prep/{name}.py" in capsys.readouterr().out


def test_a_recipe_runs_from_anywhere(tmp_path):
    words = [sys.executable, FOLDER / "heart.py", "none.h5ad", "heart.zarr"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: none.h5ad does not exist")
