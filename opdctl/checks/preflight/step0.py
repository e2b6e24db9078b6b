"""How far apart the two are on the student's own tokens before anything is learnt.

KL(student || teacher) a token, over the whole vocabulary, and the share of the student's k most
probable tokens that are among the teacher's k (Rethinking OPD, arXiv 2604.13016, k = 16; at most an
eighth of the vocabulary, so that chance does not make it).

The bounds. A KL of 5e-4 taught nothing and one of 4.5e-2 did (miles, README of
qwen3_5_35b_selfdistill). The most is half of log V, half of what a blind guess is off by where the
student is sure. OPD succeeded from an overlap of .72 there and took a cold start from .55; at size
tiny MiMo's teachers, which the student inherits, start at a KL of .8 to 1.2 and .52 to .67.
"""

from __future__ import annotations

import math

from opdctl.checks.preflight._pairing import Pairing
from opdctl.errors import StageFailed
from opdctl.types import Finding

KL_LEAST, OVERLAP_LEAST = 1e-3, 0.5


class Step0:
    """Divergence and top-k overlap on the student's first rollouts are within bounds."""

    revision = 1
    samples = True
    why = (
        "a teacher that sees other tokens than the student wrote begins at a loss above 20 "
        "(github.com/modelscope/ms-swift/issues/9429), and whether OPD succeeds shows in the "
        "overlap at its start (arXiv 2604.13016)"
    )

    def look(self, pairing: Pairing) -> list[Finding]:
        """One finding a teacher that is not the student itself."""
        found = [self._one(pairing, name) for name in pairing.differing]
        return found + [self._served(pairing, name) for name in pairing.reached]

    def _one(self, pairing: Pairing, name: str) -> Finding:
        domains = pairing.domains(name)
        rollouts = [r for r in pairing.rollouts if r.prompt.domain in domains]
        kl, overlap, k = compare(pairing, name, [r.request for r in rollouts])
        most = math.log(pairing.student.valid_V) / 2
        what = (
            f"KL {kl:.4g} nats a token (from {KL_LEAST} to {most:.1f}), top-{k} overlap "
            f"{overlap:.2f} (at least {OVERLAP_LEAST}), over {len(rollouts)} responses"
        )
        if not math.isfinite(kl):
            do = "its weights or its precision: try runtime.dtype=float32"
            return Finding("error", f"{what}: not finite", do, name)
        do = []
        if kl < KL_LEAST:
            do.append("train the teacher further, or check its path: it is all but the student")
        if kl > most:
            do.append("check that it is of the student's family and trained on this format")
        if overlap < OVERLAP_LEAST:
            do.append("a cold start on the teacher's samples first: sft with sources.teacher")
        return Finding("warning" if do else "ok", what, "; ".join(do), name)

    def _served(self, pairing: Pairing, name: str) -> Finding:
        """What a server's log-probs of the sampled tokens and its lists of the top k say."""
        from opdctl.remote.endpoint import NoAnswer

        domains = pairing.domains(name)
        asked = [r.request for r in pairing.rollouts if r.prompt.domain in domains]
        do, unlisted = [], ""
        try:
            kl, error, overlap, k = estimated(pairing, name, asked)
        except NoAnswer:
            raise  # without lists there would be none either, after as long a wait
        except StageFailed as failure:  # log-probs may do for the stage: they are asked alone
            unlisted = failure.message
            kl, error, overlap, k = estimated(pairing, name, asked, lists=False)
        most = math.log(pairing.student.valid_V) / 2
        what = (
            f"KL {kl:.4g} +- {2 * error:.2g} nats a token on what was sampled (from {KL_LEAST} to "
            f"{most:.1f}), over {len(asked)} responses; "
        )
        if unlisted:
            what += f"no top-{k} overlap: {unlisted}"
            do.append("nothing, unless an objective wants lists: then a folder as teacher")
        else:
            what += f"top-{k} overlap {overlap:.2f} (at least {OVERLAP_LEAST})"
        if kl + 2 * error < KL_LEAST:
            do.append("check what is served: it is all but the student")
        if kl - 2 * error > most:
            do.append("check that it is of the student's family and trained on this format")
        if overlap < OVERLAP_LEAST:
            do.append("a cold start on the teacher's samples first: sft with sources.teacher")
        return Finding("warning" if do else "ok", what, "; ".join(do), name)


def estimated(
    pairing: Pairing, name: str, requests: list, lists: bool = True
) -> tuple[float, float, float, int]:
    """Mean of log p - log q on the student's own tokens, an unbiased estimate of KL(p || q), its
    standard error over tokens, mean top-k overlap (1 without lists), and k.

    Raises:
        StageFailed: the server does not answer, or what it lists cannot be used.
    """
    from opdctl.kernels.topk import overlap_ratio
    from opdctl.scoring.overlap import top_of
    from opdctl.scoring.score import score

    ctx = pairing.ctx
    model = ctx.frozen(ctx.config.student)
    k = top_of(model.lm_head())
    how = {"temperature": 1.0, "micro_batch": ctx.runtime.micro_batch, "check": ctx.check}
    ours = score(model, requests, want=("logprobs", "topk"), top=k, **how)
    theirs = pairing.server(name).score(requests, 1.0, ("listed" if lists else "logprobs",), k)
    gap_N = ours.logprobs_N - theirs.logprobs_N
    overlap = float(overlap_ratio(ours.top_NK, theirs.top_NK).mean()) if lists else 1.0
    error = float(gap_N.std()) / math.sqrt(len(gap_N)) if len(gap_N) > 1 else math.inf
    return float(gap_N.mean()), error, overlap, k


def compare(pairing: Pairing, name: str, requests: list) -> tuple[float, float, int]:
    """Mean KL of the student to a teacher, mean top-k overlap, and k."""
    from opdctl.scoring.overlap import compared, top_of

    ctx = pairing.ctx
    models = [ctx.start(), ctx.frozen(pairing.teachers[name])]
    found, _ = compared(ctx, *models, requests, ctx.config.sampling.temperature)
    means = (float(found[what].mean()) for what in ("reverse", "overlap"))
    return *means, top_of(models[0].lm_head())
