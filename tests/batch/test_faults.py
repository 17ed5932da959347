"""Commands that sleep, race, see the clock step or are killed: nothing waits for ever, and the result stays right."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest

from distdiff import batch, owner
from distdiff.batch import impute_file
from distdiff.batch.workplace import owned
from distdiff.model import Model
from tests.batch.forks import Command, wait_for
from tests.batch.test_batch import content, shards_of

pytestmark = pytest.mark.distributed

SMALL = {"shard_cells": 64, "batch_size": 32, "sparse": True, "layers": ("mean", "draws", "mask")}

MOMENTS = {
    "it plans": "distdiff.batch.plan:make",
    "it writes the plan": "distdiff.batch.job:write_plan",
    "it writes a shard": "distdiff.batch.output:write_shard",
    "it begins to finish": "distdiff.batch.job:finish",
    "it joins CSR values": "distdiff.batch.output:join",
    "it describes CSR arrays": "distdiff.batch.output:finish_csr",
    "it writes obs and var": "distdiff.batch.frame:build",
    "it publishes": "distdiff.batch.job:_refuse_stranger",
    "it removes its work folder": "distdiff.batch.job:clear",
}


@pytest.fixture(scope="module")
def given(saved, atlas, mask, tmp_path_factory):
    """Arguments of a command, and what its result holds."""
    folder = tmp_path_factory.mktemp("want")
    impute_file(Model.load(saved), atlas, folder / "want.zarr", mask=mask, progress=False, **SMALL)
    return ("impute", saved, str(atlas)), {"mask": mask, **SMALL}, content(folder / "want.zarr")


@pytest.fixture
def hasty(monkeypatch):
    """A lock is waited for a moment only; commands that are forked wait as users' do."""
    monkeypatch.setattr(owner, "WAIT", 0.3)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_command_that_slept_damages_nothing(given, hasty, tmp_path, moment):
    """It is suspended, longer than any time limit, while another command is given; then it wakes."""
    arguments, options, want = given
    out = tmp_path / "out.zarr"
    with Command(tmp_path / "log", *arguments, out, before=("stop_at", MOMENTS[moment]), **options) as sleeper:
        sleeper.wait_until_stopped()
        began = time.monotonic()
        for seed in (0, 9):  # the same job, and another
            with pytest.raises(FileExistsError, match=rf"another command, host \S+, process {sleeper.pid}, since"):
                impute_file(Model.load(arguments[1]), arguments[2], out, overwrite=True, seed=seed, progress=False,
                            **options)  # fmt: skip
        assert time.monotonic() - began < 20
        sleeper.wake()
        assert sleeper.end() == 0, sleeper.words()
    assert content(out) == want
    assert "as written" in batch.verify(out, progress=False)
    assert [p.name for p in tmp_path.iterdir() if p.name != "log"] == ["out.zarr"]


@pytest.mark.parametrize("moment", ["it writes a shard", "it joins CSR values", "it writes obs and var"])
def test_a_command_that_lost_its_lock_in_its_sleep_damages_nothing(given, tmp_path, moment):
    """As after a file server forgot its locks: another command, with other options, does the whole job meanwhile."""
    arguments, options, _ = given
    out, other = tmp_path / "out.zarr", tmp_path / "other.zarr"
    model = Model.load(arguments[1])
    impute_file(model, arguments[2], other, seed=9, progress=False, **options)
    with Command(tmp_path / "log", *arguments, out, before=("stop_at", MOMENTS[moment]), **options) as sleeper:
        sleeper.wait_until_stopped()
        (tmp_path / ".out.zarr.building" / "lock").unlink()
        impute_file(model, arguments[2], out, overwrite=True, seed=9, progress=False, **options)
        sleeper.wake()
        assert sleeper.end() == 2
    assert content(out) == content(other)
    assert "as written" in batch.verify(out, progress=False)


def test_of_two_commands_that_overwrite_one_is_refused(given, tmp_path):
    arguments, options, want = given
    out = tmp_path / "out.zarr"
    slow = ("slow_network", 1.2)  # seven batches: longer than a lock is waited for
    with (
        Command(tmp_path / "a", *arguments, out, before=slow, overwrite=True, **options) as first,
        Command(tmp_path / "b", *arguments, out, before=slow, overwrite=True, **options) as second,
    ):
        assert sorted([first.end(), second.end()]) == [0, 2], first.words() + second.words()
        words = first.words() + second.words()
    assert "FileExistsError" in words
    assert "is being written by another command, host" in words
    assert content(out) == want
    assert not list(tmp_path.glob(".*"))


