"""A teacher whose weights are on this machine."""

from __future__ import annotations


class Local:
    """A frozen model in this process; scores the exact token ids."""

    revision = 1
    provides = ("teacher.logprobs",)

    def __init__(self, ctx, student, name: str, reference: str) -> None:
        from opdctl.core.models import require_same_tokens

        self.ctx = ctx
        self.model = ctx.frozen(reference)
        self.parameters = self.model.parameters
        require_same_tokens(student, self.model, f"stages.{ctx.name}.teachers.{name}")

    def score(self, requests, temperature: float):
        """Log-prob of every target token, flat, in the order of the requests."""
        from opdctl.core.scoring import logprobs

        runtime = self.ctx.runtime
        return logprobs(
            self.model,
            requests,
            temperature=temperature,
            micro_batch=runtime.micro_batch,
            chunk_mib=runtime.chunk_mib,
            check=self.ctx.check,
        )
