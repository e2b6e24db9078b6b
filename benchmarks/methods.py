"""Compare every distillation method with plain OPD: same start, teachers, prompts, draws, steps.

    python benchmarks/methods.py record DIR [--methods a,b] [--seeds 0..4]
    python benchmarks/methods.py page DIR

``record`` adds to methods.yaml (pretrain, sft, an RL teacher for each domain), for each method of
`opdctl ls methods` that an opd stage can run, the stage, an evaluation and, where it can be
measured, the variance of its gradient. It runs that recipe seed by seed, one process of one thread
at a time. The same command again goes on where it was cut; with further methods, or after one was
changed, finished stages are taken over. ``page`` reads what was measured into docs/methods/*.json,
small files that are committed, and writes docs/methods.md from all of them; without DIR it writes
the page alone. A method that DIR lacks stays as it was recorded if DIR's start, teachers and
versions are those it was recorded with; else, and where a seed is missing, nothing is written.
Methods of RL (grpo, dr_grpo) have no teacher and are left out.

One setting, one learning rate, tuned on seed 100 for the two plain forms: a method that would gain
from its own is not given it. Each differs from the plain form in what its file in opdctl/methods
says, and in nothing else but what ``TINY`` overrides. Each takes as many steps of as many rollouts;
what one samples beside them (a bridge's fit, EffOPD's validation) is in its tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import methods_page

from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean
from opdctl.errors import EXIT_USAGE, OpdctlError, RecipeError, UsageError
from opdctl.evidence.measured import Measured, read_measurements
from opdctl.recipe.methods import method, methods
from opdctl.recipe.recipe import Recipe, resolve
from opdctl.recipe.yaml_lines import dump, parse
from opdctl.run.fingerprint import fingerprints
from opdctl.run.launch import parse_seeds, read_recipe
from opdctl.run.rundir import RunDir, read_json

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
DOMAINS = ("sort", "spell")
STEPS, BATCHES, WINDOW, LEVEL = 60, 16, 5, 0.9
SHARED = (
    "base",
    "start",
    *(f"{e}teacher_{d}" for d in DOMAINS for e in ("", "eval_")),
    "eval_start",
)
PROMPTS = {"per_step": 32, "samples": 4}
SAMPLING = {"max_tokens": 6, "temperature": 1.0}
OPTIM = {"lr": 2.0e-3, "schedule": "cosine", "warmup": 3}

# method: keys that it needs otherwise here, named on the page. All are judged at temperature 1 and
# so sample at it, gkd's loss too; prune_opd's numbers are for long answers, a large vocabulary.
TINY: dict[str, dict] = {
    "gkd": {"loss_temperature": 0.0},
    "oprd_bridge": {"objectives": {"bridge": {"tokens": 1024}}},
    "prune_opd": {
        "objectives": {"topk_pg": {"weights": {"overlap": {"k": 4, "tau": 0.5, "drop": 0.1}}}},
        "controllers": {"length": {"least": 2, "most": 6, "step": 1, "margin": 1}},
    },
}


def evaluation(model: str) -> dict:
    """Return a stage that evaluates another's output."""
    prompts = {"limit": 600, "samples": 4}
    return {
        "kind": "evaluate",
        "student": f"stage:{model}",
        "prompts": prompts,
        "sampling": SAMPLING,
    }


def laid_over(below: dict, above: dict) -> dict:
    """Return a tree with some of its keys replaced, at any depth."""
    both = {
        k: v for k, v in below.items() if isinstance(v, dict) and isinstance(above.get(k), dict)
    }
    return {**below, **above, **{k: laid_over(v, above[k]) for k, v in both.items()}}


def composed(name: str) -> dict:
    """Return the opd stage of a method at this size."""
    entry = {k: v for k, v in method(name).items() if k != "about"} | {"kind": "opd"}
    entry = laid_over(entry, TINY.get(name, {}))
    return entry | {
        "student": "stage:start",
        "seed_group": "arms",
        "teachers": {d: f"stage:teacher_{d}" for d in DOMAINS},
        "steps": STEPS,
        "prompts": {**entry.get("prompts", {}), **PROMPTS},
        "sampling": {**entry.get("sampling", {}), **SAMPLING},
        "optim": OPTIM,
    }


