"""Stores on an object store: sent, opened, trained on; and a server that fails in every way that is known."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from distdiff.cli import main
from distdiff.data.feed.loader import loader
from distdiff.data.feed.plan import Plan
from distdiff.data.store import remote
from distdiff.data.store.store import CountStore
from distdiff.data.store.upload import upload
from tests.data.faults import Proxy, after, post, s3_server, times

pytest.importorskip("moto", reason="moto is not installed: pip install 'distdiff[dev]'")

SECRET = "a-secret-that-stays-secret"
QUICK = {"max_retries": 4, "initial_delay": "50ms", "max_delay": "100ms"}
PASSING = QUICK["max_retries"] - 1  # faults of a moment: one request alone, if it meets them all, is tried once more
NAMES = map("s3://cells/{}/atlas.zarr".format, itertools.count())


@pytest.fixture(scope="module")
def server():
    with s3_server() as port:
        yield port


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(remote, "RETRIES", QUICK)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    proxy = Proxy(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def url(folder, proxy):
    """The store of `folder`, sent."""
    url = next(NAMES)
    upload(folder, url, progress=False)
    proxy.seen.clear()
    return url


def distdiff(*words, capsys):
    """Exit code, output and errors of a command."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return done.value.code, said.out, said.err


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_what_was_sent_is_what_was_built(folder, dense, url, proxy, capsys):
    here, there = CountStore.open(folder), CountStore.open(f"{url}/")
    rows = np.random.default_rng(0).permutation(150)
    assert np.array_equal(there.read(rows).toarray(), dense[rows])
    assert there.manifest == here.manifest
    assert np.array_equal(there.names(rows), here.names(rows))
    assert all(np.array_equal(v, here.labels(rows)[k]) for k, v in there.labels(rows).items())
    assert remote.RemoteFolder(url).keys() == files_of(folder)
    there.verify()
    code, out, _ = distdiff("store", "info", url, capsys=capsys)
    assert code == 0
    assert f"{url}: 150 cells x 40 genes" in out
    proxy.seen.clear()
    code, out, _ = distdiff("store", "upload", folder, url, capsys=capsys)
    assert code == 0
    assert " 0 bytes sent" in out
    assert not any(seen.startswith("PUT") for seen in proxy.seen)


def test_an_upload_that_was_cut_goes_on(folder, dense, proxy):
    url, size = next(NAMES), sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    proxy.fault = after(8, "403", "", "PUT")
    with pytest.raises(OSError, match=re.escape(f"{url}: access denied (PERMISSION_DENIED, HTTP 403)")):
        upload(folder, url, progress=False)
    proxy.fault = lambda method, path: ""
    with pytest.raises(FileNotFoundError, match="not uploaded whole: run the same distdiff store upload again"):
        CountStore.open(url)
    _, sent = upload(folder, url, progress=False)
    assert 0 < sent < size
    assert np.array_equal(CountStore.open(url).read(np.arange(150)).toarray(), dense)
    assert remote.RemoteFolder(url).keys() == files_of(folder)


def test_the_manifest_goes_last(folder, proxy):
    upload(folder, next(NAMES), progress=False)
    sent = [seen for seen in proxy.seen if seen.startswith("PUT")]
    assert sent[0].endswith("/upload.json")
    assert sent[-1].endswith("/manifest.json")
    assert len(sent) == len(files_of(folder)) + 1


