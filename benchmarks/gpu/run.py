"""Run the parts one after the other, each in a process of its own with its own time limit; see run.sh.

``results.json`` and ``RESULTS.md`` are written after each part, so a run that is cut keeps what it had; what an
earlier run of the repository found, and this one did not reach, stays, with its commit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import page

HERE = Path(__file__).parent
PARTS = {"correct": 110, "million": 150, "launchers": 130, "denoisers": 50, "train": 80, "attention": 20}
"""In order of what is least known, and the seconds that each may take: 540 in all, and 25 for installing."""
DRY = dict.fromkeys(PARTS, 150)
"""A rehearsal ends by itself, all parts in under three minutes; a busy machine may take longer."""


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count(), "device": "cpu",
    }  # fmt: skip
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "memory GiB": about.total_memory / 2**30, "cuda": torch.version.cuda,
                  "multiprocessors": about.multi_processor_count}  # fmt: skip
    return found


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return done.stdout.strip() or os.environ.get("COMMIT", "unknown (no git here)")


def run_part(
    name: str, limit: float, work: Path, log: Path, *, dry: bool = False, scripts: Path = HERE
) -> dict[str, Any]:  # fmt: skip
    """One part to its end or its limit; what it found so far counts either way."""
    out = work / f"{name}.json"
    words = [
        sys.executable,
        str(scripts / f"{name}.py"),
        "--out",
        str(out),
        "--work",
        str(work),
        "--seconds",
        str(limit - 4),
    ]
    began = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n== {name}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [*words, *(["--dry"] if dry else [])], stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        with_children(process.pid)
        process.wait()
    found = json.loads(out.read_text()) if out.exists() else {}
    ended = {"rc": status, "seconds": round(time.monotonic() - began, 1), "limit": limit}
    if status != 0:
        ended["last words"] = log.read_text(errors="replace").splitlines()[-12:]
    return {"ended": ended, **found}


def with_children(leader: int) -> None:
    """Kill whatever of a part's session is still there."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = int(path.read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(path.parts[2]), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def with_earlier(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Findings of a part, and those of an earlier run of it that this one did not reach."""
    kept = {
        name: {"commit": earlier.get("commit")} | case for name, case in earlier.items()
        if name != "ended" and isinstance(case, dict) and not {"error", "skipped"} & case.keys()
        and (name not in found or "skipped" in found[name])
    }  # fmt: skip
    return found | kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="every part small, on a CPU")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or HERE))
    a = parser.parse_args()
    if a.dry:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DISTDIFF_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        a.out = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="distdiff-gpu-dry-"))
    a.out.mkdir(parents=True, exist_ok=True)
    log, results = a.out / "log.txt", {"commit": commit(), "dry": a.dry, "machine": machine(), "parts": {}}
    if not a.dry and (HERE / "results.json").exists():
        earlier = json.loads((HERE / "results.json").read_text())
        results["parts"] = {name: {"commit": earlier["commit"]} | part for name, part in earlier["parts"].items()}
    log.write_text(json.dumps(results["machine"]) + "\n")
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in (part for part in PARTS if part in a.only):
            print(f"{time.monotonic() - began:4.0f} s  {name} ...", flush=True)
            found = run_part(name, (DRY if a.dry else PARTS)[name], work, log, dry=a.dry)
            of_before = results["parts"].get(name, {})
            results["parts"][name] = {"commit": results["commit"]} | with_earlier(found, of_before)
            (a.out / "results.json").write_text(json.dumps(results, indent=1))
            (a.out / "RESULTS.md").write_text(page.made(results))
            for trace in work.glob("trace*.json.gz"):
                shutil.copy(trace, a.out)
            errors = [f"{key}: {v['error']}" for key, v in found.items() if isinstance(v, dict) and "error" in v]
            if found["ended"]["rc"] != 0 or errors:
                failed.append(name)
                print("\n".join([*found["ended"].get("last words", []), *errors]), flush=True)
    print(f"{time.monotonic() - began:4.0f} s in all; {a.out}")
    print(page.made(results))
    # a GPU run keeps whatever it got; a rehearsal is a test
    sys.exit(f"failed: {', '.join(failed)}" if failed and a.dry else 0)


if __name__ == "__main__":
    main()
