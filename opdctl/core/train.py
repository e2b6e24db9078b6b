"""What a stage that writes a model does around its loop: load the start, train, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

from opdctl.core import models
from opdctl.core.context import Context
from opdctl.core.loop import Loop, Parts
from opdctl.rundir import commit_folder
from opdctl.types import Compute


def train(ctx: Context, model: Any, parts_of: Callable[[Context, Any], Parts]) -> Compute:
    """Run the loop to its end and commit ``output/``.

    Args:
        model: the weights to start from; a checkpoint of this stage replaces them.
        parts_of: builds the loop's parts around the model.

    Raises:
        Interrupted: a stop was asked for; a checkpoint is committed.
    """
    compute = Loop(ctx, model, parts_of(ctx, model)).run()
    commit(ctx, model)
    return compute


def commit(ctx: Context, model: Any) -> None:
    """Write ``output/``: it appears only when it is complete."""
    part = ctx.folder / ".output.part"
    shutil.rmtree(part, ignore_errors=True)
    models.save(model, part)
    commit_folder(part, ctx.folder / "output")
