from __future__ import annotations

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
