"""Distance of hidden states of unequal widths, seen through two frozen linear maps to r numbers.

OPRD-Bridge (arXiv 2606.06021): before the first step both models answer for the same rollouts of
the student's start. Of each layer P_T holds the r first principal directions of the teacher's
centred states, P_S a linear map of the student's states to P_T (h_T - mean). Both are frozen; then
the backbone is trained on |P_S h_S - P_T (h_T - mean)|^2 / r, both sides divided by their length.
The paper trains P_S by 20 epochs of gradient descent with a tenth held out; its problem is least
squares, so here it is solved (ours): ridge regression in float64, the ridge chosen on the held-out
prompts among RIDGES times the mean square of a state's numbers. One pair of maps a layer and a
teacher (ours). How well they fit what was held out stands in the log and in the first row of the
metrics: ``bridge_r2``, ``bridge_fit`` (mean cosine), ``bridge_variance`` (of the teacher, in r
directions). The head gets no gradient, see loss/objectives/hidden.py: a stage with a divergence is
usually run after this one. Leaves out teachers of another tokenizer, and maps that go on learning
(the paper found them worse).

    opdctl stage opd --student DIR --teacher math=DIR --method oprd_bridge
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from opdctl.config.schema import key
from opdctl.config.settings import ObjectiveConfig
from opdctl.errors import StageFailed
from opdctl.loss.objectives._layers import OnLayers, text_of
from opdctl.scoring.columns import PAIR_WEIGHT

HELD_OUT = 10  # every so many distinct prompts of a teacher one is held out, wherever it comes
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)


class Bridge(OnLayers):
    """Distance of hidden states through frozen PCA and linear maps (OPRD-Bridge): any widths."""

    revision = 1
    needs = ()
    rows = "prediction"
    fitted = True

    @dataclass(kw_only=True)
    class Config(ObjectiveConfig):
        """The keys of bridge."""

        layers: Literal["all", "last", "even", "odd"] | list[int] = key(
            "all", "transformer layers of the student, from 1: all, last, even, odd, or a list"
        )
        rank: int = key(8, "numbers that both sides are mapped to", least=1)
        unit: bool = key(True, "divide both sides by their length")
        tokens: int = key(
            16384, "tokens of the student's start to fit on, at least: whole steps", least=1
        )

    def __init__(self, config) -> None:
        self.config, self.which = config, text_of(config.layers)
        self.needs = self.needs_for(config)
        self.maps: dict[str, tuple] = {}  # P_S, P_T and the mean of each teacher: [L, ...]

    def fit(self, pairs: Iterator) -> dict[str, float]:
        """Make the maps. Returns how well they fit what was held out.

        Args:
            pairs: of a step's rollouts, ``[(teacher, states, its states, prompts)]``: [N', L, D],
                [N', L, E] and a number for the prompt of each token. As many as are taken.

        Raises:
            StageFailed: a teacher has fewer than two prompts, or a side is narrower than ``rank``.
        """
        import torch

        seen: dict[str, list] = {}
        fits, tokens = [], 0
        while tokens < self.config.tokens:
            for name, *rows in next(pairs):
                seen.setdefault(name, []).append(rows)
                tokens += len(rows[0])
        for name, batches in seen.items():
            ours_NLD, theirs_NLE, prompt_N = map(torch.cat, zip(*batches, strict=True))
            order = torch.unique(prompt_N, return_inverse=True)[1]
            held_N = order % HELD_OUT == 0
            narrow = min(ours_NLD.shape[-1], theirs_NLE.shape[-1])
            if held_N.all() or narrow < self.config.rank:
                reason = f"{narrow} numbers are fewer than its rank {self.config.rank}"
                reason = "it has one prompt, and one is held out" if held_N.all() else reason
                raise StageFailed(f"the bridge to teacher {name} cannot be fitted: {reason}")
            maps = []
            for n in range(ours_NLD.shape[1]):
                layer = (ours_NLD[:, n].double(), theirs_NLE[:, n].double(), held_N)
                *each, fitted = bridge(*layer, self.config.rank)
                maps.append(each)
                fits.append(fitted)
                said = ", ".join(f"{k} {v:.3g}" for k, v in fitted.items())
                where = f"layers {self.which}, {n + 1} of {ours_NLD.shape[1]}"
                print(f"bridge to {name}, {where}: {said}", flush=True)
            wide = torch.promote_types(ours_NLD.dtype, torch.float32)
            self.maps[name] = tuple(torch.stack(m).to(wide) for m in zip(*maps, strict=True))
        kinds = ("r2", "fit", "variance")
        return {f"bridge_{k}": sum(f[k] for f in fits) / len(fits) for k in kinds}

    def state(self) -> dict:
        """Return the maps for a checkpoint, once they are there."""
        kinds = ("student", "teacher", "mean")
        return {
            f"{name}|{kind}": tensor
            for name, maps in self.maps.items()
            for kind, tensor in zip(kinds, maps, strict=True)
        }

    def load(self, state: dict) -> None:
        """Take up what a checkpoint kept."""
        names = {flat.rpartition("|")[0] for flat in state}
        kinds = ("student", "teacher", "mean")
        # copied: where the memory of a file begins decides how products round
        self.maps = {n: tuple(state[f"{n}|{kind}"].clone() for kind in kinds) for n in names}

    def loss(self, view):
        """Return the loss of each token. Shape [C]."""
        import torch

        ours_CLD, seen = view.states(self.which), []
        for part, name, theirs_PLE in view.teacher_states(self.which):
            ours_LRD, theirs_LRE, mean_LE = (m.to(ours_CLD.device) for m in self.maps[name])
            a_PLR = torch.einsum("pld,lrd->plr", ours_CLD[part].to(ours_LRD.dtype), ours_LRD)
            b_PLR = torch.einsum("ple,lre->plr", theirs_PLE.to(mean_LE.dtype) - mean_LE, theirs_LRE)
            seen.append((a_PLR, b_PLR))
        a_CLR, b_CLR = map(torch.cat, zip(*seen, strict=True))
        view.log("bridge_cosine", torch.cosine_similarity(a_CLR, b_CLR, dim=-1).mean(-1))
        if self.config.unit:
            a_CLR, b_CLR = (torch.nn.functional.normalize(h, dim=-1) for h in (a_CLR, b_CLR))
        value_C = (a_CLR - b_CLR).square().mean((-1, -2))
        view.log("bridge_distance", value_C)
        return value_C * view[PAIR_WEIGHT]


def bridge(ours_ND, theirs_NE, held_N, rank: int) -> tuple:
    """Return P_S [r, D], P_T [r, E], the teacher's mean [E], and the fit of the held-out rows.

    Args:
        ours_ND, theirs_NE: states of one layer in float64.
        held_N: which rows are not fitted on.
    """
    import torch

    mean_E = theirs_NE[~held_N].mean(0)
    centred_NE = theirs_NE - mean_E
    fit_NE, fit_ND = centred_NE[~held_N], ours_ND[~held_N]
    spread_E, axes_EE = torch.linalg.eigh(fit_NE.T @ fit_NE)
    theirs_RE = axes_EE[:, -rank:].T.flip(0).contiguous()  # the largest spread first
    target_NR = centred_NE @ theirs_RE.T
    size_D, turn_DD = torch.linalg.eigh(fit_ND.T @ fit_ND)
    along_DR = turn_DD.T @ (fit_ND.T @ target_NR[~held_N])
    tried = []
    for ridge in RIDGES:
        ours_RD = (turn_DD @ (along_DR / (size_D + ridge * size_D.mean())[:, None])).T
        error = (ours_ND[held_N] @ ours_RD.T - target_NR[held_N]).square().sum()
        tried.append((float(error), ridge, ours_RD))
    error, ridge, ours_RD = min(tried, key=lambda each: each[0])
    seen_NR = target_NR[held_N]
    fitted = {
        "r2": 1 - error / float(seen_NR.square().sum()),
        "fit": float(torch.cosine_similarity(ours_ND[held_N] @ ours_RD.T, seen_NR, dim=-1).mean()),
        "variance": float(spread_E[-rank:].sum() / spread_E.sum()),
        "ridge": ridge,
    }
    return ours_RD.contiguous(), theirs_RE, mean_E, fitted
