"""Measure how far student and teacher are apart on the student's own tokens before training.

Two numbers: KL(student || teacher) per token, over the whole vocabulary; and the share of the
student's k most probable tokens that are among the teacher's k (Rethinking OPD, arXiv 2604.13016,
k = 16; at most an eighth of the vocabulary, so that chance alone does not give it).

The bounds: a KL of 5e-4 taught nothing and one of 4.5e-2 did (miles, README of
qwen3_5_35b_selfdistill). The upper bound is half of log V, half the divergence of a blind guess
from a student that is sure. In the paper OPD succeeded from an overlap of .72 and took a cold start
from .55; at size tiny MiMo's teachers, which the student inherits, start at a KL of .8 to 1.2 and
an overlap of .52 to .67.
"""

from __future__ import annotations

import math

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.errors import StageFailed
from opdctl.protocols import Check
from opdctl.types import Finding

KL_LEAST, OVERLAP_LEAST = 1e-3, 0.5


class Step0(Check):
    """The divergence and top-k overlap on the student's first rollouts are within bounds."""

    revision = 1
    samples = True
    why = (
        "a teacher that sees other tokens than the student wrote begins at a loss above 20 "
        "(github.com/modelscope/ms-swift/issues/9429), and whether OPD succeeds shows in the "
        "overlap at its start (arXiv 2604.13016)"
    )

    def findings(self, stage: CheckedStage) -> list[Finding]:
        """Return one finding for each teacher that is not the student itself."""
        findings = [self._finding(stage, name) for name in stage.differing]
        return findings + [self._served(stage, name) for name in stage.answering]

    def _finding(self, stage: CheckedStage, name: str) -> Finding:
        domains = stage.domains(name)
        rollouts = [r for r in stage.rollouts if r.prompt.domain in domains]
        kl, overlap, k = divergence_and_overlap(stage, name, [r.request for r in rollouts])
        most = math.log(stage.student.valid_V) / 2
        message = (
            f"KL {kl:.4g} nats a token (from {KL_LEAST} to {most:.1f}), top-{k} overlap "
            f"{overlap:.2f} (at least {OVERLAP_LEAST}), over {len(rollouts)} responses"
        )
        if not math.isfinite(kl):
            do = "its weights or its precision: try runtime.dtype=float32"
            return Finding("error", f"{message}: not finite", do, name)
        do = []
        if kl < KL_LEAST:
            do.append("train the teacher further, or check its path: it is all but the student")
        if kl > most:
            do.append("check that it is of the student's family and trained on this format")
        if overlap < OVERLAP_LEAST:
            do.append("a cold start on the teacher's samples first: sft with sources.teacher")
        return Finding("warning" if do else "ok", message, "; ".join(do), name)

    def _served(self, stage: CheckedStage, name: str) -> Finding:
        """Return the finding for a served teacher, from its log-probs of the sampled tokens and its
        lists of the top k."""
        from opdctl.remote.endpoint import NoAnswer

        domains = stage.domains(name)
        requests = [r.request for r in stage.rollouts if r.prompt.domain in domains]
        do, unlisted = [], ""
        try:
            kl, error, overlap, k = served_divergence(stage, name, requests)
        except NoAnswer:
            raise  # without lists there would be none either, after as long a wait
        except StageFailed as failure:  # log-probs may do for the stage: they are asked alone
            unlisted = failure.message
            kl, error, overlap, k = served_divergence(stage, name, requests, lists=False)
        most = math.log(stage.student.valid_V) / 2
        message = (
            f"KL {kl:.4g} +- {2 * error:.2g} nats a token on what was sampled (from {KL_LEAST} to "
            f"{most:.1f}), over {len(requests)} responses; "
        )
        if unlisted:
            message += f"no top-{k} overlap: {unlisted}"
            do.append("nothing, unless an objective wants lists: then a folder as teacher")
        else:
            message += f"top-{k} overlap {overlap:.2f} (at least {OVERLAP_LEAST})"
        if kl + 2 * error < KL_LEAST:
            do.append("check what is served: it is all but the student")
        if kl - 2 * error > most:
            do.append("check that it is of the student's family and trained on this format")
        if overlap < OVERLAP_LEAST:
            do.append("a cold start on the teacher's samples first: sft with sources.teacher")
        return Finding("warning" if do else "ok", message, "; ".join(do), name)


def served_divergence(
    stage: CheckedStage, name: str, requests: list, lists: bool = True
) -> tuple[float, float, float, int]:
    """Return an estimate of the divergence from a served teacher, and the top-k overlap with it.

    Args:
        requests: the student's rollouts on the teacher's domains, as score requests.
        lists: ask for lists of the most probable tokens too.

    Returns:
        The mean of log p - log q on the student's own tokens, an unbiased estimate of KL(p || q);
        its standard error over tokens; the mean top-k overlap, 1 without lists; and k.

    Raises:
        StageFailed: the server does not answer, or its lists cannot be used.
    """
    from opdctl.kernels.topk import overlap_ratio
    from opdctl.scoring.asks import Asks, Pass
    from opdctl.scoring.overlap import top_of
    from opdctl.scoring.score import score

    ctx = stage.ctx
    model = ctx.models.frozen(ctx.config.student)
    k = top_of(model.lm_head())
    run = Pass.of(ctx, 1.0)
    ours = score(model, requests, Asks.of("logprobs", "topk", top=k), run)
    asks = Asks.of("topk_list" if lists else "logprobs", top=k)
    theirs = stage.server(name).score(requests, asks, run)
    gap_N = ours.logprobs_N - theirs.logprobs_N
    overlap = 1.0
    if lists:
        assert ours.top_NK is not None, "it is asked for above"
        overlap = float(overlap_ratio(ours.top_NK, theirs.top_NK).mean())
    error = float(gap_N.std()) / math.sqrt(len(gap_N)) if len(gap_N) > 1 else math.inf
    return float(gap_N.mean()), error, overlap, k


def divergence_and_overlap(
    stage: CheckedStage, name: str, requests: list
) -> tuple[float, float, int]:
    """Return the mean KL(student || teacher), the mean top-k overlap, and k."""
    from opdctl.scoring.overlap import compared, top_of

    ctx = stage.ctx
    student, teacher = ctx.models.start(), ctx.models.frozen(stage.teachers[name])
    numbers, _ = compared(ctx, student, teacher, requests, ctx.config.sampling.temperature)
    kl, overlap = (float(numbers[column].mean()) for column in ("reverse", "overlap"))
    return kl, overlap, top_of(student.lm_head())
