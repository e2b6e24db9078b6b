"""Masks the first occurrence in a response of each special token: ends, marks of thinking.

Revisiting OPD (arXiv 2603.25562): teacher and student often disagree on where an answer or a
thought ends for reasons of format alone, and the loss there is large. Masked tokens are not
counted. Special are the ids that the tokenizer calls so (its end token is one of them), and the
texts of ``texts`` that it has as one token; that others are left alone is ours.

    opdctl stage opd --student DIR --teacher math=DIR --method revisiting
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import key
from opdctl.protocols import Weight


class SpecialTokens(Weight):
    """0 at the first end token or mark of thinking of a response, else 1 (Revisiting OPD)."""

    revision = 1
    needs = ()

    @dataclass(kw_only=True)
    class Config:
        """The keys of special_tokens."""

        texts: list[str] = key(["<think>", "</think>"], "special too, where they are one token")

    def __init__(self, config) -> None:
        self.config = config

    def mask(self, step):
        """Return the mask. Shape [N]."""
        import torch

        tokenizer = step.model.tokenizer
        vocabulary = tokenizer.get_vocab()
        special = set(tokenizer.all_special_ids)
        special |= {vocabulary[t] for t in self.config.texts if t in vocabulary}
        kept = []
        for rollout in step.rollouts:
            ids, seen = rollout.request.ids, set()
            for place in rollout.request.targets:
                kept.append(ids[place] not in special or ids[place] in seen)
                seen.add(ids[place])
        return torch.tensor(kept, device=step.sequence_N.device)
