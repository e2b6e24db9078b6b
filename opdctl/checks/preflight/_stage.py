"""Run the checks on one stage. The cheap ones at its start, all of them with ``--deep``.

What a check raises is what it found. Those that sample are left out where a cheap one found an
error: two vocabularies have no divergence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opdctl.checks.preflight._pairing import Pairing
from opdctl.checks.preflight.served import services
from opdctl.config.registry import member, members
from opdctl.errors import StageFailed, UsageError
from opdctl.types import Finding


def check(ctx, student: Any = None, deep: bool = False) -> list[Finding]:
    """Every finding on a stage.

    Args:
        student: its model where it is loaded already.
        deep: sample too.
    """
    apart = services(ctx) if deep else []
    if not getattr(ctx.config, "teachers", {}):
        return apart
    pairing = Pairing(ctx, student)
    checks = [(name, member("preflight", name)) for name in members("preflight")]
    found = apart + _unreadable(pairing)
    for samples in (False, True) if deep else (False,):
        if any(f.severity == "error" for f in found):
            break
        for name, cls in checks:
            if cls.samples == samples:
                ctx.check()
                found += [
                    replace(f, check=name, why=cls.why, revision=cls.revision, stage=ctx.name)
                    for f in _look(cls, pairing)
                ]
    return found


def _unreadable(pairing: Pairing) -> list[Finding]:
    """A model without a tokenizer or a configuration: said once, and not by every check."""
    try:
        pairing.read()
    except UsageError as error:
        why, stage = "nothing can be checked of a model that cannot be read", pairing.ctx.name
        return [Finding("error", error.message, error.hint, "", why, "load", stage=stage)]
    return []


def _look(cls: type, pairing: Pairing) -> list[Finding]:
    try:
        return cls().look(pairing)
    except (UsageError, StageFailed) as error:  # a server that does not answer fails the stage
        return [Finding("error", error.message, error.hint)]


def lines(finding: Finding) -> str:
    """What, why, what to do: a line each."""
    of = f", teacher {finding.teacher}" if finding.teacher else ""
    return "\n  ".join(
        (f"{finding.check}{of}: {finding.what}", f"why: {finding.why}", f"do:  {finding.do}")
    )


def refuse(found: list[Finding]) -> None:
    """Raises:
    UsageError: there is an error among the findings; three lines for each.
    """
    errors = [lines(f) for f in found if f.severity == "error"]
    if errors:
        raise UsageError("\n".join(errors))
