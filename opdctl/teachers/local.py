"""A teacher whose weights are on this machine."""

from __future__ import annotations


class Local:
    """A frozen model in this process; scores the exact token ids."""

    revision = 1
    provides = (
        "teacher.logprobs",
        "teacher.hidden",
        "teacher.lse",
        "teacher.topk",
        "teacher.entropy",
    )

    def __init__(self, ctx, student, name: str, reference: str) -> None:
        from opdctl.core.models import require_same_tokens

        self.ctx = ctx
        self.model = ctx.frozen(reference)
        self.parameters = self.model.parameters
        require_same_tokens(student, self.model, f"stages.{ctx.name}.teachers.{name}")

    def score(self, requests, temperature: float, want, top: int = 16):
        """Scores of every target token, in the order of the requests; ``want`` says which."""
        from opdctl.core.scoring import score

        runtime = self.ctx.runtime
        return score(
            self.model,
            requests,
            temperature=temperature,
            want=want,
            top=top,
            micro_batch=runtime.micro_batch,
            chunk_mib=runtime.chunk_mib,
            check=self.ctx.check,
        )
