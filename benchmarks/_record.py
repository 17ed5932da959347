"""What every benchmark writes beside its numbers: command, commit, hardware, seconds."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distdiff import files


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with files.whole(path, overwrite=True) as temporary:
        figure.savefig(temporary, dpi=140, format="png")


def write(out: Path, began: float, content: dict[str, Any]) -> None:
    """Write ``content`` as JSON under the run's circumstances; machine paths are cut to their last part."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "distdiff"], capture_output=True, text=True, cwd=here
    ).stdout
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    result = {
        "command": " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *words]),
        "commit": commit + (" and uncommitted changes" if dirty else ""),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "seconds": round(time.perf_counter() - began),
        **content,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))


class Peak:
    """``with Peak() as peak: ...; peak.mib``: by how much memory rose at most (Linux; a CUDA device where one is)."""

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            self.before = self._status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if torch.cuda.is_available():
            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self.before
        else:
            self.mib = self._status("VmHWM") - self.before

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
