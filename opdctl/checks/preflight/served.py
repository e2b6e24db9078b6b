"""A teacher behind a server: is it there, of the student's tokens, and does it list what is asked?

The server is spoken to as the stage will: name, vocabulary id by id, a known sequence scored with
as many of the most probable tokens as the objectives want. A stage does this itself as it starts,
so here it is done with ``--deep`` alone. Servers of texts, sources and judges, are asked for the
name of their model (``services``), in stages without teachers too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from opdctl.checks.preflight._pairing import Pairing
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.errors import StageFailed, UsageError
from opdctl.types import Finding

WHY = (
    "a server is another program on another machine: what it serves under a name can be of another "
    "tokenizer, and scores of other ids train without an error "
    "(github.com/huggingface/trl/issues/4562)"
)


class Served:
    """Each served teacher answers, has the student's tokens, and scores a known sequence."""

    revision = 1
    samples = True
    why = WHY

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a served teacher."""
        return [self._one(pairing, name) for name in pairing.served]

    def _one(self, pairing: Pairing, name: str) -> Finding:
        try:
            server = pairing.server(name)
        except (StageFailed, UsageError) as error:
            return Finding("error", error.message, error.hint, name)
        what = f"{server.served} answers, {server.student.valid_V} ids are the student's"
        most = f", it reads {server.longest} tokens" if server.longest else ""
        return Finding("ok", f"{what}, a known sequence is scored{most}", teacher=name)


def services(ctx) -> list[Finding]:
    """One finding for each server of texts that a stage asks: its sources', its judges'."""
    from opdctl.remote.endpoint import opened

    asked = []
    for dotted, text in ctx.recipe.references(ctx.name):
        if references.parse(text).form == "server" and not dotted.startswith("teachers."):
            asked.append((dotted, partial(opened, f"{dotted} ({text})", text, ctx.runtime)))
    for domain in ctx.recipe.domains(ctx.name):
        for name, keys in ctx.recipe.data[domain].verifier.items():
            cls = member("verifiers", name)
            if cls.asks_server:
                where = f"data.{domain}.verifier.{name}"
                asked.append((where, partial(cls.require_served, keys, domain)))
    found = []
    for where, ask in asked:
        try:
            ask(ctx.check)
        except (StageFailed, UsageError) as error:
            found.append(Finding("error", error.message, error.hint))
        else:
            found.append(Finding("ok", f"{where} answers, and serves the model that is named"))
    return [replace(f, check="served", why=WHY, revision=1, stage=ctx.name) for f in found]
