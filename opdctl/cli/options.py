"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _trust(trusted: bool) -> None:
    from opdctl.recipe.own_members import trust_all

    trust_all(trusted)


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...", help="dotted overrides, such as stages.mopd.optim.lr=3e-6"
    ),
]
Size = Annotated[str, typer.Option(help="tiny (default), small or lab", metavar="SIZE")]
Json = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
From = Annotated[Path | None, typer.Option("--from", help="reuse finished stages of this run")]
Detach = Annotated[
    bool, typer.Option("--detach", help="go on without the terminal; `status --watch` shows it")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-members",
        envvar="OPDCTL_TRUST_MEMBERS",
        callback=_trust,
        help="import the code in the recipe's own `members:`",
    ),
]
Members = Annotated[
    Path | None, typer.Option(help="a folder of members of your own too; imports its code")
]
RecipeArg = Annotated[str, typer.Argument(help="a recipe file, or the name of a shipped one")]
DirArg = Annotated[Path, typer.Argument(help="a run directory", metavar="DIR")]
