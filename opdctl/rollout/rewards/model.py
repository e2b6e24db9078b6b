"""Reward from a trained outcome model: its probability that the whole answer is right."""

from __future__ import annotations

from opdctl.protocols import Reward


class Model(Reward):
    """The probability an outcome reward model (stage kind orm) gives the whole answer."""

    revision = 1

    def __init__(self, ctx, reference: str) -> None:
        self.ctx = ctx
        self.model = ctx.models.load(reference, classifier=True)
        self.model.net.requires_grad_(False)
        self.parameters = self.model.parameters

    def score(self, rollouts) -> None:
        """Set ``reward`` of every rollout to a probability in (0, 1)."""
        import torch

        from opdctl.models.packing import last_per_sequence, micro_batches, pack

        spans = [r.request for r in rollouts]
        with torch.no_grad():
            for group, _ in micro_batches(spans, self.ctx.runtime.micro_batch):
                self.ctx.check()
                model = self.model
                packed = pack([spans[i] for i in group], model.pad, model.device, model.one_row)
                hidden = model.backbone(**packed.inputs).last_hidden_state.flatten(0, 1)
                score_N = self.model.head(hidden[packed.token_N])[:, 0].float()
                right_B = last_per_sequence(score_N, packed.length_B).sigmoid().tolist()
                for i, right in zip(group, right_B, strict=True):
                    rollouts[i].reward = right
