"""What a job did, summed over the shards of all its processes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distdiff.tasks.impute import FillCounts


@dataclass
class Summary(FillCounts):
    """What a job did, summed over all its processes.

    Attributes
    ----------
    network_calls, passes
        Calls of the network, and how many a cell went through.
    seconds
        Of computing, summed over processes.
    peak_mib
        Resident memory of the largest process.
    """

    network_calls: int = 0
    passes: float = 0.0
    peak_mib: float = 0.0

    def line(self) -> str:
        """In one line."""
        rate = self.cells / self.seconds if self.seconds else 0.0
        filled = f"{self.targets:,} targets filled, " if self.targets else ""
        calls = f"{self.network_calls:,} network calls ({self.passes:.1f} a cell), " if self.network_calls else ""
        return (
            f"{self.cells:,} cells x {self.genes:,} genes, {filled}{calls}{self.seconds:.1f} s ({rate:,.0f} cells/s), "
            f"peak memory {self.peak_mib:,.0f} MiB"
        )

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], **about: int) -> Summary:
        """Sum the records of shards (``filled``, ``calls``, ``passes``, ``seconds``, ``peak_mib``)."""
        whole = together(records)
        filled = {**whole["filled"], **about, "seconds": whole["seconds"]}
        return cls(
            **filled,
            network_calls=whole["calls"],
            passes=whole["passes"] / max(1, filled["cells"]),
            peak_mib=whole["peak_mib"],
        )


def summed(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the counts in records of batches or shards."""
    filled = {f.name: sum(record["filled"].get(f.name, 0) for record in records) for f in fields(FillCounts)}
    return {"filled": filled, **{key: sum(record[key] for record in records) for key in ("calls", "passes")}}


def together(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The records of shards as one."""
    seconds, peak = sum(r["seconds"] for r in records), max(r["peak_mib"] for r in records)
    return {**summed(records), "seconds": seconds, "peak_mib": peak}


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage begins at the peak of the parent process
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
