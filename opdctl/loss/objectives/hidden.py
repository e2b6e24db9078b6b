"""Mean squared distance of hidden states of student and teacher on chosen layers: no logit is made.

OPRD (arXiv 2606.06021): the mean over the layers of 1/d |h_S - sg h_T|^2, d the width, on the
student's own tokens, at the rows that predict them (the authors' code takes the rows that have seen
them). Which row of which layer, and what stands beside it in a teacher of another depth, is in
models/hidden_layers.py; which tokens is a weight (``window``). ``unit`` divides each state by its
length first, as the authors' released code does and their formula does not: about d times smaller,
so it wants a coef of 100 to 1000. The head is not read on either side and gets no gradient; a
tied one moves all the same, through the embedding, and no loss sees what that does to its logits.
So a stage with a divergence is usually run after this one, or both are summed: L_OPD + mu L_rep has
mu as ``coef``. Pooled teachers: the sum over them. Leaves out unequal widths
(loss/objectives/bridge.py).

    opdctl stage opd --student DIR --teacher math=DIR --method oprd
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import ObjectiveConfig
from opdctl.errors import StageFailed
from opdctl.loss.objectives._layers import OnLayers, text_of
from opdctl.scoring.columns import PAIR_WEIGHT

WIDER = "opdctl stage opd --method oprd_bridge takes teachers of other widths"


class Hidden(OnLayers):
    """Mean squared distance of hidden states on chosen layers (OPRD): no vocabulary involved."""

    revision = 1
    needs = ()
    rows = "prediction"
    same_width = WIDER  # what to use where the widths differ

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of hidden."""

        layers: Literal["all", "last", "even", "odd"] | list[int] = key(
            "last", "transformer layers, from 1: all, last, even, odd, or a list", neutral=True
        )
        unit: bool = key(False, "divide both states by their length first")

    def __init__(self, config) -> None:
        self.config, self.which = config, text_of(config.layers)
        self.needs = self.needs_for(config)

    def loss(self, view):
        """Return the loss of each token. Shape [C].

        Raises:
            StageFailed: a teacher's states are of another width.
        """
        import torch

        ours_CLD = view.states(self.which)
        parts = view.teacher_states(self.which)
        for _, name, part_CLD in parts:
            if part_CLD.shape[-1] != ours_CLD.shape[-1]:
                widths = f"{ours_CLD.shape[-1]} and {part_CLD.shape[-1]}"
                message = f"teacher {name}: hidden states of widths {widths} cannot be compared"
                raise StageFailed(message, WIDER)
        theirs_CLD = torch.cat([part_CLD for _, _, part_CLD in parts])
        view.log("cosine", torch.cosine_similarity(ours_CLD, theirs_CLD, dim=-1).mean(-1))
        if self.config.unit:
            ours_CLD, theirs_CLD = (
                torch.nn.functional.normalize(h, dim=-1) for h in (ours_CLD, theirs_CLD)
            )
        wide = torch.promote_types(ours_CLD.dtype, torch.float32)
        value_C = (ours_CLD.to(wide) - theirs_CLD.to(wide)).square().mean((-1, -2))
        view.log("hidden_distance", value_C)
        return value_C * view[PAIR_WEIGHT]
