"""A teacher behind a server: what log-probs of given tokens and its lists of the top k can say.

Of the student's own tokens the log-ratio, its mean an unbiased estimate of KL(student || teacher);
of the two top k the overlap, its mass and what the teacher would change on it, as of a teacher
whose logits are here; the sampled-token signal at the nodes, on the candidates, each scored as a
token of its own; what it answers, as text, for its gain. Its entropy, the forward KL and the
signals over the whole vocabulary need its logits, and are absent. All at temperature 1, a server's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opdctl.checks.diagnosis import directions
from opdctl.checks.diagnosis.alignment import alignment
from opdctl.checks.diagnosis.nodes import Node
from opdctl.checks.diagnosis.summary import owners, profile, spread
from opdctl.checks.preflight._pairing import Pairing
from opdctl.checks.preflight.served import services
from opdctl.errors import StageFailed
from opdctl.kernels.chunked import Rows
from opdctl.kernels.chunks import rows_in
from opdctl.kernels.head import Head
from opdctl.kernels.topk import overlap_numbers
from opdctl.remote.endpoint import START, NoAnswer
from opdctl.scoring.overlap import top_of
from opdctl.scoring.score import score
from opdctl.types import ScoreRequest

LOGITS = "a server gives log-probs of given tokens and of its top k; name a folder for its logits"
ABSENT = (
    "the teacher's entropy and the forward KL",
    "signals over the whole vocabulary",
    "how the teacher goes on from the student's prefixes",
)


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Around what speaks to servers: where none answers, the error tells of what a stage keeps and
    how its run goes on, and a diagnosis has neither.

    Raises:
        StageFailed: the same, with a hint that is true here.
    """
    try:
        yield
    except NoAnswer as error:
        moved = f"; elsewhere: the same command with {error.elsewhere}" if error.elsewhere else ""
        hint = f"{START}; nothing of a diagnosis is kept{moved}"
        raise StageFailed(error.message, hint) from None


def ask(pairing: Pairing, told: Callable[[str], None]) -> None:
    """Speak to every server before anything is sampled, as a stage does when it starts: a teacher's
    name, ids and lists of a known sequence, a judge's name.

    Raises:
        StageFailed: one does not answer, or lists fewer than the overlap compares.
        UsageError: one has other tokens, does not score, or serves another model.
    """
    for name in pairing.served:
        told(f"asking teacher {name} ({pairing.ctx.config.teachers[name].address})")
        pairing.server(name, top_of(pairing.ctx.start().lm_head(1.0)))
    for finding in services(pairing.ctx):
        if finding.severity == "error":
            raise StageFailed(finding.what, finding.do)


@torch.no_grad()
def on_lists(
    hidden_ND: Tensor, head: Head, ids_NK: Tensor, logq_NK: Tensor, size: int
) -> dict[str, Tensor]:
    """Per token: overlap, overlap_mass, overlap_teacher_mass, overlap_advantage and the student's
    entropy. [N] each.

    Args:
        hidden_ND: the student's last hidden rows.
        ids_NK, logq_NK: the teacher's k most probable ids and their log-probs.
        size: rows of a chunk of logits.
    """
    parts = []
    given = (x_N.split(size) for x_N in (hidden_ND, ids_NK, logq_NK))
    for hidden_CD, ids_CK, logq_CK in zip(*given, strict=True):
        rows = Rows(head.logits(hidden_CD))
        logp_CK, ours_CK = rows.at(ids_CK, leaf=False), rows.top(ids_CK.shape[1])
        found = overlap_numbers(logp_CK, logq_CK, ours_CK, ids_CK)
        parts.append(found | {"entropy": rows.entropy()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def by_server(
    pairing: Pairing,
    name: str,
    rollouts: list,
    effort: Any,
    entry: dict,
    told: Callable[[str], None],
) -> None:
    """Fill in what is measured of a served teacher.

    Raises:
        StageFailed: it does not answer, or lists fewer than the overlap compares.
        UsageError: it has other tokens, or does not score.
    """
    entry["missing"] = dict.fromkeys(ABSENT, LOGITS)
    told("log-probs of the student's answers")
    ctx, teacher = pairing.ctx, pairing.server(name)
    student = ctx.start()
    head = student.lm_head(1.0)
    top = top_of(head)
    requests = [r.request for r in rollouts]
    how = {"temperature": 1.0, "micro_batch": ctx.runtime.micro_batch, "check": ctx.check}
    ours = score(student, requests, want=("logprobs", "hidden"), **how)
    theirs = teacher.score(requests, 1.0, ("logprobs", "listed"), top)
    sequence_N = owners(rollouts, theirs.logprobs_N.device)
    size = rows_in(ctx.runtime.chunk_mib, head)
    lists = (theirs.top_NK, theirs.top_logprob_NK)
    table = {"log_ratio": ours.logprobs_N - theirs.logprobs_N}
    table |= on_lists(ours.hidden_ND, head, *lists, size)
    entry["step0"] = {"top": top, "tokens": len(sequence_N)}
    entry["step0"] |= {what: spread(v_N, sequence_N) for what, v_N in table.items()}
    entry["profile"] = profile(table, sequence_N, len(rollouts))

    def see(nodes: list[Node], at_N: Tensor) -> directions.Seen:
        logp_NV = head.logits(ours.hidden_ND[at_N]).log_softmax(-1)
        logp_NK, ids_NK = logp_NV.topk(min(effort.top, head.valid_V), dim=-1)
        asked = []
        for node, ids in zip(nodes, ids_NK.tolist(), strict=True):
            rollout = rollouts[node.rollout]
            prefix = (*rollout.prompt_ids, *rollout.response_ids[: node.depth])
            asked += [ScoreRequest((*prefix, i), len(prefix)) for i in ids]
        logq_N = teacher.score(asked, 1.0, ("logprobs",)).logprobs_N
        return directions.on_candidates(
            ids_NK, logp_NK.double(), logq_N.view(ids_NK.shape).double()
        )

    entry |= alignment(ctx, [student], rollouts, see, effort, told)