def test_nothing_is_replaced_unasked(folder, dense, url, tmp_path):
    from tests.data.conftest import build, make_adata, make_counts, save

    other = tmp_path / "b.store"
    build(save(make_adata(make_counts(40, 12, seed=3)), tmp_path / "b.h5ad"), other)
    with pytest.raises(FileExistsError, match=f"{url} holds another store; give overwrite=True"):
        upload(other, url, progress=False)
    assert np.array_equal(CountStore.open(url).read(np.arange(150)).toarray(), dense)
    upload(other, url, overwrite=True, progress=False)
    assert remote.RemoteFolder(url).keys() == files_of(other)  # what only the old one had is gone
    CountStore.open(url).verify()
    foreign = url.replace("atlas.zarr", "foreign")
    remote.RemoteFolder(foreign).write("notes.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds files that are no distdiff store; nothing was written"):
            upload(other, foreign, overwrite=overwrite, progress=False)
    begun = url.replace("atlas.zarr", "begun")
    remote.RemoteFolder(begun).write("upload.json", b'{"fingerprint": "0123456789abcdef"}')
    with pytest.raises(FileExistsError, match=r"a part of another store \(fingerprint 0123456789ab\)"):
        upload(other, begun, progress=False)
    upload(other, begun, overwrite=True, progress=False)
    CountStore.open(begun).verify()


@pytest.mark.parametrize("fault", ["503", "429", "500", "closed", "cut", "short", "flipped"])
def test_a_fault_that_passes_changes_nothing(dense, url, proxy, fault):
    store = CountStore.open(url)
    proxy.fault = times(1 if fault in ("short", "flipped") else PASSING, fault)
    assert np.array_equal(store.read(np.arange(150)).toarray(), dense)
    assert proxy.fault("GET", "/counts/") == ""  # all of them were met


@pytest.mark.parametrize("fault", ["503", "429", "closed", "cut", "403"])
def test_a_server_that_stays_away_is_told_of_in_time(url, proxy, fault):
    store = CountStore.open(url)
    proxy.fault = after(2, fault)
    began = time.monotonic()
    with pytest.raises(remote.Unreachable, match=re.escape(url)) as error:
        store.read(np.arange(150))
    assert time.monotonic() - began < 20
    assert "corrupt" not in str(error.value)  # nothing is known of the data
    assert ("access denied" if fault == "403" else "run the same command again") in str(error.value)
    proxy.fault = lambda method, path: ""
    time.sleep(1)  # requests that are still being tried again fail as well
    store.read(np.arange(150))  # the same store object goes on


@pytest.mark.parametrize("fault", ["short", "flipped"])
def test_damage_that_stays_is_called_damage(url, proxy, fault):
    store = CountStore.open(url)
    proxy.fault = after(0, fault, "/values/c/2/")
    with pytest.raises(ValueError, match=r"shard 2 .* is corrupt .*upload it again: distdiff store upload"):
        store.read(np.arange(150))


def test_a_file_that_is_gone(url):
    remote.RemoteFolder(url).write("counts/all/starts/c/1/0", None)
    with pytest.raises(ValueError, match=r"shard 1 .* is corrupt"):
        CountStore.open(url).read(np.arange(150))


def test_a_server_that_is_mute(url, proxy, server):
    """It takes the request and says nothing: a process of its own, as tensorstore reads its patience once."""
    code = (
        "import sys, numpy as np; from distdiff.data.store import remote; from distdiff.cli import main;"
        f"remote.RETRIES = {QUICK | {'max_retries': 2}}; main(['store', 'info', sys.argv[1]])"
    )
    proxy.fault = lambda method, path: "mute"
    environment = os.environ | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, url], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"distdiff: error: {url}: no useful answer")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://no-such-bucket/atlas.zarr", "no-such-bucket/atlas.zarr: there is no such bucket .*HTTP 404"),
        ("s3://cells/nowhere.zarr", r"nowhere.zarr is not a distdiff store \(no manifest.json\)"),
        ("s3://Not_A_Bucket!/x", 's3://Not_A_Bucket!/x: Invalid S3 bucket name: "Not_A_Bucket!"'),
        ("s3://", "s3://BUCKET/PATH, gs://BUCKET/PATH or http://HOST/PATH is wanted"),
        ("ftp://host/x", "ftp://host/x: s3://BUCKET/PATH, gs://BUCKET/PATH or http://HOST/PATH is wanted"),
        (f"s3://me:{SECRET}@cells/x", "s3://cells/x: a URL with a user, a password or a query is refused"),
        (f"https://host/x?X-Amz-Signature={SECRET}", "https://host/x: a URL with a user, a password or a query"),
    ],
)
def test_a_mistake_is_one_sentence(proxy, folder, place, message, capsys):
    for words in (["store", "info", place], ["store", "upload", folder, place]):
        if "nowhere" in place and "upload" in words:
            continue
        code, _, err = distdiff(*words, capsys=capsys)
        assert code == 2
        assert err.startswith("distdiff: error: ")
        assert SECRET not in err
        assert re.search(message, err)


