"""Kill a run again and again, resume it each time, and compare every byte with one left alone.

    python benchmarks/torture.py --kills 100
    python benchmarks/torture.py --recipe recipes/mimo.yaml --kills 20 stages.base.steps=60

A round kills at an instant drawn at random, or as soon as a checkpoint is being written, tokens are
being drawn, or an output is being exported; it kills the whole process group, only the command, or
only a worker. When the run is done it starts another, until there were enough kills. Compared are
outputs byte for byte, results and facts, the metrics of the last attempt of each step without
fields that time or memory determine, and the ledgers. Leaves out the power switch: see tests of
fsync. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from opdctl.run.rundir import VOLATILE, RunDir, held, read_rows

ROOT = Path(__file__).parent.parent
RECIPES = [ROOT / "tests" / "demo.yaml", ROOT / "tests" / "modes.yaml"]
AIMS = ("any instant", "checkpoint", "sampling", "export")
WHOM = ("group", "command", "worker")


def command(*arguments: object) -> list[str]:
    """Return the command line of the program, as a user starts it."""
    return [sys.executable, "-c", "from opdctl.cli.app import main; main()", *map(str, arguments)]


def markers(run: RunDir, aim: str) -> bool:
    """Return True while the aim is happening, judged by the files on disk."""
    for folder in run.path.glob("stages/*"):
        if aim == "checkpoint" and any(folder.glob("checkpoints/.step-*.part")):
            return True
        if aim == "export" and (folder / ".output.part").exists():
            return True
        if aim == "sampling":
            rows = len(read_rows(folder / "metrics.jsonl"))
            if (folder / "wal" / f"step-{rows:06d}").exists():
                return True
    return False


def phase(run: RunDir) -> str:
    """Return the phase that the kill hit, judged by the files it left."""
    for aim in ("export", "checkpoint", "sampling"):
        if markers(run, aim):
            return aim
    return "elsewhere in a stage" if running(run) else "between stages"


def running(run: RunDir) -> list[str]:
    """Return the stages that have begun and not ended."""
    stages = [folder.name for folder in run.path.glob("stages/*")]
    return [s for s in stages if run.record(s).get("status") == "running"]


def workers(run: RunDir) -> list[int]:
    """Return the ids of the processes that hold the lock of a running stage."""
    locks = [run.stage(s) / ".lock" for s in running(run)]
    words = [lock.read_text().split() for lock in locks if held(lock)]
    return [int(w[1]) for w in words if w]


def shoot(process: subprocess.Popen, run: RunDir, aim: str, whom: str, rng: random.Random) -> bool:
    """Wait for the moment and kill. False if the command ended before it came."""
    patience = rng.uniform(0.2, 12.0)
    start = time.monotonic()
    while process.poll() is None:
        late = time.monotonic() - start > patience
        if (late and aim == "any instant") or (aim != "any instant" and markers(run, aim)):
            break
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    if whom == "worker" and (pids := workers(run)):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(rng.choice(pids), signal.SIGKILL)
    elif whom == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    return True


def settle(run: RunDir) -> None:
    """Wait until the workers of a killed command have followed it."""
    deadline = time.monotonic() + 30
    locks = [run / ".lock", *run.path.glob("stages/*/.lock")]
    while any(held(lock) for lock in locks) and time.monotonic() < deadline:
        time.sleep(0.02)


def content(run: RunDir) -> dict[str, object]:
    """Return everything that must be the same, by name."""
    files: dict[str, object] = {}
    for folder in sorted(run.path.glob("stages/*")):
        for path in sorted(folder.glob("output/*")):
            files[f"{folder.name}/output/{path.name}"] = path.read_bytes()
        for name in ("results.json", "facts.json"):
            if (folder / name).is_file():
                files[f"{folder.name}/{name}"] = (folder / name).read_bytes()
        rows = read_rows(folder / "metrics.jsonl")
        plain = [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]
        files[f"{folder.name}/metrics"] = json.dumps(plain)
        ledger = {
            k: v for k, v in run.record(folder.name).get("compute", {}).items() if k != "seconds"
        }
        files[f"{folder.name}/ledger"] = json.dumps(ledger)
    return files


def torture(
    recipe: Path,
    overrides: list[str],
    kills: int,
    rng: random.Random,
    folder: Path,
    whole: Path | None = None,
) -> tuple[collections.Counter, collections.Counter, list[str]]:
    """Kill runs until there were enough kills, and compare them with a run left alone.

    Args:
        whole: the run left alone; None makes one.

    Returns:
        The kills by phase, the kills by kind of the stage that was hit, and the names of the
        contents that differ.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    if not whole:
        whole = folder / "whole"
        subprocess.run(command("run", recipe, "--out", whole, *overrides), check=True, **quiet)
    expected = content(RunDir(whole))
    phases, kinds, differ = collections.Counter(), collections.Counter(), []
    number = 0
    while phases.total() < kills:
        number += 1
        run = RunDir(folder / f"run-{number}")
        while True:
            begun = (run / "run.json").is_file()
            words = (
                ("resume", run.path) if begun else ("run", recipe, "--out", run.path, *overrides)
            )
            process = subprocess.Popen(command(*words), **quiet)
            if phases.total() >= kills:
                assert process.wait() == 0, f"{run.path} did not come to its end"
                break
            aim, whom = rng.choice(AIMS), rng.choice(WHOM)
            if not shoot(process, run, aim, whom, rng):
                assert process.returncode == 0, f"{run.path}: exit code {process.returncode}"
                break
            phases[phase(run)] += 1
            kinds.update(run.record(stage)["kind"] for stage in running(run))
            settle(run)
        ours = content(run)
        differ += [
            f"{run.path.name}/{k}" for k in expected | ours if expected.get(k) != ours.get(k)
        ]
    return phases, kinds, differ


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipe", type=Path, action="append")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def main() -> None:
    """Print kills by phase and kind, and the number of mismatches."""
    options = arguments()
    recipes, rng, bad = options.recipe or RECIPES, random.Random(options.seed), []
    for recipe in recipes:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            share = -(-options.kills // len(recipes))
            phases, kinds, differ = torture(recipe, options.overrides, share, rng, Path(folder))
        bad += differ
        print(f"{recipe.name}: {phases.total()} kills in {time.monotonic() - start:.0f} s")
        print("  by phase:", ", ".join(f"{k} {n}" for k, n in phases.most_common()))
        print("  by kind: ", ", ".join(f"{k} {n}" for k, n in kinds.most_common()))
        print("  mismatches:", len(differ), *differ[:10])
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
