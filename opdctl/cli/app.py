"""The commands of ``opdctl``: each parses, calls and renders. No logic, and no torch.

opdctl run recipes/mimo.yaml
opdctl resume runs/mimo-20261120-101500-3f2a
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from opdctl import __version__
from opdctl.cli.file_commands import cp, new, tidy
from opdctl.cli.options import (
    Detach,
    DirArg,
    From,
    Json,
    Members,
    Overrides,
    RecipeArg,
    Size,
    Trust,
)
from opdctl.errors import EXIT_PENDING, EXIT_USAGE, OpdctlError, RecipeError
from opdctl.process.import_path import close_working_directory
from opdctl.process.streams import open_closed_streams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"opdctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Run declarative multi-stage post-training recipes with on-policy distillation."""


@app.command()
def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    size: Size = "",
    seeds: Annotated[str, typer.Option(help="several runs in one directory: 0..4")] = "",
    out: Annotated[Path | None, typer.Option(help="the run directory to make")] = None,
    reuse: From = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="this stage and what it needs; may be repeated"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan, and stop")] = False,
    detach: Detach = False,
    trust_members: Trust = False,
) -> None:
    """Plan a recipe, then do it."""
    from opdctl.cli.run_commands import run_recipe

    sys.exit(
        run_recipe(
            recipe,
            tuple(overrides or ()),
            size=size,
            seeds=seeds,
            out=out,
            reuse=reuse,
            only=tuple(only or ()),
            dry_run=dry_run,
            detached=detach,
        )
    )


@app.command()
def stage(
    kind: Annotated[str, typer.Argument(help="`opdctl ls stages` lists them")],
    overrides: Overrides = None,
    student: Annotated[str, typer.Option(help="model it starts from")] = "",
    teacher: Annotated[
        list[str] | None, typer.Option(help="[DOMAIN=]REF; once for each teacher")
    ] = None,
    method: Annotated[
        str, typer.Option(help="`opdctl ls methods` lists them; or a file, as `opdctl cp` writes")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="the run directory to make")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="plan, and stop")] = False,
    detach: Detach = False,
    trust_members: Trust = False,
) -> None:
    """Run one stage; its keys may be given without `stages.KIND.` in front."""
    from opdctl.cli.run_commands import run_stage

    sys.exit(
        run_stage(
            kind,
            tuple(overrides or ()),
            student=student,
            teachers=tuple(teacher or ()),
            method=method,
            out=out,
            dry_run=dry_run,
            detached=detach,
        )
    )


@app.command()
def resume(directory: DirArg, overrides: Overrides = None, detach: Detach = False) -> None:
    """Continue a run, or a set of seeds, from where it stopped."""
    from opdctl.cli.run_commands import resume_run

    sys.exit(resume_run(directory, tuple(overrides or ()), detach))


@app.command()
def plan(
    target: Annotated[
        str, typer.Argument(help="a recipe or a run directory", metavar="RECIPE|DIR")
    ],
    overrides: Overrides = None,
    size: Size = "",
    reuse: From = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="estimate memory and time of each stage on h100, h200, a100, b200, l40s, rtx4090; "
            "where the recipe runs on cuda, h100 if not given",
            metavar="GPU",
        ),
    ] = "",
    exit_code: Annotated[bool, typer.Option("--exit-code", help="3 if work is pending")] = False,
    as_json: Json = False,
    trust_members: Trust = False,
) -> None:
    """Say what would run, and why; for a GPU, what it would hold and take. Nothing is loaded."""
    from opdctl.cli import console
    from opdctl.cli.inspect_commands import plan_target

    planned, costs = plan_target(target, tuple(overrides or ()), size=size, reuse=reuse, gpu=gpu)
    if as_json:
        entries = [p.to_dict() for p in planned]
        content: dict[str, Any] = {"stages": entries}
        if costs:
            content |= {"gpu": costs.gpu.name, "assumed": costs.assumed}
            for entry in entries:
                entry["estimate"] = costs.of(entry["name"])
        console.emit_json(content)
    else:
        console.show(console.plan_table(planned))
        if costs:
            console.show(console.costs_table(costs, planned))
            print(f"assumed: {costs.assumed}")
    if exit_code and any(p.action != "skip" for p in planned):
        sys.exit(EXIT_PENDING)


@app.command()
def validate(
    target: Annotated[
        str, typer.Argument(help="a recipe or a run directory", metavar="RECIPE|DIR")
    ],
    overrides: Overrides = None,
    size: Size = "",
    deep: Annotated[
        bool,
        typer.Option("--deep", help="look at students and teachers that are there already"),
    ] = False,
    as_json: Json = False,
    trust_members: Trust = False,
) -> None:
    """Say whether a recipe is well formed and possible; every problem at once."""
    from opdctl.cli import console
    from opdctl.cli.inspect_commands import check_deeply, load_target

    try:
        runs = load_target(target, tuple(overrides or ()), size=size)
    except RecipeError as error:
        if not as_json:
            raise
        console.emit_json({"valid": False, "problems": [vars(p) for p in error.problems]})
        sys.exit(error.exit_code)
    recipe = runs[0][1]
    notes = recipe.notes()
    findings, later = check_deeply(runs) if deep else ([], {})
    valid = not any(f.severity == "error" for f in findings)
    if as_json:
        content = {"valid": valid, "problems": [], "notes": [vars(n) for n in notes]}
        if deep:
            content |= {"findings": [vars(f) for f in findings], "later": later}
        console.emit_json(content)
    else:
        for note in notes:
            console.say(f"note: {note}", "yellow")
        print(f"{target}: {len(recipe.stages)} stages at size {recipe.size}, well formed")
        if findings:
            console.show(console.findings_table(findings))
        for check, why in {f.check: f.why for f in findings if f.severity != "ok"}.items():
            print(f"why {check} matters: {why}")
        for stage, reason in later.items():
            print(f"{stage}: checked when the stage starts; {reason}")
    if not valid:
        sys.exit(EXIT_USAGE)