def test_a_wrong_key(url, server, folder, capsys):
    post(server, "/moto-api/reset-auth", b"0")  # from now on it asks who is there
    try:
        for words in (["store", "info", url], ["store", "upload", folder, next(NAMES)]):
            code, _, err = distdiff(*words, capsys=capsys)
            assert code == 2
            assert re.search(f"{words[-1]}: access denied .*HTTP 403.*check AWS_ACCESS_KEY_ID", err)
            assert SECRET not in err
    finally:
        post(server, "/moto-api/reset-auth", b"inf")


def test_keys_from_a_profile(url, proxy, monkeypatch, tmp_path, dense):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = x\naws_secret_access_key = {SECRET}\n")
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert np.array_equal(CountStore.open(url).read(np.arange(150)).toarray(), dense)


def test_a_password_in_the_endpoint(monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(ValueError, match="a URL with a user, a password or a query is refused") as error:
        CountStore.open(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["shard", "a.h5ad", "--out", "s3://cells/x.zarr"],
        ["store", "export", "STORE", "--out", "s3://cells/x.h5ad"],
        ["impute", "--model", "m", "--data", "STORE", "--out", "s3://cells/x.zarr", "--mask", "mask.npy"],
        ["train", "--config", "c.yaml", "train.out=s3://cells/run"],
        ["shard", "a.h5ad", "--out", f"s3://me:{SECRET}@cells/x.zarr"],
    ],
)
def test_output_to_a_url_is_refused(words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"data: {{store: {folder}}}\n")
    _model(folder, tmp_path / "m")
    from tests.data.conftest import make_adata, make_counts, save

    save(make_adata(make_counts(5, 4)), tmp_path / "a.h5ad")
    code, _, err = distdiff(*(folder if word == "STORE" else word for word in words), capsys=capsys)
    assert code == 2
    assert "output is written to a local folder, not to a URL" in err
    assert SECRET not in err
    assert not (tmp_path / "s3:").exists()


def _model(store, out, **more):
    from distdiff.model import Model

    spec = CountStore.open(store).spec(("kind",))
    Model.new(spec, {"kind": "counts"}, {"kind": "mlp", "width": 16, "depth": 1}).save(out)


