"""Any value in a config ends in a run that works, or in one sentence before anything is trained or written."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
import traceback
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from distdiff import config
from distdiff.component import complete, kinds
from distdiff.data.ingest.shard import shard
from tests.data.conftest import make_adata, save
from tests.trials import Ended, command, trial

ODD: tuple[str, ...] = (
    "-1", "0", "1", "2", "1.5", "0.5", "-0.5", ".nan", ".inf", "-.inf", "nan", "1e30", "1e-320", "-1e30", "1e999",
    "1" + "0" * 40, "-1" + "0" * 40, "1" + "0" * 5000, "65536", "2147483648", "9223372036854775808", "1_2", "0x10",
    "1:30", "null", "~", "yes", "no", "''", "' '", "x", "a/b", "../x", "日本語", "'\U0001f9ec'", '"a\\0b"',
    '"\\x1b[31m"', '"two\\nlines"', "2024-01-02", "2024-01-02 03:04:05", "[]", "[1]", "[null]", "[1, 2]", "[0.9, 0.1]",
    "[x, x]", "[[1]]", "[.nan, .inf]", "{}", "{a: 1}", "{kind: x}", "{1: 2}", "{null: null}", "{[1]: 2}",
    "&a [*a]", "&a {b: *a}", "*nowhere", "!!python/object/apply:os.getcwd []", "!!binary aGVsbG8=", "!!set {a, b}",
    "!!omap [a: 1]", "!unknown x", "!!int x", "!!float ''", "!!timestamp x", "{a: 1, a: 2}", "[1, 2", "{a: 1", "'open",
    "%", "@", "`", "- 1", "a: b: c", "|\n  text", "fisher@1000000000", "fisher@x", "cosine@2", "os:system", ":",
    "'" + "y" * 100_000 + "'", "[" * 3000 + "]" * 3000, "[" + "0.5, " * 20_000 + "0]", "/dev/null/x", "/proc/x", "s3:/",
    "s3://", "file:///x", "~nobody/x",
)  # fmt: skip
"""Values as YAML text."""

BASE = {
    "data": {"labels": "[cell_type]"},
    "process": {"kind": "counts"},
    "denoiser": {"kind": "mlp", "width": "8", "depth": "1"},
    "train": {"cells": "64", "batch": "32", "grain": "16", "eval_cells": "64", "checkpoint_cells": "64"},
    "evaluate": {"enabled": "false", "cells": "10", "draws": "2", "repaint_steps": "1"},
    "tracking": {"enabled": "false"},
}
"""A run of two steps; values as YAML text."""

SMALL_UNET = {"shape": "[3, 2, 2]", "channels": "[8]", "attention": "[]", "layers": "1", "groups": "4"}

WHOLE_TEXTS: dict[str, bytes] = {
    "empty": b"", "null": b"null", "list": b"- data", "number": b"3", "text": b"data", "tab": b"data:\n\tstore: x\n",
    "binary": bytes(range(256)), "utf16": "data: {store: x}".encode("utf-16"), "latin": b"data: {store: \xe9}",
    "zeros": b"\0" * 4096, "two documents": b"data: {store: x}\n---\ndata: {store: y}\n",
    "unclosed": b"data: {store: x",
    "twice": b"train: {cells: 64}\ntrain: {cells: 32}\ndata: {store: x}\n", "deep": b"a: " + b"[" * 100_000,
    "deep mapping": b"{a: " * 5000 + b"1" + b"}" * 5000, "long key": b"k" * 100_000 + b": 1\n", "alias": b"a: *b\n",
    "laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(12)),
    "itself": b"&x\ndata: *x\n", "merge": b"data: &d {store: x}\ntrain:\n  <<: *d\n", "merge text": b"<<: x\n",
    "merge list": b"<<: [1, 2]\n", "number key": b"1: 2\n", "null key": b"null: 2\n", "list key": b"[a]: 2\n",
    "mapping key": b"{a: b}: 2\n", "nan key": b".nan: 1\n", "tag": b"!!python/object/apply:os.system ['touch pwned']\n",
    "bom": b"\xef\xbb\xbfdata: 3\n", "directive": b"%YAML 9.9\n---\ndata: {store: x}\n", "colon": b":\n",
}  # fmt: skip
"""Files that are no config, whatever their store."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A config, as text; ``key``: what a refusal must name."""

    name: str
    text: bytes
    key: str
    overrides: tuple[str, ...] = ()


def keys() -> Iterator[tuple[str, str]]:
    """Every section and key of a config, components' options too."""
    for section, hint in typing.get_type_hints(config.Config).items():
        if dataclasses.is_dataclass(hint):
            yield from ((section, field.name) for field in dataclasses.fields(hint))
    for section, base, _, given in config.SECTIONS:
        for kind in kinds(base):
            yield from ((section, f"{kind}.{option}") for option in complete(base, {"kind": kind}, given=given))


def text_of(tree: Mapping[str, Mapping[str, str]], store: str = "STORE") -> bytes:
    """YAML of sections whose values are YAML already."""
    tree = {**tree, "data": {"store": store, **tree.get("data", {})}}
    lines = (f"{section}:\n" + "".join(f"  {k}: {v}\n" for k, v in values.items()) for section, values in tree.items())
    return "".join(lines).encode()


def one(section: str, key: str, value: str) -> Case:
    """The base config with one odd value."""
    kind, _, option = key.rpartition(".")
    own = {"kind": kind} if kind else {}
    if (section, kind) == ("denoiser", "mlp"):
        own |= BASE["denoiser"]
    if kind == "unet":
        own |= SMALL_UNET
    if section == "evaluate" and key != "enabled":
        own["enabled"] = "true"
    tree = {**BASE, section: {**({} if kind else BASE.get(section, {})), **own, option: value}}
    return Case(f"{section}.{key}={value[:40]}", text_of(tree), option)


