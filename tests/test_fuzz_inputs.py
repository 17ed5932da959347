"""Damaged inputs: every flip of a small h5ad or AnnData zarr ends in the right content or in one sentence."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from scipy import io

from distdiff import batch
from distdiff.data.ingest import probe
from distdiff.data.ingest.shard import shard
from distdiff.data.store.store import CountStore
from distdiff.model import Model
from distdiff.types import DataSpec

SECONDS = 60
"""Of one trial: longer is a hang."""

N, G = 24, 12
GENES = tuple(f"gene{i}" for i in range(G))

pytestmark = pytest.mark.filterwarnings("ignore")


def cells() -> ad.AnnData:
    """Something of everything that a file of a user holds."""
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1.0, 2.0, (N, G))).astype(np.float32)
    a = ad.AnnData(sp.csr_matrix(x), obs=pd.DataFrame(index=[f"cell{i}" for i in range(N)]))
    a.var_names = list(GENES)
    a.obs["cell_type"] = pd.Categorical(np.array(["B", "T", None], dtype=object)[np.arange(N) % 3])
    a.obs["donor"] = [f"d{i % 4}" for i in range(N)]
    a.obs["age"] = pd.array([30, None] * (N // 2), dtype="Int64")
    a.obs["score"] = rng.normal(size=N)
    a.var["mt"] = np.arange(G) < 2
    a.layers["csc"], a.layers["dense"] = a.X.tocsc(), x * 2
    a.obsm["pca"], a.obsp["near"] = rng.normal(size=(N, 3)), sp.eye(N, format="csr")
    a.varm["load"] = rng.normal(size=(G, 3))
    a.uns = {"text": "a", "list": np.array(["x", "y"]), "deep": {"numbers": np.arange(5)}}
    a.raw = a.copy()
    return a


def spec() -> DataSpec:
    return DataSpec(GENES, {}, np.ones(G, dtype=np.float32))


def sharded(path: Path, out: Path) -> None:
    labels = ("cell_type", "donor") if path.suffix in (".h5ad", ".zarr") else ()
    shard(path, out, labels=labels, shuffle=False, workers=0, progress=False)


def imputed(path: Path, out: Path) -> None:
    model = Model.new(spec(), {"kind": "counts"}, {"kind": "mlp", "width": 8, "depth": 1})
    batch.impute_file(
        model, path, out, sites="dropout", groups="donor", layers=("mean", "mask"), mean_only=True, batch_size=64,
        precision="float32", device="cpu", progress=False,
    )  # fmt: skip


def read(path: Path) -> ad.AnnData:
    """What anndata reads, or scanpy of 10x files."""
    if (path / "matrix.mtx.gz").exists():
        return with_labels(sc.read_10x_mtx(path))
    if path.suffix == ".h5":
        return with_labels(sc.read_10x_h5(path))
    return ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)


def with_labels(a: ad.AnnData) -> ad.AnnData:
    """10x files have none."""
    a.var = a.var[[]]
    a.X = sp.csr_matrix(a.X)
    return a


def of_store(out: Path, like: ad.AnnData) -> ad.AnnData:
    """The cells of a store where they were in its source; those that were dropped are empty."""
    store = CountStore.open(out)
    rows = store.rows("all")
    row = store.origin(rows)[1]
    x = np.zeros(like.shape)
    x[np.ix_(row, like.var_names.get_indexer(list(store.genes)))] = store.read(rows).toarray()
    return ad.AnnData(x, obs=like.obs.assign(**{
        key: np.array([*values, None], dtype=object)[store.labels(rows, [key])[key]][np.argsort(row)]
        for key, values in store.manifest.labels.items()
    }), var=like.var[[]])  # fmt: skip


def plain(value: object) -> object:
    """Anything in an AnnData as something that `==` compares."""
    if isinstance(value, dict) or hasattr(value, "items"):
        if not isinstance(value, pd.DataFrame):
            return {str(k): plain(v) for k, v in value.items() if k is not None}
        return {"index": list(value.index), **{str(k): plain(v) for k, v in value.items()}}
    if sp.issparse(value):
        value = value.toarray()
    array = np.asarray(value, dtype=object) if isinstance(value, pd.Series) else np.asarray(value)
    return [array.shape, [repr(None if pd.isna(v) else v) for v in array.ravel().tolist()]]


def differences(found: ad.AnnData, wanted: ad.AnnData) -> list[str]:
    """What of ``wanted`` is not in ``found``."""
    keys = ("X", "obs", "var", "layers", "obsm", "obsp", "varm", "uns")
    parts = {k: (plain(getattr(found, k)), plain(getattr(wanted, k))) for k in keys}
    odd = [k for k, (f, w) in parts.items() if isinstance(w, list) and f != w]
    odd += [f"{k}/{n}" for k, (f, w) in parts.items() if isinstance(w, dict) for n in w if f.get(n) != w[n]]
    if wanted.raw is not None and plain(found.raw.X) != plain(wanted.raw.X):
        odd.append("raw")
    return odd


def labelled(a: ad.AnnData) -> ad.AnnData:
    """What a store keeps of an AnnData."""
    kept = [k for k in ("cell_type", "donor") if k in a.obs]
    obs = pd.DataFrame({k: a.obs[k].astype(object) for k in kept}, index=a.obs_names)
    return ad.AnnData(np.asarray(a.X.toarray(), dtype=np.float64), obs=obs, var=a.var[[]])


def judged(kind: str, path: Path, out: Path, unflipped: ad.AnnData) -> str:
    """Empty where a run ended as it may, else what was wrong."""
    before = sorted(os.listdir(path.parent))
    try:
        (sharded if kind == "shard" else imputed)(path, out)
    except (ValueError, OSError) as error:
        text = str(error)
        if left := [name for name in sorted(os.listdir(path.parent)) if name not in before]:
            return f"left behind: {left} after {text}"
        if "\n" in text or not text or type(error) not in _SENTENCES:
            return f"no sentence: {type(error).__name__} {text!r}\n{traceback.format_exc()}"
        return ""
    except BaseException:
        return traceback.format_exc()
    reasons = []
    for what in (lambda: unflipped, lambda: read(path)):
        try:
            wanted = what()
            odd = differences(read(out) if kind == "impute" else of_store(out, wanted),
                              wanted if kind == "impute" else labelled(wanted))  # fmt: skip
        except Exception as error:
            odd = [f"anndata: {error!r}"[:200]]
        if not odd:
            return ""
        reasons.append(odd)
    return f"other content than {reasons}"


def _sentences() -> tuple[type, ...]:
    from distdiff.data.ingest.damage import InputError

    return (ValueError, InputError, OSError, FileNotFoundError, FileExistsError)


_SENTENCES = _sentences()


def trials(flips: list[Callable[[Path], None]], source: Path, kind: str, folder: Path) -> Iterator[tuple[int, str]]:
    """Each flip in a process forked from this one, several by one; (its number, what was wrong)."""
    at = 0
    while at < len(flips):
        receive, send = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(receive)
            _work(flips, at, source, kind, folder, send)
        os.close(send)
        with os.fdopen(receive, "rb", buffering=0) as pipe:
            text, began = b"", time.monotonic()
            while at < len(flips):
                ready, _, _ = select.select([pipe], [], [], max(0.0, SECONDS - (time.monotonic() - began)))
                part = pipe.read(1 << 16) if ready else b""
                if not part:
                    break
                text += part
                *lines, text = text.split(b"\n")
                for line in lines:
                    yield at, json.loads(line)
                    at, began = at + 1, time.monotonic()
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if at < len(flips):
            yield at, f"hang of {SECONDS} s" if not ready else f"died: {status}"
            at += 1


def _work(flips: list, at: int, source: Path, kind: str, folder: Path, send: int) -> None:
    """Carry out trials in the child, and never return."""
    try:
        logging.disable()
        probe.SILENT = 5.0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        unflipped = read(source)
        for flip in flips[at:]:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            path = folder / source.name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)
            flip(path)
            wrong = judged(kind, path, folder / ("out.zarr" if kind == "shard" else f"out{source.suffix}"), unflipped)
            os.write(send, json.dumps(wrong).encode() + b"\n")
        time.sleep(SECONDS)
    except BaseException:
        os.write(send, json.dumps(traceback.format_exc()).encode() + b"\n")
    finally:
        os._exit(1)


def metadata(path: Path) -> np.ndarray:
    """Places of the bytes of an h5 file that are no numbers of its arrays, nor zero."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    free = content != 0

    def numbers(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        chunks = [item.id.get_chunk_info(i) for i in range(item.id.get_num_chunks())] if item.chunks else []
        spans = [(c.byte_offset, c.size) for c in chunks]
        if not item.chunks and item.id.get_offset() is not None:
            spans.append((item.id.get_offset(), item.id.get_storage_size()))
        for start, size in spans:
            free[start : start + size] = False

    with h5py.File(path) as file:
        file.visititems(numbers)
    return np.flatnonzero(free)


def flip_of(rng: np.random.Generator, number: int, bytes_: np.ndarray, size: int) -> Callable[[Path], None]:
    """One fault of a file: mostly a bit of what says how it is read, else any bit, a page of zeros, a cut."""
    kind = number % 8
    at, bit, any_ = int(rng.choice(bytes_)), int(rng.integers(8)), int(rng.integers(size))

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        if kind == 7:
            content = content[:any_]
        elif kind == 6:
            page = any_ // 512 * 512
            content[page : page + 512] = bytes(len(content[page : page + 512]))
        else:
            content[any_ if kind == 5 else at] ^= 1 << bit
        path.write_bytes(content)

    return flip


def listed(wrong: list[tuple[int, str]], names: list[str] | None = None) -> str:
    return "\n\n".join(f"{number if names is None else names[number]}: {text}" for number, text in wrong)


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own: a child that is forked beside other tests' threads may hang."""

    @functools.wraps(test)
    def in_new_process(*args: object, **kwargs: object) -> None:
        if "DISTDIFF_ALONE" in os.environ:
            return test(*args, **kwargs)
        node = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", node], cwd=Path(__file__).parents[1],
            env={**kept, "DISTDIFF_ALONE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return None

    return in_new_process


@pytest.fixture(scope="module")
def h5ad(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "cells.h5ad"
    cells().write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:  # and something that is not compressed
        x = {k: file["X"][k][:] for k in ("data", "indices", "indptr")}
        for key, values in x.items():
            del file["X"][key]
            file["X"][key] = values
    return path


def _both(flips: list, source: Path, kind: str, folder: Path) -> None:
    wrong = [(number, text) for number, text in trials(flips, source, kind, folder / "work") if text]
    assert not wrong, f"{len(wrong)} of {len(flips)}:\n{listed(wrong)}"


@pytest.mark.parametrize("kind", ["shard", "impute"])
@pytest.mark.parametrize(
    ("seed", "n"), [pytest.param(0, 24, id="few"), pytest.param(1, 200, id="many", marks=pytest.mark.long)]
)
@alone
def test_a_flipped_h5ad_ends_in_its_content_or_in_one_sentence(h5ad, tmp_path, kind, seed, n):
    rng, where, size = np.random.default_rng(seed), metadata(h5ad), h5ad.stat().st_size
    flips = [flip_of(rng, number, where, size) for number in range(n)]
    _both([lambda path: None, *flips], h5ad, kind, tmp_path)  # an undamaged file passes


@pytest.mark.long
@pytest.mark.parametrize("kind", ["shard", "impute"])
@alone
def test_each_flipped_file_of_a_zarr_ends_in_its_content_or_in_one_sentence(tmp_path, kind):
    source, rng = tmp_path / "cells.zarr", np.random.default_rng(2)
    batch.write_anndata(cells(), source)
    names = sorted(str(f.relative_to(source)) for f in source.rglob("*") if f.is_file())

    def fault(name: str, number: int) -> Callable[[Path], None]:
        size = (source / name).stat().st_size
        flip = flip_of(rng, number, np.arange(size), size)
        return lambda path: flip(path / name)

    flips = [fault(name, number) for number, name in enumerate(names)]
    wrong = [(number, text) for number, text in trials(flips, source, kind, tmp_path / "work") if text]
    assert not wrong, f"{len(wrong)} of {len(flips)}:\n{listed(wrong, names)}"


def tenx_h5(path: Path) -> Path:
    a = cells()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            values = getattr(a.X, key).astype(np.int32)
            group.create_dataset(key, data=values, compression="gzip" if key == "indices" else None)
        group["shape"], group["barcodes"] = np.array([G, N]), np.array(list(a.obs_names), "S")
        kinds = ["Gene Expression"] * G
        for key, values in {"id": GENES, "name": GENES, "feature_type": kinds, "genome": ["x"] * G}.items():
            group[f"features/{key}"] = np.array(values, "S")
    return path


def tenx_mtx(folder: Path) -> Path:
    """Gzipped, as Cell Ranger does: each file has a checksum."""
    folder.mkdir()
    a, text = cells(), BytesIO()
    io.mmwrite(text, a.X.T.astype(int))
    for name, content in {
        "matrix.mtx": text.getvalue(),
        "barcodes.tsv": "".join(f"{name}\n" for name in a.obs_names).encode(),
        "features.tsv": "".join(f"{gene}\t{gene}\tGene Expression\n" for gene in GENES).encode(),
    }.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", ["h5", "mtx"])
@alone
def test_flipped_files_of_10x_end_in_their_content_or_in_one_sentence(tmp_path, kind):
    rng = np.random.default_rng(3)
    if kind == "h5":
        source = tenx_h5(tmp_path / "cells.h5")
        where, size = metadata(source), source.stat().st_size
        flips = [flip_of(rng, number, where, size) for number in range(60)]
    else:
        source = tenx_mtx(tmp_path / "cells")
        flips = [_in(name.name, flip_of(rng, number, np.arange(size), size)) for number in range(16)
                 for name in sorted(source.iterdir()) for size in [name.stat().st_size]]  # fmt: skip
    _both([lambda path: None, *flips], source, "shard", tmp_path)


def _in(name: str, flip: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: flip(path / name)