def test_a_step_of_the_clock_changes_nothing(given, tmp_path):
    arguments, options, want = given
    out = tmp_path / "out.zarr"
    stepping = ("step_clock", 3600.0)
    with Command(tmp_path / "a", *arguments, out, before=stepping, **options) as first:
        wait_for(lambda: shards_of(out) or first.process.exitcode is not None, first.words)
        with Command(tmp_path / "b", *arguments, out, before=stepping, **options) as second:
            assert first.end() == 0, first.words()
            assert second.end() in (0, 2), second.words()
    assert content(out) == want
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("overwrite", "step"),
    [(True, 97), *(pytest.param(overwrite, 7, marks=pytest.mark.long) for overwrite in (False, True))],
)
def test_killed_at_its_file_operations(given, tmp_path, overwrite, step):
    """Killed before its n-th file operation, for many n up to its end; the same command goes on."""
    arguments, options, _ = given
    model, out, old = Model.load(arguments[1]), tmp_path / "out.zarr", tmp_path / "old.zarr"
    options = {**options, "shard_cells": 112, "layers": ("mean",), "ood": 0}
    impute_file(model, arguments[2], tmp_path / "want.zarr", progress=False, **options)
    want, earlier = content(tmp_path / "want.zarr"), None
    if overwrite:
        impute_file(model, arguments[2], old, seed=9, progress=False, **options)
        earlier = content(old)
    for nth in range(step // 2, 100_000, step):
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            shutil.copytree(old, out)
        with Command(
            tmp_path / "log", *arguments, out, before=("kill_at", nth), overwrite=overwrite, **options
        ) as command:
            code = command.end()
        if overwrite:  # there is a whole result at any time
            assert content(out) in (earlier, want)
        else:
            assert not out.exists() or content(out) == want
        if code == 0:
            break
        assert code == -9, command.words()
        impute_file(model, arguments[2], out, overwrite=overwrite, progress=False, **options)
        assert content(out) == want
        assert not list(tmp_path.glob(".*"))
    assert nth > 2 * step


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_storm_of_kills(given, tmp_path, overwrite, kills):
    """The same command again and again, killed at random moments; two at a time, of which one is refused."""
    arguments, options, want = given
    out, rng, killed, rounds = tmp_path / "out.zarr", np.random.default_rng(kills), 0, 0
    slow = ("slow_network", 0.05)
    while killed < kills or not out.exists():
        rounds += 1
        with (
            Command(tmp_path / "a", *arguments, out, before=slow, overwrite=overwrite, **options) as first,
            Command(tmp_path / "b", *arguments, out, before=slow, overwrite=overwrite, **options) as second,
        ):
            both = [first, second]
            wait_for(lambda both=both: any(c.process.exitcode is not None for c in both) or shards_of(out))
            for command in both:
                command.process.join(rng.uniform(0, 0.5))
                if killed < kills and command.process.exitcode is None:
                    command.process.kill()
                    killed += 1
            for command in both:
                assert command.end() in (0, 2, -9), command.words()
        assert not out.exists() or content(out) == want
        if out.exists() and killed < kills:
            shutil.rmtree(out)
    with Command(tmp_path / "a", *arguments, out, overwrite=overwrite, **options) as last:
        assert last.end() == 0, last.words()
    assert content(out) == want
    assert not list(tmp_path.glob(".*"))


def test_a_command_that_waits_while_another_ends_finds_its_result(given, tmp_path):
    """The work folder, and with it the lock that it waits for, is removed under its eyes."""
    arguments, options, want = given
    out = tmp_path / "out.zarr"
    with (
        Command(tmp_path / "a", *arguments, out, before=("stop_at", MOMENTS["it publishes"]), **options) as first,
        Command(tmp_path / "b", *arguments, out, before="log_lock", overwrite=True, **options) as second,
    ):
        first.wait_until_stopped()
        wait_for(lambda: "locking" in second.words(), second.words)
        first.wake()
        assert (first.end(), second.end()) == (0, 0), first.words() + second.words()
    assert content(out) == want
    assert not list(tmp_path.glob(".*"))


def test_an_owner_without_a_note_is_refused_too(given, hasty, tmp_path):
    arguments, options, want = given
    out = tmp_path / "out.zarr"
    with owned(out, print) as work:
        (work / "owner.json").unlink()
        with Command(tmp_path / "log", *arguments, out, **options) as other:
            assert other.end() == 2
        assert "is being written by another command, which left no note" in other.words()
    impute_file(Model.load(arguments[1]), arguments[2], out, progress=False, **options)
    assert content(out) == want
