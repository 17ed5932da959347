"""Launchers: every launch file on one GPU, as a user starts it; same losses as one process; checkpoints exchanged.

``accelerate launch --config_file launch/accelerate/NAME.yaml --num_processes 1`` of 20 steps in float32, each validated
and logged; several at a time. Then a checkpoint of step 10 of one engine is continued by another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from _part import DEVICE, Part, made

ROOT = Path(__file__).parents[2]
ENGINES = ("single_gpu", "ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3",
           "deepspeed_zero2_offload", "deepspeed_zero3_offload")  # fmt: skip
PAIRS = (("fsdp", "deepspeed_zero2"), ("deepspeed_zero3", "ddp"), ("ddp", "fsdp"), ("deepspeed_zero2", "single_gpu"))
RTOL = 1e-3
"""float32 on a GPU, 20 steps of Adam."""
STEPS, BATCH = 20, 64


def main() -> None:
    part = Part(__doc__)
    engines, pairs = (("ddp", "fsdp"), (("fsdp", "ddp"),)) if part.dry else (ENGINES, PAIRS)
    if importlib.util.find_spec("deepspeed") is None:
        part.add("DeepSpeed", {"error": "not installed"} if not part.dry else {"skipped": "its tests run on CPUs"})
        engines = tuple(e for e in engines if "deepspeed" not in e)
        pairs = tuple(p for p in pairs if not any("deepspeed" in e for e in p))
    store = made(part.work, 2048, 200)
    config = part.work / "config.yaml"
    config.write_text(yaml.safe_dump({
        "data": {"store": str(store)}, "process": {"kind": "counts"}, "denoiser": {"kind": "mlp", "width": 64},
        "optim": {"warmup_cells": 100}, "evaluate": {"enabled": False}, "tracking": {"enabled": False},
        "train": {"cells": STEPS * BATCH, "batch": BATCH, "eval_cells": BATCH, "checkpoint_cells": 10 * BATCH,
                  "keep": 2, "patience": 1000, "precision": "fp32"},
    }))  # fmt: skip
    environment = dict(os.environ)
    if DEVICE.type == "cpu":  # a rehearsal: the same launch files, over gloo
        environment |= {"ACCELERATE_USE_CPU": "true"}

    def start(engine: str, out: Path, port: int) -> tuple[subprocess.Popen[bytes], Path]:
        first = [sys.executable]
        if engine:
            first += ["-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{engine}.yaml"]
            first += ["--num_processes", "1", "--main_process_port", str(port)]
        log = out.with_suffix(".log")
        with log.open("wb") as file:
            return subprocess.Popen(
                [*first, "launch/train.py", "--config", str(config), f"train.out={out}"], cwd=ROOT, env=environment,
                stdout=file, stderr=file,
            ), log  # fmt: skip

    def history(out: Path) -> list[dict[str, float]]:
        last = max((out / "checkpoints").glob("step-*"))
        return json.loads((last / "state.json").read_text())["progress"]["history"]

    def told(run: tuple[subprocess.Popen[bytes], Path], out: Path, began: float) -> dict[str, Any]:
        """How a run ended; its losses against those of one process."""
        try:
            status = run[0].wait(max(1.0, part.left()))
        except subprocess.TimeoutExpired:
            run[0].kill()
            status = None
        found: dict[str, Any] = {"rc": status, "s": round(time.monotonic() - began, 1)}
        if status != 0:
            words = run[1].read_text(errors="replace").strip().splitlines()
            mine = [w for w in words if w.startswith("distdiff: error") or (": " in w and "Error:" in w)]
            return found | {"error": (mine or words[-1:] or ["no word"])[0][:300]}
        away = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(history(out)[-steps:], want[-steps:], strict=True)]
        found["losses away from one process, at most"] = max(away)
        return found if max(away) < RTOL else found | {"error": f"losses differ by {max(away):.2g}"}

    began, steps = time.monotonic(), STEPS
    alone = start("", part.work / "one", 0)
    if alone[0].wait(part.left()) != 0:
        sys.exit(alone[1].read_text())
    want = history(part.work / "one")
    part.add(
        "one process",
        {"s": round(time.monotonic() - began, 1), "first and last loss": [want[0]["loss"], want[-1]["loss"]]},
    )
    at_once = 1 if part.dry else 8
    port = 29_600

    def all_of(jobs: list[tuple[str, str, Path]]) -> None:
        nonlocal port
        for first in range(0, len(jobs), at_once):
            began, running = time.monotonic(), []
            for name, engine, out in jobs[first : first + at_once]:
                port += 1
                running.append((name, start(engine, out, port), out))
            for name, run, out in running:
                part.add(name, told(run, out, began))

    all_of([(engine, engine, part.work / engine) for engine in engines])
    exchanged = []
    for before, after in pairs:
        source, out = part.work / before / "checkpoints" / f"step-{10:09}", part.work / f"{before}-{after}"
        if source.exists():
            shutil.copytree(source, out / "checkpoints" / source.name)
            exchanged.append((f"{before}, from step 10 on {after}", after, out))
        else:
            part.add(f"{before}, from step 10 on {after}", {"error": f"{before} left no checkpoint of step 10"})
    steps = 10
    all_of(exchanged)


if __name__ == "__main__":
    main()
