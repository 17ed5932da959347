"""The numbers of README.md and of the first tables of docs/reference/results.md, from benchmarks/results.

    python benchmarks/readme.py record --work FOLDER    # runs distdiff quickstart, writes quickstart.json (minutes)
    python benchmarks/readme.py                         # writes the pages
    python benchmarks/readme.py --check                 # says which page differs, and writes none

The sentence on a million cells comes from impute_1000.json (benchmarks/impute.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import _readme_page


def record(work: Path) -> None:
    """Run the quickstart in ``work`` and keep its evaluation."""
    import _record

    work.mkdir(parents=True, exist_ok=True)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "distdiff.cli", "quickstart", "--out", "quickstart"]
    subprocess.run(command, cwd=work, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    folder = work / "quickstart" / "run" / "evaluation"
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    _record.write(_readme_page.RESULTS / "quickstart.json", began, {
        "quickstart_seconds": round(seconds), "quickstart_cpu_seconds": round(spent),
        "table": json.loads((folder / "table.json").read_text()),
        "markdown": (folder / "table.md").read_text().splitlines(),
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["record"])
    parser.add_argument("--work", type=Path, help="folder for the quickstart's files")
    parser.add_argument("--check", action="store_true")
    a = parser.parse_args()
    if a.what and a.work is None:
        parser.error("record needs --work, a folder for the quickstart's files")
    if a.what:
        record(a.work)
        return
    differ = []
    for path, made in _readme_page.PAGES.items():
        old = path.read_text()
        if (new := made(old)) != old:
            differ.append(path.name)
            if not a.check:
                path.write_text(new)
    if a.check and differ:
        raise SystemExit(f"{', '.join(differ)} differs from benchmarks/results; run python benchmarks/readme.py")


if __name__ == "__main__":
    main()
