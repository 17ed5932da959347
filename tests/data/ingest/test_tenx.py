"""10x files as Source reads them, against scanpy."""

from __future__ import annotations

import gzip

import h5py
import numpy as np
import pytest
import scanpy as sc
from scipy import io, sparse

from distdiff.data.ingest.source import Source
from tests.data.conftest import make_counts

N, G = 25, 14
SYMBOLS = [f"g{i}" for i in range(G)]
TWICE = ["a", "b", "a", "a", "a-1", "b", *SYMBOLS[6:]]
MIXED = ["Gene Expression"] * 5 + ["Antibody Capture"] * 3 + ["Gene Expression"] * 4 + ["CRISPR Guide Capture"] * 2
PLAIN = ["Gene Expression"] * G

pytestmark = pytest.mark.filterwarnings("ignore:.*not unique", "ignore:Suffix used")


def barcodes(n=N):
    return [f"{'ACGT'[i % 4]}{i:04d}-1" for i in range(n)]


def write_h5(path, x, symbols=SYMBOLS, kinds=PLAIN, version=3, genomes=("hg19",)):
    """As Cell Ranger does: features x barcodes in CSC, whole numbers."""
    m = sparse.csc_matrix(x.T.astype(np.int32))
    ids = np.array([f"ENSG{i}" for i in range(len(symbols))], "S")
    names = np.array(symbols, "S")
    with h5py.File(path, "w") as f:
        for group in (f.create_group(k) for k in (["matrix"] if version == 3 else genomes)):
            for k in ("data", "indices", "indptr"):
                group[k] = getattr(m, k).astype(np.int32 if k == "data" else np.int64)
            group["shape"] = np.array(m.shape, np.int32)
            group["barcodes"] = np.array(barcodes(m.shape[1]), "S")
            if version == 3:
                features = {"id": ids, "name": names, "feature_type": np.array(kinds, "S"), "genome": ids}
                for k, v in features.items():
                    group[f"features/{k}"] = v
            else:
                group["genes"], group["gene_names"] = ids, names
    return path


def write_mtx(folder, x, symbols=SYMBOLS, kinds=PLAIN, version=3, prefix="", field="integer"):
    folder.mkdir(parents=True, exist_ok=True)
    gz = ".gz" if version == 3 else ""

    def put(name, text):
        (gzip.open if gz else open)(folder / f"{prefix}{name}{gz}", "wb").write(text.encode())

    matrix = folder / "whole.mtx"
    io.mmwrite(matrix, sparse.coo_matrix(x.T.astype(np.int32 if field == "integer" else np.float64)), field=field)
    put("matrix.mtx", matrix.read_text())
    matrix.unlink()
    put("barcodes.tsv", "".join(f"{b}\n" for b in barcodes(x.shape[0])))
    rows = zip(symbols, kinds, strict=True)
    if version == 3:
        put("features.tsv", "".join(f"ENSG{i}\t{s}\t{k}\n" for i, (s, k) in enumerate(rows)))
    else:
        put("genes.tsv", "".join(f"ENSG{i}\t{s}\n" for i, (s, _) in enumerate(rows)))
    return folder


def same(source, adata):
    assert source.n_cells == adata.n_obs
    assert source.genes == tuple(adata.var_names)
    assert source.obs_names.tolist() == adata.obs_names.tolist()
    assert source.bytes_per_cell > 0
    for start, stop in [(0, N), (3, 17), (24, 25), (5, 5)]:
        got = source.read(start, stop)
        assert got.dtype.kind in "if"
        np.testing.assert_array_equal(got.toarray(), adata.X[start:stop].toarray())
    with pytest.raises(ValueError, match="obs has no column 'cell_type'; known: none"):
        source.obs("cell_type")


@pytest.mark.parametrize("kinds", [PLAIN, MIXED])
@pytest.mark.parametrize("symbols", [SYMBOLS, TWICE])
def test_h5_of_cell_ranger_3(tmp_path, symbols, kinds):
    path = write_h5(tmp_path / "m.h5", make_counts(N, G), symbols, kinds)
    source, want = Source.open(path), sc.read_10x_h5(path)
    want.var_names_make_unique()
    same(source, want)
    assert not source.by_gene
    assert source.read(0, 5).dtype == np.int32
    assert ("5 other features were left out (3 Antibody Capture, 2 CRISPR Guide Capture)" in source.note) == (
        kinds is MIXED
    ), source.note
    assert ("'a' became 'a-2'" in source.note) == (symbols is TWICE), source.note
    assert bool(source.note) == (kinds is MIXED or symbols is TWICE)
    source.close()


def test_h5_of_cell_ranger_2(tmp_path):
    path = write_h5(tmp_path / "m.h5", make_counts(N, G), TWICE, version=2)
    want = sc.read_10x_h5(path)
    want.var_names_make_unique()
    same(Source.open(path), want)
    with pytest.raises(ValueError, match="several genomes: hg19, mm10; write one"):
        Source.open(write_h5(tmp_path / "two.h5", make_counts(N, G), version=2, genomes=("hg19", "mm10")))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("symbols", [SYMBOLS, TWICE])
