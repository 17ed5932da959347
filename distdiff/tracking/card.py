"""The model card: training data, genes, labels, scores and limits of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distdiff import files, received
from distdiff.tracking.versions import versions

HEADLINES = ("deviance", "log1p_mse", "crps", "energy", "pearson")
"""Metrics of the evaluation that the text of the card shows."""


def make(
    model: Path, *, profile: Mapping[str, Any], score: tuple[str, float], scores: Mapping[str, float] | None = None,
    claims: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return the card of a saved model.

    Parameters
    ----------
    model
        Folder of the model.
    profile
        Numbers that describe its data: cells, genes, cells of each split.
    score
        Name and value of the validation score that chose the weights, lower is better.
    scores
        Scores of the evaluation on test cells, ``test/<metric>/<row>``.
    claims
        Sentences of the evaluation on which imputer is best.

    Raises
    ------
    ValueError
        The folder's ``model.json`` cannot be read.
    """
    spec = received.json_of(model / "model.json")
    info = spec["info"]
    return {
        "name": info.get("name", "distdiff"),
        "process": spec["process"]["kind"],
        "denoiser": spec["denoiser"],
        "data": {"store": info.get("store"), "fingerprint": info.get("data"), **profile},
        "genes": {"number": len(spec["genes"]), "first": spec["genes"][:5]},
        "labels": spec["labels"],
        "metrics": {score[0]: score[1], **(scores or {})},
        "claims": list(claims),
        "limits": _limits(spec),
        "config_digest": info.get("config_digest"),
        "weights_sha256": info.get("weights_sha256"),
        "versions": versions(),
    }


def _limits(spec: Mapping[str, Any]) -> list[str]:
    """Sentences on the input that the model takes and on how far its results hold."""
    info, out = spec["info"], []
    out.append("It takes raw counts only; negative, fractional and normalised values are refused.")
    out.append(
        f"It imputes {len(spec['genes']):,} genes, matched by name; other genes come back as they were. Genes that an "
        "input lacks count as not measured."
    )
    if depth := info.get("depth"):
        out.append(
            f"98 % of the training cells had {depth['q01']:,.0f} to {depth['q99']:,.0f} molecules (median "
            f"{depth['q50']:,.0f}); results for deeper or shallower cells are extrapolated."
        )
    if (blend := info.get("blend", {})).get("weight") and "nmf" in blend:
        out.append(
            f"Imputation by one call is, in logarithms, {1 - blend['weight']:.0%} the network, {blend['pca']:.0%} a "
            f"PCA regression and {blend['nmf']:.0%} a Poisson NMF, as validation cells decided. Walks, guidance, cells "
            "with a label and other tasks are the network alone."
        )
    for name, values in spec["labels"].items():
        out.append(f"Label {name} has {len(values)} values; imputation uses it only with use_labels.")
    if nats := info.get("nats"):
        out.append(
            f"Held-out cells have a negative log-likelihood of {nats['q01']:,.0f} to {nats['q99']:,.0f} nats (1 % to "
            "99 %); cells above that differ from the training data (Model.likelihood)."
        )
    out.append("Imputed values are expectations, not observations: statistical tests on them find false differences.")
    out.append("The scores are of held-out cells of the same data; other tissues and protocols were not evaluated.")
    return out


def markdown(card: Mapping[str, Any]) -> str:
    """Return the card as markdown."""
    data = card["data"]
    profile = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in data.items()
                        if k not in ("store", "fingerprint"))  # fmt: skip
    metrics = {k: v for k, v in card["metrics"].items() if k.startswith("val/") or k.split("/")[1] in HEADLINES}
    lines = [
        f"# {card['name']}", "",
        f"Imputes single-cell counts. Process {card['process']}, denoiser {card['denoiser']['kind']}.", "",
        "```python", "import mlflow",
        f'model = mlflow.pyfunc.load_model("models:/{card["name"]}@champion")',
        "model.predict(frame)  # cells x genes; NaN and absent genes are imputed; or the path of an h5ad", "```", "",
        "## Data", "", f"{data['store']}, fingerprint `{data['fingerprint']}`: {profile}.", "",
        "## Genes", "", f"{card['genes']['number']:,}: {', '.join(card['genes']['first'])}, ...", "",
        *(f"- label {name}: {', '.join(values[:8])}{', ...' if len(values) > 8 else ''}"
          for name, values in card["labels"].items()),
        "## Metrics", "", "| | |", "| --- | ---: |", *(f"| {k} | {v:.5g} |" for k, v in metrics.items()), "",
        *(f"- {claim}" for claim in card["claims"]), "",
        "## Limits", "", *(f"- {limit}" for limit in card["limits"]), "",
        f"Config {card['config_digest']}, weights {str(card['weights_sha256'])[:12]}, "
        + ", ".join(f"{k} {v}" for k, v in card["versions"].items() if "." not in k) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(card: Mapping[str, Any], folder: Path) -> str:
    """Write ``card.md`` and ``card.json`` into ``folder``, which is replaced as a whole; return the text."""
    text = markdown(card)
    with files.whole(folder, overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "card.md").write_text(text)
        (temporary / "card.json").write_text(json.dumps(card, indent=1))
    return text
