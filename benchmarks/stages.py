"""Seconds of each stage and of each phase of its steps, from a real run of a recipe.

    python benchmarks/stages.py recipes/mimo.yaml [key=value ...]     runs it, then prints
    python benchmarks/stages.py runs/mimo-...                         prints what a run recorded

Phases: rollout (sampling), score (rewards, teachers, policy), train (update), other (checkpoints,
logs). "outside" is what a stage's process spent outside its loop: start, load, save, data.
Wall time depends on how many stages run at once and on what else the machine does: compare ratios.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import check

from opdctl.run.launch import read_recipe
from opdctl.run.rundir import RunDir, read_rows

TOKENS = {"rollout": "rollout_tokens", "score": "teacher_tokens", "train": "train_tokens"}


def row_of(run: RunDir, stage: str) -> dict[str, float]:
    """Return the seconds, tokens a second and memory of a finished stage."""
    record = run.record(stage)
    seconds = record["compute"]["seconds"]
    metrics = read_rows(run.stage(stage) / "metrics.jsonl")
    row = {p: seconds[p] for p in ("rollout", "score", "train", "other")}
    for phase, tokens in TOKENS.items():
        count, spent = record["compute"][tokens], seconds[phase]
        row[f"{phase} speed"] = count / spent if count and spent else 0.0
    row["outside"] = record["seconds"] - record["loop_seconds"]
    row["peak"] = max((r["memory_mib"] for r in metrics), default=0.0)
    return row | {"steps": record["total"], "total": record["seconds"]}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target", help="a recipe, which is run, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as opdctl run has them")
    return parser.parse_args()


def main() -> None:
    """Run if asked to, then print the table and check it."""
    options = arguments()
    wall, target = None, options.target
    if not (Path(target) / "run.json").is_file():
        folder = Path(tempfile.mkdtemp()) / "run"
        start = time.perf_counter()
        command = [sys.executable, "-m", "opdctl", "run", target, "--out", str(folder)]
        subprocess.run([*command, *options.overrides], check=True)
        wall, target = time.perf_counter() - start, str(folder)
    run = RunDir(target)
    print(
        f"{'stage':<24}{'steps':>7}{'rollout':>9}{'score':>8}{'train':>8}{'other':>8}"
        f"{'outside':>9}{'total':>8}{'MiB':>8}  tokens a second: rollout, score, train"
    )
    stages = read_recipe(run).order()
    finished = [s for s in stages if run.record(s).get("status") == "done"]
    rows = []
    for stage in finished:
        rows.append(row := row_of(run, stage))
        print(
            f"{stage:<24}{row['steps']:>7}{row['rollout']:>9.1f}{row['score']:>8.1f}"
            f"{row['train']:>8.1f}{row['other']:>8.1f}{row['outside']:>9.1f}"
            f"{row['total']:>8.1f}{row['peak']:>8.0f}  "
            + "".join(f"{row[f'{phase} speed']:>10.0f}" for phase in TOKENS)
        )
    if not rows:
        raise SystemExit(f"{target} has no finished stage")
    total, outside = (sum(row[name] for row in rows) for name in ("total", "outside"))
    print(
        f"process seconds {total:.1f}, outside loops {outside:.1f} ({100 * outside / total:.0f} %)"
        + (f", wall {wall:.1f} s" if wall else "")
    )
    phases = ("rollout", "score", "train", "other", *(f"{phase} speed" for phase in TOKENS))
    check(rows, len(stages if wall else finished), ("total", "outside"), (*phases, "peak"))


if __name__ == "__main__":
    main()
