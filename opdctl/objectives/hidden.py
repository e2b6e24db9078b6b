"""Mean squared distance of the last hidden rows of student and teacher: no logit is made.

OPRD (arXiv 2606.06021): 1/d |h_S - sg h_T|^2 on the student's own tokens, d the width. The head
gets no gradient (a tied one moves through the embedding only), so a stage with a divergence is
usually run after it. ``unit`` divides both rows by their length first, as the authors' released
code does and their formula does not; the loss is then about d times smaller. Takes the row after
the final norm, the one the head reads; leaves out inner layers and unequal widths.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.schema import key
from opdctl.settings import ObjectiveConfig


class Hidden:
    """Mean squared distance of the last hidden rows (OPRD): no vocabulary involved."""

    revision = 1
    needs = ("teacher.hidden",)
    rows = "prediction"

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """Keys of hidden."""

        unit: bool = key(False, "divide both rows by their length first")

    def __init__(self, config) -> None:
        self.config = config

    def loss(self, view):
        """Shape [C]."""
        import torch

        ours_CD, theirs_CD = view.hidden_CD, view.teacher_hidden_CD
        view.log("cosine", torch.cosine_similarity(ours_CD, theirs_CD, dim=-1))
        if self.config.unit:
            ours_CD, theirs_CD = (
                torch.nn.functional.normalize(h, dim=-1) for h in (ours_CD, theirs_CD)
            )
        wide = torch.promote_types(ours_CD.dtype, torch.float32)
        value_C = (ours_CD.to(wide) - theirs_CD.to(wide)).square().mean(-1)
        view.log("hidden_distance", value_C)
        return value_C * view["pair_weight"]