def variance(entry: dict) -> tuple[dict, list[str]]:
    """Return the gradients stage of an opd stage, and the keys of the method that it cannot have:
    they act between steps, and it trains nothing."""
    known = member("stages", "gradients").Config.__dataclass_fields__
    stage = {k: v for k, v in entry.items() if k in known}
    stage |= {"kind": "gradients", "seed_group": "variance", "batches": BATCHES, "together": True}
    return stage, sorted(set(entry) - set(known) - {"steps", "optim"})


def tree(chosen: Iterable[str]) -> tuple[dict, dict[str, str]]:
    """Return the recipe of some methods, and the refused stages: {stage: reason}."""
    whole = parse((HERE / "methods.yaml").read_text(encoding="utf-8"), "methods.yaml")[0]
    shared, stages, refused = dict(whole["stages"]), whole["stages"], {}
    for arm in chosen:
        entry = composed(arm)
        for stage, content in ((arm, entry), (f"variance_{arm}", variance(entry)[0])):
            try:
                resolve({**whole, "stages": {**shared, stage: content}}, "methods.yaml")
            except RecipeError as error:
                refused[stage] = "; ".join(f"{p.path}: {p.message}" for p in error.problems)
            else:
                stages[stage] = content
        if arm in stages:
            stages[f"eval_{arm}"] = evaluation(arm)
    return whole, refused


def distilling() -> list[str]:
    """Return the methods that an opd stage runs."""
    return [name for name in methods() if method(name).get("kind") == "opd"]


def newest(home: Path) -> RunDir | None:
    """Return the newest run of a seed, which has everything recorded so far."""
    folders = sorted(p.parent for p in home.glob("run-*/run.json"))
    return RunDir(folders[-1]) if folders else None


def record(folder: Path, chosen: list[str], seeds: list[int]) -> int:
    """Run the missing stages, seed by seed. Return the worst exit code."""
    worst = 0
    for seed in seeds:
        home = folder / f"seed-{seed}"
        old = newest(home)
        have = set(read_recipe(old).stages) if old else set()
        whole, refused = tree(m for m in distilling() if m in {*chosen, *have})
        for stage, reason in refused.items():
            print(f"refused: {stage}: {reason}", flush=True)
        recipe = resolve({**whole, "seed": seed}, "methods.yaml")
        if old and fingerprints(read_recipe(old)) == fingerprints(recipe):
            command = ["resume", str(old.path)]
        else:
            home.mkdir(parents=True, exist_ok=True)
            number = len(list(home.glob("run-*/run.json"))) + 1
            file = home / f"run-{number:03d}.yaml"
            file.write_text(dump(json.loads(json.dumps(whole))), encoding="utf-8")
            command = ["run", str(file), f"seed={seed}", "--out", str(home / f"run-{number:03d}")]
            command += ["--from", str(old.path)] if old else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-c", "from opdctl.cli.app import main; main()", *command]
        code = subprocess.run(program, env=environment, check=False).returncode
        worst = max(worst, code)
        if code == 75:  # stopped as asked
            break
    return worst


def recovery(accuracy: dict[str, float], setting: dict) -> float:
    """Return the mean over domains of (after - before) / (teacher - before)."""
    before, teacher = setting["start"], setting["teacher"]
    if any(teacher[d] <= before[d] for d in DOMAINS):
        raise UsageError("a teacher is no better than the start: there is nothing to recover")
    each = [(accuracy[d] - before[d]) / (teacher[d] - before[d]) for d in DOMAINS]
    return sum(each) / len(each)


def arrival(rows: list[dict], setting: dict) -> tuple[int, float] | None:
    """Return the step and CPU seconds at which the mean recovery of the last WINDOW steps' own
    rollouts reaches LEVEL; None if it never does."""
    curve = [recovery(row["accuracy"], setting) for row in rows]
    for last in range(WINDOW, len(curve) + 1):
        if sum(curve[last - WINDOW : last]) / WINDOW >= LEVEL:
            return last, seconds(rows[:last])
    return None


def seconds(rows: list[dict]) -> float:
    """Return the CPU seconds of the stage's processes up to the last of these steps, their start
    included."""
    of_attempt = {row["attempt"]: row["cpu_seconds"] for row in rows}
    return round(sum(of_attempt.values()), 2)


