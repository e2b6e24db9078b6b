"""Seconds of each stage and of each phase of its steps, from a real run of a recipe.

    python benchmarks/stages.py recipes/mimo.yaml [key=value ...]     runs it, then prints
    python benchmarks/stages.py runs/mimo-...                         prints what a run recorded

Phases: rollout (sampling), score (rewards, teachers, policy), train (update), other (checkpoints,
logs). "outside" is what a stage's process spent outside its loop: start, load, save, data.
Wall time depends on how many stages run at once and on what else the machine does: compare ratios.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir, read_rows


def main(target: str, *overrides: str) -> None:
    """Run if asked to, then print the table."""
    wall = None
    if not (Path(target) / "run.json").is_file():
        folder = Path(tempfile.mkdtemp()) / "run"
        start = time.perf_counter()
        command = [sys.executable, "-m", "opdctl", "run", target, "--out", str(folder)]
        subprocess.run([*command, *overrides], check=True)
        wall, target = time.perf_counter() - start, str(folder)
    run = RunDir(target)
    print(
        f"{'stage':<24}{'steps':>7}{'rollout':>9}{'score':>8}{'train':>8}{'other':>8}"
        f"{'outside':>9}{'total':>8}{'MiB':>8}  tokens a second: rollout, score, train"
    )
    total, outside = 0.0, 0.0
    for stage in read_recipe(run).order():
        record = run.record(stage)
        if record.get("status") != "done":
            continue
        seconds = record["compute"]["seconds"]
        beyond = record["seconds"] - record["loop_seconds"]
        total, outside = total + record["seconds"], outside + beyond
        rows = read_rows(run.stage(stage) / "metrics.jsonl")
        peak = max((r["memory_mib"] for r in rows), default=0.0)
        done = {"rollout": "rollout_tokens", "score": "teacher_tokens", "train": "train_tokens"}
        speed = [(record["compute"][tokens], seconds[phase]) for phase, tokens in done.items()]
        print(
            f"{stage:<24}{record['total']:>7}{seconds['rollout']:>9.1f}{seconds['score']:>8.1f}"
            f"{seconds['train']:>8.1f}{seconds['other']:>8.1f}{beyond:>9.1f}"
            f"{record['seconds']:>8.1f}{peak:>8.0f}  "
            + "".join(f"{count / spent if count and spent else 0:>10.0f}" for count, spent in speed)
        )
    print(
        f"process seconds {total:.1f}, outside loops {outside:.1f} ({100 * outside / total:.0f} %)"
        + (f", wall {wall:.1f} s" if wall else "")
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
