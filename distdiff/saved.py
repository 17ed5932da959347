"""A model's folder as it is read: ``model.json`` and ``weights.safetensors``, checked before anything is built."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode

from distdiff import received
from distdiff.component import check_trust, modules, nearest
from distdiff.imputers.blend import PREFIX
from distdiff.types import DataSpec, Tensor

FORMAT = 2


SEAL = "sha256"
"""What ``model.json`` calls the hash of the rest of itself."""

NAMES = "names"
"""Note in the weights' file (see :func:`names_of`)."""


class WrongFormat(ValueError):
    """The folder is of an earlier or a later distdiff."""


PARTS: dict[str, type] = {"process": dict, "denoiser": dict, "genes": list, "labels": dict, "info": dict}

ABOUT: dict[str, type] = {
    "name": str, "data": str, "store": str, "config": dict, "config_digest": str, "depth": dict, "nats": dict,
    "excess": dict, "training": dict, "seen": dict,
}  # fmt: skip
"""Entries of ``info`` that are read again, where there are any."""

LENGTHS = ("depth", "layers")
"""Options that say how often a denoiser repeats a layer."""

MOST_LISTED = 4096
"""Numbers that an option lists, at most."""

PER_GENE = ("spec.gene_mean", "spec.gene_max")
"""Tensors of one number a gene, besides the network's; only the first one must be there."""

MOST_MOLECULES = 1e12
"""Molecules of a cell, at most."""

MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.eye}

SLACK = 1 << 22
"""Numbers of a tensor that any denoiser may need on its way."""


def read(folder: Path, trust: Sequence[str]) -> tuple[dict[str, Any], DataSpec, dict[str, Tensor]]:
    """What a model's folder holds: ``model.json``, what it says of the data, and tensors by name.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        Another format, a damaged file, weights that are not those that were saved, numbers that are not finite, or a
        kind from a module outside ``trust``.
    """
    weights = folder / "weights.safetensors"
    card, tensors = received.json_of(folder / "model.json"), received.tensors_of(weights)
    check_format(card, folder)
    _check_seal(card)
    for name, wanted in PARTS.items():
        if not isinstance(card.get(name), wanted):
            raise ValueError(f"model.json: {name} must be {_word(wanted)}, is {received.kind(card.get(name))}")
    check_trust((card["process"], card["denoiser"]), trust, f"the model in {folder}")
    _check_about(card["info"])
    wanted_sum, found_sum = card["info"].get("weights_sha256"), received.sha256(weights)
    if found_sum != wanted_sum:
        raise ValueError(
            f"{weights.name} is not the file that was saved with model.json (sha256 {found_sum[:12]}..., model.json "
            f"says {str(wanted_sum)[:12]}...); copy the folder again from where it was made"
        )
    tensors.pop("shrink", None)  # of a gene's own count when denoising, in older models: not used any more
    received.check_finite(tensors)
    genes = tuple(card["genes"])
    _check_names("genes", genes)
    for label, values in card["labels"].items():
        if not isinstance(values, list):
            raise ValueError(f"model.json: labels.{label} must be a list, is {received.kind(values)}")
        _check_names(f"labels.{label}", values)
    _check_per_gene(tensors, len(genes))
    if received.notes_of(weights).get(NAMES, names := names_of(genes, card["labels"])) != names:
        raise ValueError(
            "model.json: genes or labels are not those that the weights were saved with, or are out of order"
        )
    mean, known = tensors["spec.gene_mean"].float().numpy(), tensors.get("spec.gene_max")
    largest = None if known is None else known.float().numpy()
    return card, DataSpec(genes, {k: tuple(v) for k, v in card["labels"].items()}, mean, largest), tensors


def sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    """``model.json`` with the SHA-256 of the rest of itself, as plain JSON."""
    plain = json.loads(json.dumps(card))
    return {**plain, SEAL: _seal(plain)}


