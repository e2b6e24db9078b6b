"""The step of each signal on the logits of one prefix, and the step that the task wants there.

A node is a prefix that the student wrote. For a few candidate tokens k the verifier tells s_k, the
share of successes of the student once k is forced (Unmasking OPD, arXiv 2605.10889). With p and q
the student's and the teacher's probabilities, each is a direction in which a step moves the logits:

    ideal       p (s - sum p s): ascent of the success rate over the candidates
    reverse_kl  -p ((log p - log q) - KL(p || q)): descent, minus the gradient of the loss
    forward_kl  q - p
    jsd         half of each, as in GKD
    top_k       the policy gradient on the student's k most probable tokens (topk_pg)
    sampled     (log q(y) - log p(y)) (1[y] - p): one drawn token y; its mean is reverse_kl
    outcome     (r - b) (1[y] - p): one drawn token, one verdict r, b = sum p s; its mean is ideal

The success rate is known for the candidates only, so p in ``ideal`` and ``outcome`` is the
student's renormalised on them, and the mean over them is taken from a signal's direction: a change
of all candidates together cannot be judged. With every token a candidate both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdctl.kernels.chunked import Rows
from opdctl.kernels.head import Head

EXACT = ("reverse_kl", "forward_kl", "jsd", "top_k")


@dataclass
class NodeScores:
    """The scores of student and teacher at N nodes, on K candidates each.

    Attributes:
        ids_NK: the candidates.
        logp_NK, logq_NK: the student's and the teacher's log-probs over the whole vocabulary.
        directions: mean direction of each signal on the candidates, centred. [N, K] each.
        rest_sign_N: sum over all other tokens of p sign(log q - log p).
        rest_square_N: the same sum of p (log q - log p)^2.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    logq_NK: Tensor
    directions: dict[str, Tensor]
    rest_sign_N: Tensor
    rest_square_N: Tensor


def centred(step_NK: Tensor) -> Tensor:
    """Subtract the mean: an equal change of all candidates moves nothing between them. [N, K]."""
    return step_NK - step_NK.mean(-1, keepdim=True)


def ideal(logp_NK: Tensor, success_NK: Tensor) -> Tensor:
    """Return the ascent direction of the success rate over the candidates. Shape [N, K]."""
    p_NK = logp_NK.softmax(-1)
    return p_NK * (success_NK - (p_NK * success_NK).sum(-1, keepdim=True))


