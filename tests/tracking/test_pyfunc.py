from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
import pytest

from distdiff.model import Model
from tests.tracking.runs import GENES, free_port, kill, start


def test_a_packed_model_holds_nothing_that_is_unpickled(packed):
    kinds = {path.suffix for path in packed.rglob("*") if path.is_file()}
    assert kinds <= {"", ".py", ".typed", ".json", ".yaml", ".txt", ".md", ".safetensors"}
    assert {p.name for p in (packed / "artifacts" / "model").iterdir()} == {"model.json", "weights.safetensors"}
    assert "torch==" in (packed / "requirements.txt").read_text()
    assert "+cpu" not in (packed / "requirements.txt").read_text()


def test_signature_and_example(imputes, packed):
    signature = imputes.metadata.signature
    assert signature.inputs is None, "MLflow would drop unknown columns, and refuse paths and whole numbers"
    assert signature.outputs is not None
    assert "readout" in [p.name for p in signature.params]
    out = imputes.predict(imputes.input_example)
    assert not out.isna().any(axis=None)
    served = json.loads((packed / "serving_input_example.json").read_text())["dataframe_split"]
    frame = pd.DataFrame(served["data"], columns=served["columns"])
    assert not imputes.predict(frame).isna().any(axis=None)


def test_a_frame_comes_back_with_its_gaps_filled(imputes, model):
    frame = pd.DataFrame(
        [[3, np.nan, 1, 7], [0, 2, 0, np.nan], [0, np.nan, 0, 1]], index=["x", "y", "z"],
        columns=["gene3", "gene1", "gene0", "stranger"],
    )  # fmt: skip
    out = imputes.predict(frame)
    assert list(out.columns) == ["gene3", "gene1", "gene0", "stranger", "gene2", "gene4", "gene5"]
    assert list(out.index) == ["x", "y", "z"]
    given = frame.notna().to_numpy()
    assert (out.iloc[:, :4].to_numpy()[given] == frame.to_numpy()[given]).all()
    assert out.isna().to_numpy().nonzero()[0].tolist() == [1, 2, 2, 2, 2]  # unknown gene; cell without any molecule
    import anndata as ad

    cells = ad.AnnData(frame.fillna(0)[["gene3", "gene1", "gene0"]].iloc[:2].astype("float32"))
    direct = Model.load(model).complete(cells, ["gene2", "gene4", "gene5"], mean_only=True)
    whole = imputes.predict(frame.iloc[1:2].drop(columns="stranger"))  # nothing hidden in this cell
    np.testing.assert_allclose(whole[["gene2", "gene4", "gene5"]].to_numpy()[0],
                               direct.layers["imputed_mean"][1, 3:], rtol=1e-5)  # fmt: skip


def test_whole_numbers_labels_records_and_repeated_names_are_taken(imputes):
    counts = pd.DataFrame({"gene0": [1, 2], "gene1": [0, 4]}, index=["same", "same"])
    plain = imputes.predict(counts)
    assert list(plain.index) == ["same", "same"]
    named = counts.assign(cell_type=["B", "T"])
    np.testing.assert_array_equal(imputes.predict(named), plain)
    labelled = imputes.predict(named, params={"use_labels": True})
    assert labelled.shape == plain.shape
    assert not np.allclose(labelled, plain)
    with pytest.raises(ValueError, match="no column 'cell_type'"):
        imputes.predict(counts, params={"use_labels": True})
    records = imputes.predict([{"gene0": 1, "gene1": 0}, {"gene0": 2, "gene1": 4}])
    np.testing.assert_array_equal(records, plain)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pd.DataFrame({"gene0": ["many"]}), "^column 'gene0' must hold counts, and NaN where"),
        (pd.DataFrame([[1, 2]], columns=["gene0", "gene0"]), "^column 'gene0' is given 2 times"),
        (pd.DataFrame({"gene0": [0.5]}), "0.5 is not a whole number"),
        (pd.DataFrame({"stranger": [1]}), "none of the frame's 1 columns"),
    ],
)
def test_frames_that_are_no_counts_are_refused(imputes, frame, words):
    with pytest.raises(ValueError, match=words):
        imputes.predict(frame)


