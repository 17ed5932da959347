"""Correct: every test marked ``gpu`` (CPU = CUDA in float32, bf16 near float32, the decoder, kill and resume)."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _part import Part

ROOT = Path(__file__).parents[2]
AT_ONCE = 4
LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)")


def main() -> None:
    part = Part(__doc__)
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py"))
             if re.search(r"mark\.gpu\b", path.read_text())]  # fmt: skip
    # that machine's versions are not ours: what they warn of is no failure there
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short",
             "-p", "benchmarks.gpu._at_once", "--durations=5"]  # fmt: skip
    if part.dry:  # killing and continuing is what the suite itself tries on a CPU
        words += ["-k", "not killed"]
    found: dict[str, Any] = {"PASSED": 0, "SKIPPED": 0, "failed": []}
    lock = threading.Lock()

    def run(some: list[str]) -> int:
        process = subprocess.Popen([*words, *some], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout or ():
            with lock:
                print(line, end="", flush=True)
                if match := LINE.match(line):
                    name, how = match.groups()
                    if how in ("FAILED", "ERROR"):
                        found["failed"].append(name)
                    else:
                        found[how] += 1
                    part.add("tests", found, show=False)
        return process.wait()

    # most of a test's time is its process's own: several at a time on one GPU
    at_once = 1 if part.dry else AT_ONCE
    with ThreadPoolExecutor(at_once) as pool:
        sys.exit(max(pool.map(run, [files[first::at_once] for first in range(at_once)])))


if __name__ == "__main__":
    main()
