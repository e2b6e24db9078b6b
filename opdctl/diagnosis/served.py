"""A teacher behind a server: what log-probs of given tokens can say of it.

The log-ratio of the student's own tokens, its mean an unbiased estimate of KL(student || teacher);
the sampled-token signal at the nodes, on the candidates, each scored as a token of its own; what it
answers, as text, for its gain. The overlap, the entropies, the forward KL and the signals over the
whole vocabulary need its logits, and are absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from opdctl.core.assemble import teacher_of
from opdctl.core.scoring import score
from opdctl.diagnosis import directions
from opdctl.diagnosis.alignment import alignment
from opdctl.diagnosis.nodes import Node
from opdctl.diagnosis.summary import owners, profile, spread
from opdctl.types import ScoreRequest

LOGITS = "a server gives log-probs of given tokens alone; name a folder to have its logits"
ABSENT = (
    "overlap, entropies and forward KL",
    "signals over the whole vocabulary",
    "how the teacher goes on from the student's prefixes",
)


def by_server(
    name: str, ctx: Any, rollouts: list, effort: Any, entry: dict, told: Callable[[str], None]
) -> None:
    """Fill in what is measured of a served teacher.

    Raises:
        StageFailed: it does not answer.
        UsageError: it has other tokens, or does not score.
    """
    entry["missing"] = dict.fromkeys(ABSENT, LOGITS)
    told("log-probs of the student's answers")
    student, temperature = ctx.start(), ctx.config.sampling.temperature
    reference = ctx.config.teachers[name].model
    teacher = teacher_of(reference)(ctx, student, name, reference)
    requests = [r.request for r in rollouts]
    how = {"temperature": temperature, "micro_batch": ctx.runtime.micro_batch, "check": ctx.check}
    ours = score(student, requests, want=("logprobs", "hidden"), **how)
    theirs_N = teacher.score(requests, temperature, ("logprobs",)).logprobs_N
    sequence_N = owners(rollouts, theirs_N.device)
    table = {"log_ratio": ours.logprobs_N - theirs_N}
    ratio = spread(table["log_ratio"], sequence_N)
    entry["step0"] = {"tokens": len(sequence_N), "log_ratio": ratio}
    entry["profile"] = profile(table, sequence_N, len(rollouts))

    def see(nodes: list[Node], at_N: Tensor) -> directions.Seen:
        head = student.projection(temperature)
        logp_NV = head.logits(ours.hidden_ND[at_N]).log_softmax(-1)
        logp_NK, ids_NK = logp_NV.topk(min(effort.top, head.valid_V), dim=-1)
        asked = []
        for node, ids in zip(nodes, ids_NK.tolist(), strict=True):
            rollout = rollouts[node.rollout]
            prefix = (*rollout.prompt_ids, *rollout.response_ids[: node.depth])
            asked += [ScoreRequest((*prefix, i), len(prefix)) for i in ids]
        logq_N = teacher.score(asked, temperature, ("logprobs",)).logprobs_N
        return directions.on_candidates(
            ids_NK, logp_NK.double(), logq_N.view(ids_NK.shape).double()
        )

    entry |= alignment(ctx, [student], rollouts, see, effort, told)
