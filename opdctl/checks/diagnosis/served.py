"""Measure a teacher behind a server, from log-probs of chosen tokens and lists of its top k.

Measured are: the log-ratio on the student's own tokens, whose mean is an unbiased estimate of
KL(student || teacher); the overlap of the two top-k sets, its mass and the teacher's change on it,
as for a teacher whose logits are here; the sampled-token signal at the nodes, on candidates that
are each scored as a token of their own; the gain, from the texts it answers. Its entropy, the
forward KL and the signals over the whole vocabulary need its logits and are absent. All numbers are
at temperature 1, that of a server's log-probs.
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
from opdctl.checks.diagnosis.summary import mean_and_interval, profile, rollout_of_token
from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight.served import check_text_servers
from opdctl.errors import StageFailed
from opdctl.kernels.chunked import Rows
from opdctl.kernels.chunks import rows_in
from opdctl.kernels.head import Head
from opdctl.kernels.topk import overlap_numbers
from opdctl.remote.endpoint import START, NoAnswer
from opdctl.scoring.asks import LOGPROBS, Asks, Pass
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
def without_resume_hint() -> Iterator[None]:
    """Replace the hint of a server that does not answer: it speaks of a run that can be resumed,
    and a diagnosis has none.

    Raises:
        StageFailed: the same message, with a hint that holds for a diagnosis.
    """
    try:
        yield
    except NoAnswer as error:
        moved = f"; elsewhere: the same command with {error.elsewhere}" if error.elsewhere else ""
        hint = f"{START}; nothing of a diagnosis is kept{moved}"
        raise StageFailed(error.message, hint) from None


def ask_servers(stage: CheckedStage, progress: Callable[[str], None]) -> None:
    """Ask every server before anything is sampled, as a stage does when it starts.

    A teacher is asked for its name, its ids and lists of a known sequence; a judge for its name.

    Raises:
        StageFailed: one does not answer, or lists fewer tokens than the overlap compares.
        UsageError: one has other tokens, does not score, or serves another model.
    """
    for name in stage.served:
        progress(f"asking teacher {name} ({stage.ctx.config.teachers[name].address})")
        stage.server(name, top_of(stage.ctx.models.start().lm_head(1.0)))
    for finding in check_text_servers(stage.ctx):
        if finding.severity == "error":
            raise StageFailed(finding.what, finding.do)


@torch.no_grad()
def list_overlap(
    hidden_ND: Tensor, head: Head, ids_NK: Tensor, logq_NK: Tensor, size: int
) -> dict[str, Tensor]:
    """Return overlap, overlap_mass, overlap_teacher_mass, overlap_advantage and the student's
    entropy for each token. [N] each.

    Args:
        hidden_ND: the student's last hidden rows.
        ids_NK, logq_NK: the teacher's k most probable ids and their log-probs.
        size: rows of a chunk of logits.
    """
    parts = []
    chunks = (x_N.split(size) for x_N in (hidden_ND, ids_NK, logq_NK))
    for hidden_CD, ids_CK, logq_CK in zip(*chunks, strict=True):
        rows = Rows(head.logits(hidden_CD))
        logp_CK, ours_CK = rows.at(ids_CK, leaf=False), rows.top(ids_CK.shape[1])
        numbers = overlap_numbers(logp_CK, logq_CK, ours_CK, ids_CK)
        parts.append(numbers | {"entropy": rows.entropy()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measure_served(
    stage: CheckedStage,
    name: str,
    rollouts: list,
    effort: Any,
    entry: dict,
    progress: Callable[[str], None],
) -> None:
    """Fill in the entry of a served teacher.

    Raises:
        StageFailed: the server does not answer, or lists fewer tokens than the overlap compares.
        UsageError: it has other tokens, or does not score.
    """
    entry["missing"] = dict.fromkeys(ABSENT, LOGITS)
    progress("log-probs of the student's answers")
    ctx, teacher = stage.ctx, stage.server(name)
    student = ctx.models.start()
    head = student.lm_head(1.0)
    top = top_of(head)
    requests = [r.request for r in rollouts]
    run = Pass.of(ctx, 1.0)
    ours = score(student, requests, Asks.of("logprobs", "hidden"), run)
    theirs = teacher.score(requests, Asks.of("logprobs", "topk_list", top=top), run)
    sequence_N = rollout_of_token(rollouts, theirs.logprobs_N.device)
    size = rows_in(ctx.runtime.chunk_mib, head)
    ours_ND, (ids_NK, logq_NK) = ours.rows(), theirs.top_list()
    table = {"log_ratio": ours.logprobs_N - theirs.logprobs_N}
    table |= list_overlap(ours_ND, head, ids_NK, logq_NK, size)
    entry["step0"] = {"top": top, "tokens": len(sequence_N)}
    entry["step0"] |= {column: mean_and_interval(v_N, sequence_N) for column, v_N in table.items()}
    entry["profile"] = profile(table, sequence_N, len(rollouts))

    def score_at(nodes: list[Node], at_N: Tensor) -> directions.NodeScores:
        logp_NV = head.logits(ours_ND[at_N]).log_softmax(-1)
        logp_NK, ids_NK = logp_NV.topk(min(effort.top, head.valid_V), dim=-1)
        candidates = []
        for node, ids in zip(nodes, ids_NK.tolist(), strict=True):
            rollout = rollouts[node.rollout]
            prefix = (*rollout.prompt_ids, *rollout.response_ids[: node.depth])
            candidates += [ScoreRequest((*prefix, i), len(prefix)) for i in ids]
        logq_N = teacher.score(candidates, LOGPROBS, run).logprobs_N
        return directions.score_candidates(
            ids_NK, logp_NK.double(), logq_N.view(ids_NK.shape).double()
        )

    entry |= alignment(ctx, [student], rollouts, score_at, effort, progress)