def test_files_are_imputed(imputes, model, tmp_path):
    import anndata as ad

    x = np.array([[1, 0, 3], [2, 5, 0]], dtype=np.float32)
    cells = ad.AnnData(x, obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=list(GENES[:3])))
    cells.layers["hide"] = np.array([[0, 0, 1], [1, 0, 0]], dtype=np.float32)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    out = imputes.predict(str(tmp_path / "cells.h5ad"))
    assert out.shape == (2, 6)
    assert list(out.index) == ["a", "b"]
    expected = Model.load(model).impute(cells, mean_only=True).layers["imputed_mean"]
    np.testing.assert_array_equal(out.to_numpy(), expected)
    pd.testing.assert_frame_equal(imputes.predict(cells), out)
    frame = pd.DataFrame({"path": [str(tmp_path / "cells.h5ad")] * 2})
    twice = imputes.predict(frame, params={"mask": "hide"})
    assert twice.shape == (4, 3)
    assert (twice.to_numpy()[0, :2] == [1, 0]).all()
    assert twice.to_numpy()[0, 2] != 3


@pytest.mark.distributed
def test_a_packed_model_runs_its_own_code_where_distdiff_is_not_at_hand(packed, tmp_path):
    code = (
        "import sys, mlflow; model = mlflow.pyfunc.load_model(sys.argv[1]); out = model.predict(model.input_example);"
        "import distdiff; print(distdiff.__file__, out.shape)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(packed)], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{packed}/code/distdiff/__init__.py (3, 6)"


@pytest.fixture(scope="module")
def served(packed, tmp_path_factory):
    """Address of ``mlflow models serve`` for the packed model."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    words = ["models", "serve", "-m", str(packed), "--env-manager", "local", "--port", str(port), "--workers", "1"]
    process = start([sys.executable, "-m", "mlflow", *words], folder, f"http://127.0.0.1:{port}/ping")
    yield f"http://127.0.0.1:{port}/invocations"
    kill(process)


def ask(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.distributed
def test_frames_are_served_by_columns_and_by_records(served, imputes):
    """Absent genes are imputed; a column that is no gene comes back as it was; a missing value is imputed."""
    frame = pd.DataFrame({"gene3": [3, 1], "stranger": [7, 8], "gene0": [None, 2]}, index=["x", "y"])
    expected = imputes.predict(frame)
    split = {"columns": list(frame), "index": list(frame.index), "data": [[3, 7, None], [1, 8, 2]]}
    records = [{"gene3": 3, "stranger": 7}, {"gene3": 1, "stranger": 8, "gene0": 2}]
    for body in ({"dataframe_split": split}, {"dataframe_records": records}, {"inputs": records}):
        status, answer = ask(served, body)
        assert status == 200, answer
        found = pd.DataFrame(answer["predictions"])
        assert set(found) == {"gene3", "stranger", "gene0", "gene1", "gene2", "gene4", "gene5"}
        np.testing.assert_allclose(found[list(expected)], expected, rtol=1e-6)
    labelled = [{"gene0": 1, "gene1": 2, "cell_type": "B"}]
    status, answer = ask(served, {"dataframe_records": labelled, "params": {"use_labels": True}})
    assert status == 200
    assert "cell_type" not in answer["predictions"][0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"gene0": "many"}, "column 'gene0' must hold counts"),
        ({"gene0": 1, "barcode": "ACGT"}, "column 'barcode' must hold counts"),
        ({"gene0": -1}, "-1"),
        ({"gene0": 0.5}, "0.5 is not a whole number"),
        ({"stranger": 1}, "none of the frame's 1 columns"),
    ],
)
def test_the_server_refuses_what_is_no_count_in_one_sentence(served, record, words):
    status, answer = ask(served, {"dataframe_records": [record]})
    assert status == 400
    assert words in answer["message"]
    assert "Traceback" not in json.dumps(answer)
    assert "\n" not in answer["message"]
