"""Correct: every test marked ``gpu`` (CPU = CUDA in float32, bf16 near float32, the decoder, kill and resume)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from _part import Part

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")


def main() -> None:
    part = Part(__doc__)
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py"))
             if re.search(r"mark\.gpu\b", path.read_text())]  # fmt: skip
    # that machine's versions are not ours: what they warn of is no failure there
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short",
             "-p", "benchmarks.gpu._at_once", "--durations=5", *files]  # fmt: skip
    if part.dry:  # killing and continuing is what the suite itself tries on a CPU
        words += ["-k", "not killed"]
    found: dict[str, Any] = {"PASSED": 0, "SKIPPED": 0, "failed": []}
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        print(line, end="", flush=True)
        if match := LINE.match(line):
            name, how = match.groups()
            if how in ("FAILED", "ERROR"):
                found["failed"].append(name)
            else:
                found[how] += 1
            part.add("tests", found, show=False)
    sys.exit(process.wait())


if __name__ == "__main__":
    main()