def _seal(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()


def _check_seal(card: dict[str, Any]) -> None:
    """Refuse a card that is not what was written; those of versions that wrote no hash hold nothing but their parts."""
    recorded = card.pop(SEAL, None)
    if recorded is not None and recorded != _seal(card):
        raise ValueError(
            "model.json was changed or damaged after it was written (its content is not that of its own hash); copy "
            "the folder again from where it was made"
        )
    if unknown := sorted(card.keys() - PARTS.keys() - {"format"}):
        raise ValueError(f"model.json has an unknown key {unknown[0][:80]!r}{nearest(unknown[0][:80], [*PARTS, SEAL])}")


def names_of(genes: Sequence[str], labels: Mapping[str, Sequence[str]]) -> str:
    """Which column is which gene, and which code which label: stands in the weights' file, as SHA-256."""
    names = [list(genes), {name: list(values) for name, values in labels.items()}]
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def check_format(card: Mapping[str, Any], folder: Path) -> None:
    """Refuse another format than this one.

    Raises
    ------
    WrongFormat
        It is older or newer.
    """
    found = card.get("format", 0)
    if type(found) is not int:
        raise ValueError(f"model.json: format must be a whole number, is {received.kind(found)}")
    if found < FORMAT:
        raise WrongFormat(f"{folder} has model format {found} (model.json), of an earlier distdiff; train it again")
    if found > FORMAT:
        raise WrongFormat(
            f"{folder} has model format {found} (model.json), this distdiff reads up to {FORMAT}; upgrade"
        )


@contextlib.contextmanager
def bounded(card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Build a denoiser of distdiff's own kinds in here: options that the weights cannot fit take no memory or time.

    Raises
    ------
    ValueError
        A number that is not finite, more layers than tensors, or a tensor far larger than all of the file's.
    """
    denoiser = card["denoiser"]
    if modules(denoiser):  # code that the user trusts
        yield
        return
    for name in LENGTHS:
        if isinstance(denoiser.get(name), int) and denoiser[name] > len(tensors):
            raise ValueError(f"denoiser.{name}={denoiser[name]}, but there are {len(tensors)} tensors")
    for value in _values((card["process"], denoiser)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"model.json: an option is {value}")
        if isinstance(value, list) and len(value) > MOST_LISTED:
            raise ValueError(f"model.json: an option is a list of {len(value)}")
    with _Bounded(4 * max(tensor.numel() for tensor in tensors.values()) + SLACK):
        yield


class TooLarge(ValueError):
    """Options ask for a larger network than there can be here."""


class _Bounded(TorchFunctionMode):
    """Refuses to make a tensor of more than ``most`` numbers, or tensors of more than ``total`` numbers together."""

    def __init__(self, most: float, total: float = math.inf) -> None:
        super().__init__()
        self.most, self.remaining = most, total

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MAKERS:
            shape = args[0] if args and isinstance(args[0], (list, tuple)) else args
            made = math.prod(n for n in shape if isinstance(n, int))
            self.remaining -= made
            if made > self.most or self.remaining < 0:
                raise TooLarge(f"its options ask for a tensor of shape {list(shape)}, the file has none so large")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def affordable(denoiser: Mapping[str, Any], copies: int) -> Iterator[None]:
    """Build a denoiser to train in here; one whose weights, ``copies`` times, exceed the free memory is refused.

    Raises
    ------
    ValueError
        It is too large, or torch has no tensors of that size; its sizes are named.
    """
    free = _free_memory()
    try:
        with _Bounded(free // (4 * copies), free // (4 * copies)):
            yield
    except TooLarge:
        sizes = {k: v for k, v in denoiser.items() if type(v) is int or isinstance(v, (list, tuple))}
        named = ", ".join(f"denoiser.{name}={value}" for name, value in sizes.items())
        raise ValueError(
            f"{named}: a network of that size needs more than the {free / 2**30:.1f} GiB of free memory in training; "
            "choose smaller numbers"
        ) from None


def _free_memory() -> int:
    """Bytes that this process may still take."""
    process, limit = psutil.Process(), resource.getrlimit(resource.RLIMIT_AS)[0]
    free = psutil.virtual_memory().available
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - process.memory_info().vms))


def network(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's tensors; others than those and `PER_GENE` keep their names and fit nothing."""
    return {k.removeprefix("network."): v for k, v in tensors.items() if k not in PER_GENE and not k.startswith(PREFIX)}


def _check_per_gene(tensors: Mapping[str, Tensor], genes: int) -> None:
    """`PER_GENE`: one finite number a gene, not negative."""
    if "spec.gene_mean" not in tensors:
        raise ValueError("tensor spec.gene_mean is missing")
    for name in PER_GENE:
        if (tensor := tensors.get(name)) is None:
            continue
        if tuple(tensor.shape) != (genes,) or not tensor.is_floating_point():
            raise ValueError(
                f"tensor {name} has shape {list(tensor.shape)} of {tensor.dtype}, [{genes}] real numbers are wanted"
            )
        if not bool((tensor >= 0).all()):
            raise ValueError(f"tensor {name} holds numbers that are negative or not finite")


def _check_names(what: str, names: Sequence[Any]) -> None:
    if what == "genes" and not names:
        raise ValueError("model.json: genes is empty")
    if not_text := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"model.json: {what} must be names, one is {received.kind(not_text[0])}")
    if len(set(names)) < len(names):
        raise ValueError(f"model.json: {what} holds a name twice")


def _check_about(info: Mapping[str, Any]) -> None:
    for name, wanted in ABOUT.items():
        if name in info and not isinstance(info[name], wanted):
            raise ValueError(f"model.json: info.{name} must be {_word(wanted)}, is {received.kind(info[name])}")
    for name in ("train", "data"):
        if not isinstance(info.get("config", {}).get(name, {}), dict):
            raise ValueError(f"model.json: info.config.{name} must be a mapping")
    for name in ("depth", "nats"):
        if name in info:
            _check_numbers(f"info.{name}", [info[name].get(q) for q in ("q01", "q50", "q99")])
    if "excess" in info:
        parts = [info["excess"].get(part) for part in ("p", "impute", "generate")]
        if not all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
            raise ValueError("model.json: info.excess must hold lists p, impute, generate of one length")
        _check_numbers("info.excess", [value for part in parts for value in part])
    if "training" in info:
        _check_training(info["training"])
        if "label_depth" in info["training"]:
            _check_label_depth(info["training"]["label_depth"])


def described(
    spec: DataSpec, options: Mapping[str, Any], info: Mapping[str, Any], weights: int, where: str = ""
) -> str:  # fmt: skip
    """A model in a few lines: genes, labels, training cells and their depth, score, where it comes from."""
    training, trained = info.get("training", {}), bool(info.get("data"))
    lines = ["distdiff model" + (f" {info['name']}" if info.get("name") else "") + ("" if trained else ", not trained")]
    lines.append(f"  genes    {len(spec.genes):,}: {_some(spec.genes)}")
    for label, values in spec.labels.items():
        cells = training.get("labels", {}).get(label, {})
        by_number = sorted(values, key=lambda value: -cells.get(value, 0))
        shown = [f"{value} {cells[value]:,}" if value in cells else value for value in by_number]
        each = ", training cells of each" if cells else ""
        lines.append(f"  labels   {label} ({len(values)}{each}): {_some(shown)}")
    if len(training.get("depth", ())) == 9:
        low, median, high = (training["depth"][i] for i in (1, 4, 7))
        lines.append(
            f"  cells    {training['cells']:,} of training with {low:,.0f} to {high:,.0f} molecules (1 % to 99 %; "
            f"median {median:,.0f})"
        )
    judge, scores = str(info.get("judge", "val/deviance")), info.get("validation")
    if isinstance(scores, dict) and isinstance(scores.get(judge), float):
        lines.append(f"  score    {judge} {scores[judge]:.4f} on validation cells")
    law, network = (options.get(part, {}).get("kind") for part in ("process", "denoiser"))
    lines.append(f"  law      {law}; network {network}, {weights:,} weights")
    if trained:
        lines.append(f"  from     {info.get('store', 'a store')}, fingerprint {info['data'][:12]}")
    if where:
        lines.append(f"  at       {where}")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _check_training(cells: Mapping[str, Any]) -> None:
    """Numbers of training cells by label value, and ascending quantiles of their depth."""
    labels, depth = cells.get("labels", {}), cells.get("depth", [])
    if not isinstance(labels, dict) or not all(isinstance(values, dict) for values in labels.values()):
        raise ValueError("model.json: info.training.labels must map labels to numbers of cells by value")
    if not isinstance(depth, list):
        raise ValueError(f"model.json: info.training.depth must be a list, is {received.kind(depth)}")
    counts = [cells.get("cells"), *(n for values in labels.values() for n in values.values())]
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError("model.json: info.training must hold whole numbers of cells")
    _check_numbers("info.training.depth", depth)
    if sorted(depth) != depth:
        raise ValueError("model.json: info.training.depth must ascend")


def _check_label_depth(depths: Any) -> None:
    """Label -> value -> quantiles of molecules that ascend; under the label ``""`` those of all training cells."""
    laws = [law for values in depths.values() for law in values.values()] if _nested(depths) else []
    if not laws or "" not in depths.get("", {}) or not all(isinstance(law, list) and law for law in laws):
        raise ValueError("model.json: info.training.label_depth must map labels to quantiles of depth by value")
    _check_numbers("info.training.label_depth", [value for law in laws for value in law])
    if not all(0 <= law[0] <= law[-1] < MOST_MOLECULES and sorted(law) == law for law in laws):
        raise ValueError(f"model.json: info.training.label_depth must ascend within [0, {MOST_MOLECULES:g})")


def _nested(tree: Any) -> bool:
    return isinstance(tree, dict) and all(isinstance(values, dict) for values in tree.values())


def _check_numbers(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"model.json: {what} must hold finite numbers, one is {str(value)[:40]!r}")


def _values(tree: Any) -> Iterator[Any]:
    yield tree
    for value in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ():
        yield from _values(value)


def _word(wanted: type) -> str:
    return received.kind(wanted())