def _same_folders(one: Path, other: Path) -> None:
    assert files_of(one) == files_of(other)
    for name in files_of(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


CONFIG = """
data: {{store: {store}, labels: [kind]}}
denoiser: {{kind: mlp, width: 16, depth: 1}}
train: {{out: {out}, cells: 640, batch: 32, eval_cells: 320, checkpoint_cells: 320}}
loader: {{resident: "no"}}
evaluate: {{enabled: false}}
tracking: {{enabled: {tracked}, model: far}}
"""


def test_training_and_tasks_are_those_of_the_folder(folder, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    np.save("mask.npy", np.random.default_rng(0).random((150, 40)) < 0.2)
    for out, store in (("near", folder), ("far", url)):
        (tmp_path / "c.yaml").write_text(CONFIG.format(store=store, out=out, tracked=str(out == "far").lower()))
        assert distdiff("train", "--config", "c.yaml", capsys=capsys)[0] == 0
        given = ("--model", f"{out}/model", "--data", store, "--out", f"{out}.zarr")
        assert distdiff("impute", *given, "--mask", "mask.npy", capsys=capsys)[0] == 0
    weights = [(tmp_path / out / "model" / "weights.safetensors").read_bytes() for out in ("near", "far")]
    assert weights[0] == weights[1]
    near, far = (ad.read_zarr(tmp_path / f"{out}.zarr") for out in ("near", "far"))
    for layer in ("imputed", "imputed_mean", "imputed_mask"):
        assert (near.layers[layer] != far.layers[layer]).sum() == 0, layer
    assert (near.X != far.X).nnz == 0
    for file in tmp_path.rglob("*"):  # the run's folder, MLflow's database, the outputs
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_the_table_is_that_of_the_folder(folder, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _model(folder, tmp_path / "m")
    tables = []
    for store in (folder, url):
        words = ("evaluate", "--model", "m", "--data", store, "--repaint-steps", 0, "--out", "table")
        code, _, err = distdiff(*words, capsys=capsys)
        assert code == 0, err
        tables.append(json.loads((tmp_path / "table" / "table.json").read_text()))
    for row in (row for table in tables for row in table["rows"]):
        row["values"] = {k: v for k, v in row["values"].items() if not k.endswith("seconds")}
    assert tables[0]["rows"] == tables[1]["rows"]


def test_training_whose_server_stops_and_comes_back(folder, url, proxy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG.format(store=url, out="run", tracked="false"))
    proxy.fault = after(3, "closed")
    code, _, err = distdiff("train", "--config", "c.yaml", capsys=capsys)
    assert code == 2
    assert f"distdiff: error: {url}: no useful answer" in err
    assert err.rstrip().endswith("run the same command again")
    proxy.fault = times(PASSING, "closed")
    assert distdiff("train", "--config", "c.yaml", capsys=capsys)[0] == 0
    (tmp_path / "c.yaml").write_text(CONFIG.format(store=folder, out="near", tracked="false"))
    assert distdiff("train", "--config", "c.yaml", capsys=capsys)[0] == 0
    weights = [(tmp_path / out / "model" / "weights.safetensors").read_bytes() for out in ("near", "run")]
    assert weights[0] == weights[1]


def test_batches_while_it_restarts(dense, url, proxy):
    """Down for a moment between two windows: the loader's thread asks again, and the order stays."""
    store = CountStore.open(url, cache_bytes=1)
    index = store.rows("train")
    plan = Plan(len(index), 8, block=16, window=2, seed=0)
    for step, cells in loader(store, plan, index, stop=20):
        if step in (3, 11):
            proxy.fault = times(PASSING, "closed")
        rows = index[plan.rows(step)]
        assert np.array_equal(cells.counts.numpy(), dense[rows])
    assert any("/counts/" in seen for seen in proxy.seen)


def test_imputation_whose_server_stays_away(folder, url, proxy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _model(folder, tmp_path / "m")
    np.save("mask.npy", np.ones((150, 40), bool))
    words = ("impute", "--model", "m", "--data", url, "--out", "o.zarr", "--mask", "mask.npy", "--shard-cells", 16)
    proxy.fault = after(4, "503")
    code, _, err = distdiff(*words, capsys=capsys)
    assert code == 2
    assert f"{url}: no useful answer" in err
    assert not (tmp_path / "o.zarr").exists()
    proxy.fault = lambda method, path: ""
    assert distdiff(*words, capsys=capsys)[0] == 0
    assert ad.read_zarr(tmp_path / "o.zarr").shape == (150, 40)


def test_a_folder_behind_file_url(folder, dense, tmp_path):
    url = f"file://{tmp_path}/copy.zarr"
    upload(folder, url, progress=False)
    assert np.array_equal(CountStore.open(url).read(np.arange(150)).toarray(), dense)
    assert files_of(tmp_path / "copy.zarr") == files_of(folder)
    shutil.rmtree(tmp_path / "copy.zarr")
