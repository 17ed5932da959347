from __future__ import annotations

import os
import socket
import subprocess
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


def work_of(target, **files_):
    work = target.with_name(f".{target.name}.building")
    for name, text in {"lock": "", "spill/000/x": "y", "store/counts": "old", **files_}.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    return work


def made(target, said, identity="it", overwrite=False):
    with files.resumable(target, identity, overwrite=overwrite, notify=said.append) as work:
        found = sorted(p.name for p in work.iterdir())
        (work / "store").mkdir(exist_ok=True)
        (work / "store" / "new").write_text("new")
    return found


@pytest.fixture
def dead():
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("left", [{}, {"identity": "other"}, {"ready": "it\n1-2"}, {"job.json": "{}"}])
def test_work_of_another_version_or_kind_is_removed_with_a_line(tmp_path, left):
    work, said = work_of(tmp_path / "out", **left), []
    assert made(tmp_path / "out", said) == ["identity", "lock"]
    assert said == [f"{work}: removed, it was left by other work (other inputs, options or version of distdiff)"]
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_work_of_a_live_process_is_left_alone(tmp_path):
    with files.resumable(tmp_path / "out", "it") as work:
        (work / "store").mkdir()
        with pytest.raises(FileExistsError, match="is being written by another process now"):
            made(tmp_path / "out", [])
        assert (work / "store").exists()


def test_remains_of_dead_processes_go_and_those_of_live_ones_stay(tmp_path, dead):
    said, target, host = [], tmp_path / "out[1].zarr", socket.gethostname()
    names = [".out[1].zarr.building-{}", f".out[1].tmp-{host}-{{}}.zarr", f".out[1].scratch-{host}-{{}}-abc"]
    gone, kept = ([tmp_path / name.format(pid) for name in names] for pid in (dead, os.getpid()))
    kept[1] = tmp_path / names[1].format(os.getppid())
    for folder in (*gone, *kept):
        (folder / "x").mkdir(parents=True)
    made(target, said)
    with files.whole(target, overwrite=True) as temporary, files.scratch(target):
        temporary.mkdir()
    assert said == [f"{gone[0]}: removed, it was left by a process that was killed"]
    assert sorted(tmp_path.iterdir()) == sorted([target, *kept])


@pytest.mark.parametrize("writer", ["resumable", "whole"])
def test_the_older_folder_gets_its_name_back_where_names_cannot_be_exchanged(tmp_path, dead, writer):
    target = tmp_path / "out"
    old = {"resumable": ".out.building/old", "whole": f".out.tmp-{socket.gethostname()}-{dead}.old"}[writer]
    (tmp_path / old).mkdir(parents=True)
    (tmp_path / old / "precious").write_text("years")
    open_ = {"resumable": lambda: files.resumable(target, "it"), "whole": lambda: files.whole(target)}[writer]
    with pytest.raises(FileExistsError, match="exists already"), open_():
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_file_where_the_work_folder_is_wanted(tmp_path):
    (tmp_path / ".out.building").write_text("")
    with pytest.raises(FileExistsError, match="is a file, a folder is wanted there; remove it"):
        made(tmp_path / "out", [])