def overridden(section: str, key: str, value: str) -> Case:
    """The same on the command line."""
    kind, _, option = key.rpartition(".")
    own = (f"{section}.kind={kind}",) if kind else ()
    own += tuple(f"denoiser.{name}={value}" for name, value in SMALL_UNET.items()) if kind == "unet" else ()
    text = text_of({**BASE, **({section: {}} if kind and kind != "mlp" else {})})
    return Case(f"--{section}.{key}={value[:40]}", text, option, (*own, f"{section}.{option}={value}"))


def cases(number: int, seed: int = 0) -> Iterator[Case]:
    """Odd configs: one odd value (in the file or as an override), whole sections, whole files."""
    rng, every = random.Random(seed), sorted(keys())
    for name, text in WHOLE_TEXTS.items():
        yield Case(f"file {name}", text, "")
    for section in typing.get_type_hints(config.Config):
        value = rng.choice(ODD)
        body = text_of({k: v for k, v in BASE.items() if k != section or k == "data"})
        if section == "data":
            body = body.partition(b"process:")[1] + body.partition(b"process:")[2]
        yield Case(f"{section}: {value[:40]}", body + f"\n{section}: {value}\n".encode(), section)
    for n in range(number):
        made = (one, overridden)[n % 3 == 2](*rng.choice(every), rng.choice(ODD))
        if b"\0" not in b"".join(w.encode() for w in made.overrides) and all(len(w) < 10**5 for w in made.overrides):
            yield made


def parsed(case: Case, folder: Path) -> tuple[str, str]:
    """``works`` or ``refused`` and the sentence; else what is wrong about the answer of the config's reader."""
    (folder / "c.yaml").write_bytes(case.text)
    out = () if case.key == "out" else ("train.out=run",)
    began = time.process_time()
    try:
        config.load(folder / "c.yaml", [*out, *case.overrides])
        said, how = "", "works"
    except ValueError as error:
        said, how = str(error), "refused"
    except BaseException as error:
        return f"{type(error).__name__}", "".join(traceback.format_exception(error))[-800:]
    if time.process_time() - began > 10:
        how = "slow"
    elif how == "refused" and wrong(case, said):
        how = wrong(case, said)
    return how, said


def wrong(case: Case, sentence: str) -> str:
    """What is wrong about a refusal's sentence; empty: nothing."""
    if not sentence.isprintable():
        return "more than a line of text"
    if len(sentence) > 800:
        return "long"
    if case.key not in sentence and "is no valid YAML: line " not in sentence:
        return "the key is not named"
    return ""


def judge(case: Case, store: Path, folder: Path) -> tuple[Ended, str]:
    """How a training with this config ends, and what is wrong about it (nothing: empty)."""
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    (home / "c.yaml").write_bytes(case.text.replace(b"store: STORE", f"store: {store}".encode()))
    out = () if case.key == "out" else ("train.out=run",)
    ended = trial(command, ["train", "--config", "c.yaml", *out, *case.overrides], str(home), seconds=90)
    if ended.kind == "works":
        made = case.key == "out" or (home / "run" / "model" / "model.json").exists()
        return ended, "" if made else "no model"
    if ended.kind != "refused":
        return ended, ended.kind
    left = sorted(p.name for p in home.iterdir() if p.name != "c.yaml")
    return ended, f"left {left}" if left else wrong(case, ended.sentence)


def all_parsed(number: int, seed: int, folder: str) -> None:
    """Write what is wrong about any of the answers, and the numbers of the cases that are accepted."""
    faults, accepted = [], []
    for n, case in enumerate(cases(number, seed)):
        how, said = parsed(case, Path(folder))
        if how == "works":
            accepted.append(n)
        elif how != "refused":
            faults.append(f"{case.name}: {how}: {said}")
    Path(folder, "found.json").write_text(json.dumps([faults, accepted]))


def chosen(number: int, seed: int, folder: Path) -> list[Case]:
    """Accepted ones of so many cases; all answers of the reader are held against what they must be."""
    ended = trial(all_parsed, number, seed, str(folder), seconds=240)
    assert ended.kind == "works", ended
    faults, accepted = json.loads((folder / "found.json").read_text())
    assert not faults, "\n".join(faults)
    every = list(cases(number, seed))
    return [every[n] for n in accepted]


def small_store(folder: Path) -> Path:
    """120 cells, 12 genes, one label."""
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.6, 2.0, 12), (120, 12)).astype(np.float32)
    x[:12] += np.eye(12, dtype=np.float32)
    x[:, 0] += 1
    adata = make_adata(sp.csr_matrix(x), cell_type=np.array(["B", "T"])[rng.integers(0, 2, 120)])
    shard(save(adata, folder / "a.h5ad"), folder / "a.store", labels=("cell_type",), workers=0, progress=False)
    return folder / "a.store"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    ("number", "trained", "seed"),
    [(300, 5, 0), pytest.param(3000, 300, 1, marks=[pytest.mark.long, pytest.mark.timeout(3000)])],
)
def test_any_config_trains_or_is_refused_in_one_sentence_before_anything_is_written(
    store, tmp_path, number, trained, seed
):
    accepted = chosen(number, seed, tmp_path)
    assert len(accepted) > trained
    faults = []
    for case in random.Random(seed).sample(accepted, trained):
        ended, fault = judge(case, store, tmp_path)
        if fault:
            faults.append(f"{case.name}: {fault}: {ended.sentence or ended.said[-800:]}")
    assert not faults, "\n".join(faults)