def one(run: RunDir, recipe: Recipe, measured: Measured, name: str, setting: dict) -> dict | None:
    """Return the measurements of one method on one seed; None while one of its stages is not
    finished."""
    stages = [s for s in (name, f"eval_{name}", v_name(name)) if s in recipe.stages]
    states = {s: run.record(s).get("status") for s in stages}
    for stage in stages[:2]:
        if states[stage] == "failed":
            return {"failed": run.record(stage).get("error", "no reason was logged")}
    if any(state not in ("done", "failed") for state in states.values()):
        return None
    rows, scores, prints = measured.rows[name], measured.scores(), fingerprints(recipe)
    accuracy = {d: round(float(scores[name, d]), 4) for d in DOMAINS}
    spent = run.record(name)["compute"]
    content = {
        "accuracy": accuracy,
        "recovery": round(recovery(accuracy, setting), 4),
        "tokens": {
            k: spent[f"{k}_tokens"] for k in ("rollout", "teacher_sampled", "teacher", "train")
        },
        "cpu_seconds": seconds(rows),
        "memory_mib": max(row["memory_mib"] for row in rows),
        "fingerprints": {s: prints[s] for s in stages},
    }
    if all(set(row.get("accuracy", ())) == set(DOMAINS) for row in rows):
        came = arrival(rows, setting)
        content["arrival"] = {"step": came and came[0], "cpu_seconds": came and came[1]}
    facts = {k: v for (s, k), v in measured.facts.items() if s == v_name(name)}
    if "variance of their sum" in facts:
        content["gradient"] = {
            "variance": float(f"{facts['variance of their sum']:.5g}"),
            "norm": float(f"{facts['norm of their sum']:.5g}"),
            "batches": BATCHES,
        }
    return content


def v_name(name: str) -> str:
    """Return the name of the stage that measures a method's variance."""
    return f"variance_{name}"


def read(folder: Path) -> tuple[dict, dict[str, dict[str, dict]]]:
    """Read the measurements of a folder: its setting, and each method by seed.

    Raises:
        UsageError: it has no runs, or a stage that all methods share is not finished on a seed.
    """
    homes = {int(p.name[5:]): p for p in folder.glob("seed-*") if p.name[5:].isdigit()}
    runs = {str(seed): run for seed, home in sorted(homes.items()) if (run := newest(home))}
    if not runs:
        hint = "give `page` the folder that was given to `python benchmarks/methods.py record`"
        raise UsageError(f"no seed-N/run-NNN in {folder}", hint)
    rollouts = PROMPTS["per_step"] * PROMPTS["samples"]
    settings: dict[str, dict] = {}
    whole = {"versions": {}, "steps": STEPS, "rollouts": rollouts, "seeds": settings}
    each: dict[str, dict[str, dict]] = {}
    for seed, run in runs.items():
        left = [s for s in SHARED if run.record(s).get("status") != "done"]
        if left:
            raise UsageError(f"{run.path}: {left[0]} is not done", command(folder, seeds=[seed]))
        recipe, measured = read_recipe(run), read_measurements(run)
        scores, prints = measured.scores(), fingerprints(recipe)
        setting = {"start": {}, "teacher": {}}
        for d in DOMAINS:
            setting["start"][d] = round(float(scores["start", d]), 4)
            setting["teacher"][d] = round(float(scores[f"teacher_{d}", d]), 4)
        settings[seed] = {**setting, "fingerprints": {s: prints[s] for s in SHARED}}
        whole["versions"] = run.record("start")["versions"]
        for name in (n for n in distilling() if n in recipe.stages):
            seeds, content = each.setdefault(name, {}), one(run, recipe, measured, name, setting)
            if content:
                seeds[seed] = content
    return whole, each


def command(folder: Path, chosen: Iterable[str] = (), seeds: Iterable[str] = ()) -> str:
    """Return the ``record`` command that measures what is missing."""
    words = f"python benchmarks/methods.py record {folder}"
    words += f" --methods {','.join(chosen)}" if {*chosen} not in (set(), {*distilling()}) else ""
    return words + (f" --seeds {','.join(seeds)}" if seeds else "")