@app.command()
def diagnose(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE|DIR] [key=value]...",
            help="a recipe or run whose stages are meant, and overrides",
        ),
    ] = None,
    student: Annotated[str, typer.Option(help="model that would be taught")] = "",
    teacher: Annotated[
        list[str] | None, typer.Option(help="[DOMAIN=]REF; once for each teacher")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="prompts: a file, a run, a recipe, a domain or a task; as in the run that wrote "
            "the model if not given"
        ),
    ] = None,
    stage: Annotated[str, typer.Option(help="of the recipe; all with teachers if not given")] = "",
    prompts: Annotated[
        int, typer.Option(help="of each domain, answered once by each", min=2)
    ] = 100,
    budget: Annotated[
        int, typer.Option(help="continuations sampled for the alignment, each teacher", min=64)
    ] = 4096,
    top: Annotated[int, typer.Option(help="tokens forced at each prefix", min=2)] = 8,
    samples: Annotated[int, typer.Option(help="continuations of each", min=2)] = 8,
    plot: Annotated[Path | None, typer.Option(help="write an HTML page with figures")] = None,
    as_json: Json = False,
    trust_members: Trust = False,
) -> None:
    """Measure, before money is spent, if a student will learn from a teacher."""
    from opdctl.cli import console
    from opdctl.cli.diagnosis_page import write
    from opdctl.cli.diagnosis_tables import show
    from opdctl.cli.inspect_commands import diagnose_stages

    effort = {"prompts": prompts, "budget": budget, "top": top, "samples": samples}
    stages = diagnose_stages(
        tuple(overrides or ()),
        student=student,
        teachers=tuple(teacher or ()),
        data=tuple(data or ()),
        stage=stage,
        effort=effort,
    )
    if as_json:
        console.emit_json({"stages": stages})
    else:
        show(stages)
    if plot:
        console.say(f"plot: {write(stages, plot)}")
    if any(one["refused"] for one in stages):
        sys.exit(EXIT_USAGE)


@app.command()
def status(
    directory: Annotated[
        Path | None, typer.Argument(help="the newest run if not given", metavar="[DIR]")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="refresh until it ends")] = False,
    as_json: Json = False,
    trust_members: Trust = False,
) -> None:
    """Show the stages of a run: state, step, seconds."""
    from opdctl.cli.inspect_commands import show_status

    show_status(directory, watch=watch, as_json=as_json)


@app.command()
def claims(directory: DirArg, as_json: Json = False, trust_members: Trust = False) -> None:
    """Judge the claims of the recipe's report on what the run measured."""
    from opdctl.cli import console
    from opdctl.evidence.judge import judge
    from opdctl.run.rundir import RunDir

    verdicts = judge(RunDir(directory))
    if as_json:
        console.emit_json({"claims": verdicts})
    elif verdicts:
        console.show(console.claims_table(verdicts))
    else:
        console.say(f"the recipe of {directory} makes no claims")
        console.say("`opdctl ls claims` lists those that its `claims:` may name")


@app.command()
def report(directory: DirArg, trust_members: Trust = False) -> None:
    """Write DIR/report.html: stages, learning curves, claims. One file, no network."""
    from opdctl.cli.report import write
    from opdctl.run.rundir import RunDir

    print(write(RunDir(directory)))


@app.command()
def ls(
    kind: Annotated[
        str,
        typer.Argument(help="recipes, stages, methods, claims, runs, a family", metavar="[KINDS]"),
    ] = "",
    as_json: Json = False,
    members: Members = None,
) -> None:
    """List what there is."""
    from opdctl.cli import console
    from opdctl.cli.catalogue import listing

    rows = listing(kind, members)
    if as_json:
        console.emit_json(rows)
    else:
        console.show(console.table(["name", "what it is"], [list(r.values()) for r in rows]))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a stage kind, a member, a method or a recipe")],
    as_json: Json = False,
    members: Members = None,
) -> None:
    """Show the keys of a stage kind, a member, a method or the runtime: type, default, meaning."""
    from opdctl.cli import console
    from opdctl.cli.catalogue import detail

    shown = detail(name, members)
    if as_json:
        console.emit_json(shown)
        return
    print(shown["about"])
    for part in ("text", "also"):
        if shown.get(part):
            print(shown[part])
    if shown.get("keys"):
        console.show(console.keys_table(shown["keys"]))
    if shown.get("more"):
        print(shown["more"])


for command in (cp, new, tidy):
    app.command()(command)


def main() -> None:
    """Run the command line: an expected error becomes one message and its exit code."""
    close_working_directory()
    open_closed_streams()
    try:
        app()
    except OpdctlError as error:
        _fail(str(error), error.exit_code)
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"{type(error).__name__}: {error}", EXIT_USAGE)


def _fail(message: str, code: int) -> None:
    from opdctl.cli.console import say

    say(f"error: {message}", "red")
    sys.exit(code)


if __name__ == "__main__":
    main()
