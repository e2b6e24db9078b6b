"""Test that each teacher behind a server answers, has the student's tokens and scores as needed.

The server is asked as the stage will ask it: for its name, its vocabulary id by id, and the scores
of a known sequence with as many of the most probable tokens as the objectives want. A stage does
this itself as it starts, so here it is done with ``--deep`` only. Servers of texts (sources and
judges) are asked for the name of their model (``check_text_servers``), in stages without teachers
too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.errors import StageFailed, UsageError
from opdctl.protocols import Check
from opdctl.types import Finding

WHY = (
    "a server is another program on another machine: what it serves under a name can be of another "
    "tokenizer, and scores of other ids train without an error "
    "(github.com/huggingface/trl/issues/4562)"
)


class Served(Check):
    """Each served teacher answers, has the student's tokens, and scores a known sequence."""

    revision = 1
    samples = True
    why = WHY

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each served teacher."""
        return [self._finding(stage, name) for name in stage.served]

    def _finding(self, stage: CheckedStage, name: str) -> Finding:
        try:
            server = stage.server(name)
        except (StageFailed, UsageError) as error:
            return Finding("error", error.message, error.hint, name)
        message = f"{server.served} answers, {server.student.valid_V} ids are the student's"
        most = f", it reads {server.longest} tokens" if server.longest else ""
        return Finding("ok", f"{message}, a known sequence is scored{most}", teacher=name)


def check_text_servers(ctx) -> list[Finding]:
    """Return one finding for each server of texts that a stage asks: sources and judges."""
    from opdctl.remote.endpoint import opened

    requests = []
    for dotted, text in ctx.recipe.references(ctx.name):
        if references.parse(text).form == "server" and not dotted.startswith("teachers."):
            requests.append((dotted, partial(opened, f"{dotted} ({text})", text, ctx.runtime)))
    for domain in ctx.recipe.domains(ctx.name):
        for name, keys in ctx.recipe.data[domain].verifier.items():
            cls = member("verifiers", name)
            if cls.asks_server:
                where = f"data.{domain}.verifier.{name}"
                requests.append((where, partial(cls.require_served, keys, domain)))
    findings = []
    for where, request in requests:
        try:
            request(ctx.check)
        except (StageFailed, UsageError) as error:
            findings.append(Finding("error", error.message, error.hint))
        else:
            findings.append(Finding("ok", f"{where} answers, and serves the model that is named"))
    return [replace(f, check="served", why=WHY, revision=1, stage=ctx.name) for f in findings]