def test_mtx_folders(tmp_path, version, symbols):
    kinds = MIXED if version == 3 else PLAIN
    folder = write_mtx(tmp_path / "m", make_counts(N, G), symbols, kinds, version)
    want = sc.read_10x_mtx(folder)
    for path in (folder, next(folder.glob("matrix*"))):
        source = Source.open(path)
        same(source, want)
        assert source.by_gene
        assert "list of entries (mtx), so it is brought into the order of its cells first, on disk" in source.note


def test_mtx_with_a_prefix_and_real_numbers(tmp_path):
    x = make_counts(N, G)
    x.data[3] = 1.25
    write_mtx(tmp_path, x, prefix="GSM1_", field="real")
    source = Source.open(tmp_path)
    assert source.read(0, N).dtype == np.float64
    np.testing.assert_array_equal(source.read(0, N).toarray(), x.toarray())
    write_mtx(tmp_path, x, prefix="GSM2_")
    with pytest.raises(ValueError, match=r"several matrices: GSM1_matrix.mtx.gz, GSM2_matrix.mtx.gz"):
        Source.open(tmp_path)
    assert Source.open(tmp_path / "GSM2_matrix.mtx.gz").n_cells == N


def test_all_features_where_none_is_expression(tmp_path):
    path = write_h5(tmp_path / "m.h5", make_counts(N, G), kinds=["Antibody Capture"] * G)
    source = Source.open(path)
    assert len(source.genes) == G
    assert "has no Gene Expression, all of its features are read (14 Antibody Capture)" in source.note


def test_nothing_is_read_before_it_is_needed(tmp_path):
    """The matrix is damaged, names are not."""
    folder = write_mtx(tmp_path / "m", make_counts(N, G), version=2)
    text = (folder / "matrix.mtx").read_text().splitlines()
    (folder / "matrix.mtx").write_text("\n".join([*text[:3], "this is no entry"]))
    source = Source.open(folder)
    assert len(source.obs_names) == N
    with pytest.raises(ValueError, match=r"m.matrix.mtx: not every line is a feature, a barcode and a count"):
        source.read(0, 1)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t[:-4], "entries promised, .* found; truncated or damaged"),
        (lambda t: [*t[:-1], "999 1 1"], "an entry is of gene 999, counted from 1, but there are 14"),
        (lambda t: [*t[:-1], "1 26 1"], "an entry is of cell 26, counted from 1, but there are 25"),
        (lambda t: [*t[:-1], "0 1 1"], "an entry is of gene 0"),
        (lambda t: [*t[:-1], "1 1"], "not every line is a feature, a barcode and a count"),
        (lambda t: [*t[:3], *("1 1" for _ in t[3:])], "2 numbers a line"),
        (lambda t: [*t, "1 1 1"], "entries promised"),
        (lambda t: ["%%MatrixMarket matrix array real general", *t[1:]], "starts with '%%matrixmarket matrix array"),
        (lambda t: ["%%MatrixMarket matrix coordinate pattern general", *t[1:]], "entries are 'pattern'"),
        (lambda t: ["cells,genes"], "a 10x matrix starts with"),
        (lambda t: [*t[:2], "14 25"], "is not rows, columns and entries"),
        (lambda t: [*t[:2], "25 14 3"], "it lists cells x genes: transpose it"),
        (lambda t: [*t[:2], "15 25 3"], "is 15 x 25 but has 14 features and 25 barcodes; the files do not belong"),
    ],
)
def test_damaged_mtx(tmp_path, edit, said):
    folder = write_mtx(tmp_path / "m", make_counts(N, G), version=2)
    path = folder / "matrix.mtx"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=rf"matrix.mtx.*{said}"):
        Source.open(path).read(0, N)


def test_missing_and_damaged_files(tmp_path):
    folder = write_mtx(tmp_path / "m", make_counts(N, G))
    with pytest.raises(ValueError, match="is a 10x matrix and has no layers, 'raw' was given; leave layer= out"):
        Source.open(folder, "raw")
    with pytest.raises(FileNotFoundError, match=r"no_matrix.mtx does not exist"):
        Source.open(folder / "no_matrix.mtx")
    matrix = folder / "matrix.mtx.gz"
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"matrix.mtx.gz cannot be read .*: truncated or damaged; copy the file again"):
        Source.open(folder).read(0, 3)
    matrix.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=r"matrix.mtx.gz cannot be read"):
        Source.open(folder)
    matrix.write_bytes(whole)
    (folder / "features.tsv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no features.tsv or features.tsv.gz or genes.tsv or genes.tsv.gz"):
        Source.open(folder)


def test_damaged_h5(tmp_path):
    path = write_h5(tmp_path / "m.h5", make_counts(N, G), kinds=MIXED)
    with pytest.raises(ValueError, match="has no layers"):
        Source.open(path, "raw")
    with h5py.File(path, "r+") as f:
        f["matrix/indices"][2] = 99
    with pytest.raises(ValueError, match=r"m.h5: an entry of feature 99, there are 14; the file is damaged"):
        Source.open(path).read(0, N)
    with h5py.File(path, "r+") as f:
        f["matrix/shape"][1] = 24
    with pytest.raises(ValueError, match=r"m.h5 is 14 x 24 but has 14 features and 25 barcodes"):
        Source.open(path)
