"""The settings that decide the bits of a result, beside a stage's recipe and inputs.

Another class of processor has other instructions and adds in another order; so does another number
of threads, device or version of a library. A run that is continued under other settings ends with
results that are equal up to rounding, and small differences grow from step to step. That is noted,
or refused by ``runtime.other_machine=refuse``.
"""

from __future__ import annotations

import platform

from opdctl.errors import UsageError
from opdctl.recipe.recipe import Recipe
from opdctl.run.fingerprint import fingerprints
from opdctl.run.rundir import RunDir

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "vllm")


def settings_of(device: str, versions: dict[str, str]) -> dict[str, str]:
    """Return the settings of this process that decide bits, each by its name.

    Args:
        device: the device that the stage computes on, by torch's name.
        versions: the versions of the installed libraries.
    """
    import torch

    cuda = device.startswith("cuda")
    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "mkldnn": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        **{name: versions[name] for name in LIBRARIES if name in versions},
    }


def other_settings(
    run: RunDir, recipe: Recipe, stage: str, before: dict, now: dict[str, str]
) -> list[str]:
    """Return a line for each earlier part of the run that was computed under other settings.

    Args:
        before: the record of the stage's attempt before; empty if it begins.
        now: the settings of this attempt.
    """
    earlier = {"it began": before.get("settings")}
    current = fingerprints(recipe)
    for name in recipe.upstream(stage):
        record = run.record(name)
        if record.get("fingerprint") == current[name]:
            earlier[f"stage {name} ran"] = record.get("settings")
    lines = []
    for when, settings in earlier.items():
        if isinstance(settings, dict):  # an older version did not record them
            changed = [
                f"{name} {settings.get(name, 'none')}, now {now.get(name, 'none')}"
                for name in sorted({*settings, *now})
                if settings.get(name) != now.get(name)
            ]
            if changed:
                lines.append(f"when {when}: {'; '.join(changed)}")
    return lines


def require_same(run: RunDir, recipe: Recipe, stage: str, lines: list[str]) -> None:
    """Note, or refuse, that a run goes on under other settings.

    Raises:
        UsageError: ``runtime.other_machine`` is ``refuse`` and there is a difference.
    """
    if lines and recipe.runtime.other_machine == "refuse":
        raise UsageError(
            f"stage {stage} would be equal up to rounding only; {'; '.join(lines)}",
            f"go on where it began, or: opdctl resume {run.path} runtime.other_machine=note",
        )
    for line in lines:
        print(f"[{stage}] equal up to rounding only: {line}", flush=True)