def cosine(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Return the cosine over the last axis, 0 where either vector is zero. Shape [N]."""
    return torch.nn.functional.cosine_similarity(a_NK, b_NK, dim=-1, eps=1e-30)


def signal_directions(logits_CV: Tensor, teacher_CV: Tensor, top: int) -> dict[str, Tensor]:
    """Return the descent directions of the signals in EXACT over the vocabulary. [C, V] each.

    They are those of training: minus the gradients of the row pass.
    """
    directions, one_C = {}, logits_CV.new_ones(len(logits_CV))
    for name, direction in (("reverse_kl", "reverse"), ("forward_kl", "forward"), ("jsd", "jsd")):
        rows = Rows(logits_CV.clone())
        none_CK = torch.zeros(len(logits_CV), 1, dtype=torch.long, device=logits_CV.device)
        rows.divergence(teacher_CV.clone(), direction, 0.5, none_CK)
        directions[name] = -rows.gradient([one_C])[0]
    rows = Rows(logits_CV.clone())
    ids_CK = rows.top(top)
    logp_CK = rows.at(ids_CK).detach()
    advantage_CK = teacher_CV.log_softmax(-1).gather(-1, ids_CK) - logp_CK
    directions["top_k"] = -rows.gradient([-logp_CK.softmax(-1) * advantage_CK])[0]
    return directions


@torch.no_grad()
def score_nodes(
    ours_ND: Tensor,
    our_head: Head,
    theirs_ND: Tensor,
    their_head: Head,
    *,
    candidates: int,
    top: int,
    size: int,
) -> NodeScores:
    """Score both models at N nodes.

    Args:
        ours_ND, theirs_ND: last hidden rows that predict the node's next token.
        candidates: K; the most probable tokens of the mean of both models are taken.
        top: k of the signal top_k.
        size: nodes at once.
    """
    parts = []
    for ours_CD, theirs_CD in zip(ours_ND.split(size), theirs_ND.split(size), strict=True):
        logits_CV, teacher_CV = our_head.logits(ours_CD), their_head.logits(theirs_CD)
        logp_CV, logq_CV = (x.log_softmax(-1).double() for x in (logits_CV, teacher_CV))
        ids_CK = torch.logaddexp(logp_CV, logq_CV).topk(candidates, dim=-1).indices
        steps = {
            name: centred(step_CV.double().gather(-1, ids_CK))
            for name, step_CV in signal_directions(logits_CV, teacher_CV, top).items()
        }
        steps["sampled"] = steps["reverse_kl"]
        gap_CV, p_CV = logq_CV - logp_CV, logp_CV.exp()
        p_CV = p_CV.scatter(-1, ids_CK, 0.0)
        logp_CK, logq_CK = (x.gather(-1, ids_CK) for x in (logp_CV, logq_CV))
        beyond = ((p_CV * gap_CV.sign()).sum(-1), (p_CV * gap_CV**2).sum(-1))
        parts.append(NodeScores(ids_CK, logp_CK, logq_CK, steps, *beyond))
    return NodeScores(
        ids_NK=torch.cat([p.ids_NK for p in parts]),
        logp_NK=torch.cat([p.logp_NK for p in parts]),
        logq_NK=torch.cat([p.logq_NK for p in parts]),
        directions={n: torch.cat([p.directions[n] for p in parts]) for n in parts[0].directions},
        rest_sign_N=torch.cat([p.rest_sign_N for p in parts]),
        rest_square_N=torch.cat([p.rest_square_N for p in parts]),
    )


def score_candidates(ids_NK: Tensor, logp_NK: Tensor, logq_NK: Tensor) -> NodeScores:
    """Return the scores of a teacher that is asked for the candidates only.

    The one signal is the sampled token, as far as it is drawn from the candidates.
    """
    p_NK, zero_N = logp_NK.exp(), torch.zeros_like(logp_NK[:, 0])
    sampled_NK = ((p_NK * (logq_NK - logp_NK))[..., None] * _towards(p_NK)).sum(1)
    steps = {"sampled": centred(sampled_NK)}
    return NodeScores(ids_NK, logp_NK, logq_NK, steps, zero_N, zero_N)


def _towards(p_NK: Tensor) -> Tensor:
    """Return 1[y] - p on the candidates, for each candidate y. Shape [N, K, K]."""
    return torch.eye(p_NK.shape[1], dtype=p_NK.dtype, device=p_NK.device) - p_NK[:, None, :]


def sampled_draws(scores: NodeScores, g_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cosine with ``g_NK`` of one draw of the sampled-token signal, and its noise.

    The noise is the variance over the squared norm of the mean. Both are exact sums over the drawn
    token, not samples of it. [N] each.
    """
    p_NK, gap_NK = scores.logp_NK.exp(), scores.logq_NK - scores.logp_NK
    towards_NKK, away_NK = centred(_towards(p_NK)), centred(-p_NK)
    cos_N = (p_NK * gap_NK.sign() * cosine(g_NK[:, None, :], towards_NKK)).sum(-1)
    cos_N = cos_N + cosine(g_NK, away_NK) * scores.rest_sign_N
    square_N = (p_NK * gap_NK**2 * towards_NKK.square().sum(-1)).sum(-1)
    square_N = square_N + scores.rest_square_N * away_NK.square().sum(-1)
    return cos_N, square_N / scores.directions["sampled"].square().sum(-1) - 1


def outcome_draws(logp_NK: Tensor, success_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cosine with ``ideal`` of one draw of the outcome signal, and its noise.

    Both are exact sums over the drawn token and its verdict. [N] each.
    """
    p_NK, g_NK = logp_NK.softmax(-1), ideal(logp_NK, success_NK)
    towards_NKK = _towards(p_NK)
    cos_NK = cosine(g_NK[:, None, :], towards_NKK)
    base_N1 = (p_NK * success_NK).sum(-1, keepdim=True)
    spread_NK = success_NK * (1 - base_N1) ** 2 + (1 - success_NK) * base_N1**2
    square_N = (p_NK * spread_NK * towards_NKK.square().sum(-1)).sum(-1)
    cos_N = (p_NK * (2 * success_NK - 1) * cos_NK).sum(-1)
    return cos_N, square_N / g_NK.square().sum(-1) - 1
