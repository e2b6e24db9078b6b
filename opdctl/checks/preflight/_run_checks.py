"""Run the checks on one stage: the cheap ones at its start, all of them with ``--deep``.

An error that a check raises becomes a finding. Checks that sample are skipped once a cheap check
has reported an error: between two vocabularies there is no divergence to measure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight.served import check_text_servers
from opdctl.config.registry import member, members
from opdctl.errors import StageFailed, UsageError
from opdctl.types import Finding


def check(ctx, student: Any = None, deep: bool = False) -> list[Finding]:
    """Return every finding on a stage.

    Args:
        ctx: the context of the stage.
        student: the student's model where it is loaded already.
        deep: run the checks that sample too, and ask the servers.
    """
    server_findings = check_text_servers(ctx) if deep else []
    if not ctx.config.teachers:
        return server_findings
    stage = CheckedStage(ctx, student)
    checks = [(name, member("preflight", name)) for name in members("preflight")]
    findings = server_findings + _unreadable(stage)
    for samples in (False, True) if deep else (False,):
        if any(f.severity == "error" for f in findings):
            break
        for name, cls in checks:
            if cls.samples == samples:
                ctx.check()
                findings += [
                    replace(f, check=name, why=cls.why, revision=cls.revision, stage=ctx.name)
                    for f in _findings_of(cls, stage)
                ]
    return findings


def _unreadable(stage: CheckedStage) -> list[Finding]:
    """Report a model that cannot be read once, so that not every check reports it."""
    try:
        stage.read()
    except UsageError as error:
        why = "nothing can be checked of a model that cannot be read"
        return [Finding("error", error.message, error.hint, "", why, "load", stage=stage.ctx.name)]
    return []


def _findings_of(cls: type, stage: CheckedStage) -> list[Finding]:
    try:
        return cls().findings(stage)
    except (UsageError, StageFailed) as error:  # a server that does not answer fails the stage
        return [Finding("error", error.message, error.hint)]


def finding_lines(finding: Finding) -> str:
    """Return a finding as three lines: the finding, why it matters, what to do."""
    of = f", teacher {finding.teacher}" if finding.teacher else ""
    return "\n  ".join(
        (f"{finding.check}{of}: {finding.what}", f"why: {finding.why}", f"do:  {finding.do}")
    )


def raise_errors(findings: list[Finding]) -> None:
    """Raise one error that holds every finding of severity ``error``.

    Raises:
        UsageError: there is such a finding; three lines for each.
    """
    errors = [finding_lines(f) for f in findings if f.severity == "error"]
    if errors:
        raise UsageError("\n".join(errors))
