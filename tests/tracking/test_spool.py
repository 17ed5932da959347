from __future__ import annotations

import json

import pytest

from distdiff import tracking
from distdiff.tracking.spool import Spool
from tests.tracking.runs import a_run, unsent


def test_an_entry_cut_short_by_a_kill_costs_no_other(tmp_path, caplog):
    spool = Spool.create(tmp_path)
    spool.append("metrics", numbers={"a": 1.0}, step=1)
    with spool.path.open("ab") as file:
        file.write(b'{"kind": "metr')
    assert [entry["step"] for entry, _ in Spool(spool.path).read(0)] == [1]
    again = Spool.latest(tmp_path)
    assert again.path == spool.path
    again.append("metrics", numbers={"a": 2.0}, step=2)
    found = list(again.read(0))
    assert [entry["step"] for entry, _ in found] == [1, 2]
    assert "incomplete" in caplog.text
    again.state = {"offset": found[0][1]}
    assert again.n_unsent == 1


def test_a_spool_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "mlflow").write_text("a file where the folder should be")
    spool = Spool(tmp_path / "mlflow" / "x.jsonl")
    spool.append("metrics", numbers={}, step=1)
    spool.append("metrics", numbers={}, step=2)
    assert caplog.text.count("cannot be written") == 1


def links(folder, *pairs):
    for name, target in pairs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)


def test_of_a_run_that_somebody_sent_nothing_outside_its_folder_is_read_or_removed(here, monkeypatch):
    import mlflow

    home, beside = here / "home", here / "runs" / "thesis"
    for folder in (home, beside):
        folder.mkdir(parents=True)
        (folder / "precious").write_text("years of work")
    sent = here / "runs" / "gift"
    model = {"name": "m", "score": 1.0, "data": "d", "description": "", "step": 1, "weights": "w"}
    paths = ("../thesis/precious", "../thesis", "../../home/precious", str(home / "precious"), "link",
             "linked/precious", "holds", "deep", "..", "../gift/../thesis",
             "\0", 3, None, "round", "circles")  # fmt: skip
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db",
                   *(("artifact", {"path": path, "folder": None}) for path in paths),
                   *(("model", {**model, "path": path}) for path in paths))  # fmt: skip
    links(sent, ("link", home / "precious"), ("linked", home), ("holds/a", home / "precious"), ("deep/er/b", home),
          ("round", "round"), ("circles/round", "round"))  # fmt: skip
    (sent / "own").mkdir()
    (sent / "own" / "kept").write_text("of this run")
    (sent / "own" / "fine").symlink_to("kept")
    for path in ("own", "own/kept", "mlflow", "."):
        spool.append("model", **model, path=path)
        spool.append("model", **{**model, "weights": "other"}, path=path)
    spool.append("artifact", path="own", folder=None)
    spool.state = {"weights": "m w"}  # "sent before": each model's folder is to be removed
    tracking.sync("runs")
    assert (home / "precious").exists()
    assert (beside / "precious").exists()
    assert (sent / "own" / "kept").exists()
    assert spool.path.exists()
    stored = {f.name for f in (here / "mlruns").rglob("*") if f.is_file()}
    assert "precious" not in stored
    assert "kept" in stored
    assert mlflow.MlflowClient().search_runs(["1"])[0].data.metrics["loss"] == 1.0


def test_only_a_packed_model_of_the_run_is_removed_once_it_is_sent(here, monkeypatch):
    entry = {"name": "m", "score": 1.0, "data": "d", "description": "", "step": 1, "weights": "w"}
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db")
    mine, other = spool.path.with_suffix(".1.model"), spool.path.with_name("other.1.model")
    for folder in (mine, other):
        folder.mkdir()
        spool.append("model", **entry, path=f"mlflow/{folder.name}")
    spool.state = {"weights": "m w"}
    tracking.sync("runs")
    assert not mine.exists()
    assert other.exists()


@pytest.mark.parametrize("name", ["mlflow", "x.jsonl", "x.sent.json", "x.sent.part", "x.jsonl.lock"])
def test_a_spool_whose_files_are_links_is_refused(here, monkeypatch, name):
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db")
    victim = here / "victim"
    if name == "mlflow":
        spool.path.parent.rename(victim)
        links(here / "runs" / "gift", ("mlflow", victim))
    else:
        path = spool.path.with_name(name.replace("x", spool.path.stem, 1))
        victim.write_bytes(path.read_bytes() if path.exists() else b"precious")
        path.unlink(missing_ok=True)
        links(path.parent, (path.name, victim))
    before = victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())
    with pytest.raises(ValueError, match="is a symbolic link"):
        tracking.sync("runs/gift")
    with pytest.raises(ValueError, match="is a symbolic link"), a_run("runs/gift", resume=True):
        pass
    assert before == (victim.read_bytes() if victim.is_file() else sorted(victim.iterdir()))


def test_entries_that_are_no_entries_are_left_out(here, monkeypatch, caplog):
    spool = unsent(here, monkeypatch, "gift", f"sqlite:///{here}/mlflow.db")
    odd = [b"[]", b"3", b"null", b"{}", b'{"kind": 3}', b'{"kind": "nosuch"}', b'{"kind": "artifact", "path": 3}',
           b"[" * 100_000, b'{"kind": "metrics", "numbers": 3, "step": [], "time": 0}', b"\xff"]  # fmt: skip
    with spool.path.open("ab") as file:
        file.write(b"\n".join(odd) + b"\n")
    spool.append("metrics", numbers={"after": 2.0}, step=2)
    for offset in (-1, "x", None, [0], 1.5):
        spool.state_path.write_text(json.dumps({"offset": offset}))
        assert spool.state == {}
    tracking.sync("runs")
    import mlflow

    assert mlflow.MlflowClient().search_runs(["1"])[0].data.metrics["after"] == 2.0
