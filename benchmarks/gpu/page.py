"""``RESULTS.md`` from ``results.json``: targets first, then a table for each part.

python benchmarks/gpu/page.py benchmarks/gpu/results.json > benchmarks/gpu/RESULTS.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Found = dict[str, Any]


def number(value: Any, form: str = ",.3g") -> str:
    return "-" if value is None else format(value, form)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return [*lines, *("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows), ""]


def cases(part: Found, *keys: str) -> dict[str, Found]:
    """The findings of a part that have any of ``keys``, or say why they have not."""
    return {
        name: found for name, found in part.items()
        if isinstance(found, dict) and name != "ended" and any(k in found for k in (*keys, "error", "skipped"))
    }  # fmt: skip


def missing(found: Found) -> str:
    return found.get("error") or found.get("skipped") or ""


def target(name: str, which: str, wanted: float, got: float | None) -> list[str]:
    met = got is not None and (got >= wanted if which == "at least" else got <= wanted)
    verdict = "not measured" if got is None else "met" if met else "**missed**"
    return [name, f"{which} {wanted:g}", number(got), verdict]


def targets(parts: dict[str, Found]) -> list[list[str]]:
    train, million = parts.get("train", {}), parts.get("million", {})
    shares = [f.get("share of peak") or 0 for name, f in cases(train, "share of peak").items()
              if name.startswith("transformer, 2,000") and "12 GB" not in name]  # fmt: skip
    waits = [f["data_wait"] for f in cases(train, "data_wait").values() if "data_wait" in f]
    mean, draws = (million.get(f"1,000,000, {task}", {}).get("s") for task in ("mean", "5 draws"))
    share, waited = max(shares, default=None), max(waits, default=None)
    return [
        target("transformer, 2,000 genes, width 512: share of bf16 peak", "at least", 0.45, share),
        target("share of training that waits for data, at worst", "at most", 0.02, waited),
        target("1,000,000 cells x 2,000 genes, mean: seconds", "at most", 120, mean),
        target("the same, 5 draws: seconds", "at most", 600, draws),
    ]


def correct(part: Found) -> list[str]:
    tests = part.get("tests", {})
    passed, skipped, failed = tests.get("PASSED", 0), tests.get("SKIPPED", 0), tests.get("failed", [])
    said = f"{passed} tests passed, {skipped} skipped, {len(failed)} failed."
    return [said, "", *(f"- `{name}`" for name in failed), ""]


def train(part: Found) -> list[str]:
    columns = {"batch": ",d", "cells/s": ",.3g", "ms a step": ",.3g", "GFLOP a cell": ",.3g", "share of peak": ".3f",
               "data_wait": ".4f", "peak GiB": ",.3g", "busy": ".2f", "kernels a step": ",.0f"}  # fmt: skip
    found = cases(part, "cells/s")
    rows = [
        [name, *(number(f.get(key), form) for key, form in columns.items()), missing(f)] for name, f in found.items()
    ]
    lines = [f"Peak of a bf16 matrix product here: {number((part.get('peak bf16 FLOP/s') or 0) / 1e12)} TFLOP/s.", ""]
    lines += table(["", *columns, "not measured because"], rows)
    for name, kernels in ((name, f["top kernels"]) for name, f in found.items() if f.get("top kernels")):
        lines.append(f"- {name}: " + "; ".join(f"{share:.0%} `{kernel}`" for kernel, share in kernels[:3]))
    return [*lines, ""]


def attention(part: Found) -> list[str]:
    keys = ("forward s", "both s", "forward MiB", "both MiB")
    rows = [
        [name, *(number(f[k] * 1000) if k in f else "-" for k in keys[:2]), *(number(f.get(k)) for k in keys[2:]),
         number(f.get("forward share of peak"), ".3f"), number(f.get("both share of peak"), ".3f"), missing(f)]
        for name, f in cases(part, *keys).items()
    ]  # fmt: skip
    heads = ["method, genes", "forward ms", "both ms", "forward MiB", "both MiB", "forward share of peak",
             "both share of peak", ""]  # fmt: skip
    crossing = [f"- {name}: {number(value, ',.0f')}" for name, value in part.items() if name.startswith("LSH faster")]
    return [*table(heads, rows), *crossing, ""]


def million(part: Found) -> list[str]:
    rows = [
        [name, number(f.get("s")), number(f.get("cells/s"), ",.0f"), number(f.get("busy"), ".2f"),
         number(f.get("bytes a cell"), ",.0f"), missing(f)]
        for name, f in cases(part, "cells/s").items()
    ]  # fmt: skip
    made = [f"- {name}: {found}" for name, found in part.items() if name.startswith("made")]
    return [*table(["cells, task", "s", "cells/s", "busy", "bytes a cell", ""], rows), *made, ""]


def launchers(part: Found) -> list[str]:
    away = "losses away from one process, at most"
    rows = [[name, str(f.get("rc", "-")), number(f.get("s")), number(f.get(away), ".1e"), missing(f)]
            for name, f in cases(part, "rc").items()]  # fmt: skip
    return table(["launch file", "exit status", "s", away, ""], rows)


def denoisers(part: Found) -> list[str]:
    rows, curves = [], []
    for name, found in cases(part, "curve").items():
        curve = [point for point in found.get("curve", ()) if "log score" in point]
        last = curve[-1] if curve else {}
        values = [found.get("weights"), last.get("cells")]
        scores = [last.get(key) for key in ("seconds", "log score", "deviance")]
        rows.append([name, *(number(v, ",d") for v in values), *(number(v, ".4g") for v in scores), missing(found)])
        if curve:
            curves.append(f"- {name}: " + ", ".join(f"{c['seconds']:.1f} s {c['log score']:.3f}" for c in curve))
    heads = ["", "weights", "cells seen", "seconds", "log score (nats)", "deviance", ""]
    return [f"{part.get('setting', '')}", "", *table(heads, rows), *curves, ""]


PAGES = {
    "correct": ("Correct", correct), "train": ("Training", train), "attention": ("Attention", attention),
    "million": ("Imputing a million cells", million), "launchers": ("Launch files", launchers),
    "denoisers": ("Which denoiser when", denoisers),
}  # fmt: skip


def made(results: Found) -> str:
    """The whole page."""
    about, parts = results["machine"], results["parts"]
    lines = [
        "# What a GPU shows",
        "",
        "Written by `benchmarks/gpu/page.py`; `bash benchmarks/gpu/run.sh` makes it anew.",
        "",
    ]
    if results["dry"]:
        lines += ["**A rehearsal on a CPU: these numbers say nothing.**", ""]
    memory = f", {about['memory GiB']:.0f} GiB" if "memory GiB" in about else ""
    cores = f"{about['cpus']} CPU cores; commit {results['commit'][:12]}"
    lines += [f"{about['device']}{memory}; torch {about['torch']}, Python {about['python']}, {cores}", ""]
    lines += [results["note"], ""] if "note" in results else []
    lines += ["## Targets", "", *table(["", "wanted", "measured", ""], targets(parts))]
    for name, (title, page) in PAGES.items():
        if name not in parts:
            continue
        ended = parts[name]["ended"]
        how = (
            ""
            if ended["rc"] == 0
            else " (stopped at its limit)"
            if ended["rc"] is None
            else f" (exit status {ended['rc']})"
        )
        of = parts[name].get("commit", results["commit"])
        age = "" if of == results["commit"] else f", commit {of[:12]}"
        lines += [f"## {title}{how}{age}", "", *page(parts[name])[:-1]]
        before = {case: f["commit"] for case, f in parts[name].items() if isinstance(f, dict) and "commit" in f}
        lines += [f"- {case}: of an earlier run, commit {of[:12]}" for case, of in before.items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(made(json.loads(Path(sys.argv[1]).read_text())), end="")