def refuse_loss(folder: Path, new: dict, each: dict, stay: dict) -> None:
    """Refuse a folder that would lose recorded seeds, mix two settings, or lack a method's seed.

    Args:
        new: the setting of the folder.
        each: its measurements of each method, by seed.
        stay: the recorded measurements of the methods that it lacks, by seed.

    Raises:
        UsageError: one of the three; the message says what to record.
    """
    old = read_json(DOCS / "methods" / "_setting.json") or {"seeds": {}}
    anew = f"; to begin anew, remove the .json files of {DOCS / 'methods'}"
    lost = [s for s in old["seeds"] if s not in new["seeds"]]
    if lost:
        message = f"{folder} has no seed {', '.join(lost)}, which the page has"
        raise UsageError(message, command(folder, each, lost) + anew)
    same = {**new, "seeds": {s: new["seeds"][s] for s in old["seeds"]}} == old
    if stay and not same:
        message = f"start, teachers or versions of {folder} are not those of {', '.join(stay)}"
        raise UsageError(message, command(folder, stay, new["seeds"]) + anew)
    short = {n: set(new["seeds"]) - set(seeds) for n, seeds in {**stay, **each}.items()}
    short = {n: seeds for n, seeds in short.items() if seeds}
    if short:
        seeds = sorted(set().union(*short.values()), key=int)
        message = f"not measured on each of seeds {', '.join(seeds)}: {', '.join(short)}"
        raise UsageError(message, command(folder, short, seeds))


def collect(folder: Path) -> None:
    """Read the measurements into docs/methods/; all are read before anything is written.

    Raises:
        UsageError: see ``read`` and ``refuse_loss``.
    """
    out = DOCS / "methods"
    setting, each = read(folder)
    _, refused = tree(distilling())
    recorded = {p.stem: read_json(p) for p in sorted(out.glob("*.json")) if p.name[0] != "_"}
    lacking = (n for n in recorded if n not in each and n not in refused)
    refuse_loss(folder, setting, each, {n: recorded[n]["seeds"] for n in lacking})
    out.mkdir(exist_ok=True)
    write(out / "_setting.json", setting)
    for name in (n for n in distilling() if n in each or n in refused):
        entry = composed(name)
        content = {
            "method": name,
            "about": method(name)["about"],
            "tiny": TINY.get(name, {}),
            "not_in_variance": variance(entry)[1],
            "refused": refused.get(name, ""),
            "variance_refused": refused.get(v_name(name), ""),
            "seeds": each.get(name, {}),
        }
        write(out / f"{name}.json", content)


def write(path: Path, content: dict) -> None:
    """Write small JSON, as it is committed."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("record", help="run what is missing")
    first.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="where the runs are or will be, as DIR/seed-N/run-NNN; what is finished there is kept",
    )
    first.add_argument(
        "--methods",
        default=",".join(distilling()),
        metavar="A,B",
        help="methods of `opdctl ls methods` with `kind: opd`, separated by commas; all if not "
        "given. Those that DIR has are finished beside them",
    )
    first.add_argument(
        "--seeds", default="0..4", help="0..4 or 0,3,4: one run each, in turn (default: 0..4)"
    )
    second = commands.add_parser("page", help="docs/methods.md from what was recorded")
    second.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="what was given to `record`: read into docs/methods/*.json first, unless a seed or "
        "method recorded there would be lost. Without it the page is written from what is there",
    )
    return parser.parse_args()


def main() -> int:
    """Record or write the page, as the command line says. Return the exit code."""
    options = arguments()
    try:
        if options.command == "record":
            chosen = options.methods.split(",")
            for unknown in (m for m in chosen if m not in distilling()):
                hint = did_you_mean(unknown, distilling(), "one of")
                raise UsageError(f"--methods: no distilling method {unknown!r}", hint)
            return record(options.folder, chosen, parse_seeds(options.seeds))
        if options.folder:
            collect(options.folder)
        (DOCS / "methods.md").write_text(methods_page.page(DOCS / "methods"), encoding="utf-8")
    except OpdctlError as error:
        print("error: " + "; ".join(filter(None, (error.message, error.hint))), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
