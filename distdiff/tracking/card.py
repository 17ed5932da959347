"""The model card: what a model was trained on, which genes it knows, how good it is, and what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distdiff import files, received
from distdiff.tracking.versions import versions

HEADLINES = ("deviance", "log1p_mse", "crps", "energy", "pearson")


def make(
    model: Path, *, profile: Mapping[str, Any], score: tuple[str, float], scores: Mapping[str, float] | None = None,
    claims: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Card of a saved model.

    Parameters
    ----------
    model
        Its folder.
    profile
        Of its data: numbers of cells, genes, splits.
    score
        Name and value of the validation number that chose the weights, lower is better.
    scores
        Of the evaluation on test cells, ``test/<metric>/<row>``.
    claims
        Sentences of the evaluation on who came first.
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
    info, out = spec["info"], []
    out.append("Raw counts only; anything negative, fractional or normalised is refused.")
    out.append(
        f"{len(spec['genes']):,} genes, known by name; others come back as they were. Genes that an input lacks count "
        "as not measured."
    )
    if depth := info.get("depth"):
        out.append(
            f"98 % of the training cells had {depth['q01']:,.0f} to {depth['q99']:,.0f} molecules (median "
            f"{depth['q50']:,.0f}); deeper or shallower cells are extrapolation."
        )
    for name, values in spec["labels"].items():
        out.append(f"{name}: {len(values)} values were seen; it conditions answers only where asked to (use_labels).")
    if nats := info.get("nats"):
        out.append(
            f"Held-out cells cost {nats['q01']:,.0f} to {nats['q99']:,.0f} nats (1 % to 99 %); cells above that are "
            "unlike what it was trained on (Model.likelihood)."
        )
    out.append("Imputed values are expectations, not observations: tests on them find differences that are not there.")
    out.append("Scores are of held-out cells of the same data; another tissue or protocol was not tried.")
    return out


def markdown(card: Mapping[str, Any]) -> str:
    """The card as text."""
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
    """Write ``card.md`` and ``card.json`` into ``folder``, whole or not at all; return the text."""
    text = markdown(card)
    with files.whole(folder, overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "card.md").write_text(text)
        (temporary / "card.json").write_text(json.dumps(card, indent=1))
    return text
