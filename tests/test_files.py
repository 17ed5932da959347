from __future__ import annotations

import os
import sys
import threading

import pytest

from distdiff import files


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("old", "new"):
        with files.whole(tmp_path / "model", overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / "card").write_text(text)
    assert (tmp_path / "model" / "card").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps names")
def test_the_name_is_never_without_a_folder(tmp_path):
    target, missing, over = tmp_path / "model", [], threading.Event()

    def watch():
        while not over.is_set():
            if not target.exists():
                missing.append(1)

    target.mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(300):
            with files.whole(target, overwrite=True) as temporary:
                temporary.mkdir()
    finally:
        over.set()
        watcher.join()
    assert not missing


@pytest.mark.parametrize("link", [".", "lock", "identity", "identity.part", "store", "spill/000", "store/X/c"])
def test_a_work_folder_that_is_or_holds_a_link_is_refused(tmp_path, link):
    victim, work = tmp_path / "victim", tmp_path / ".out.building"
    victim.mkdir()
    (victim / "precious").write_text("years of work")
    path = work / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(victim if link != "lock" else victim / "precious")
    for overwrite in (False, True):
        with (
            pytest.raises(FileExistsError, match="is a symbolic link"),
            files.resumable(tmp_path / "out", "it", overwrite=overwrite),
        ):
            pass
    assert (victim / "precious").read_text() == "years of work"
    assert [p.name for p in victim.iterdir()] == ["precious"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_came_meanwhile_is_not_replaced_unless_asked(tmp_path, monkeypatch, kind, links):
    target = tmp_path / "out"

    def fill(path, text):
        if kind == "folder":
            path.mkdir()
            path = path / "x"
        path.write_text(text)

    def read():
        return (target / "x" if kind == "folder" else target).read_text()

    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    with pytest.raises(FileExistsError, match="made by another process meanwhile"), files.whole(target) as temporary:
        [fill(path, text) for path, text in ((temporary, "ours"), (target, "theirs"))]
    assert read() == "theirs"
    with files.whole(target, overwrite=True) as temporary:
        fill(temporary, "asked")
    assert read() == "asked"
    files.remove(target)
    with files.whole(target) as temporary:
        fill(temporary, "first")
    assert read() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
