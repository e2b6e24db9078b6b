"""The names of a step's per-token columns, as they stand in ``rollouts/*.jsonl``.

A column that is called as a field of a rollout is has another key there: ``train/rollout_log.py``.

A number that a model gave of the tokens is named after who gave it and what it is (``column_of``);
the log-prob of the token itself has the giver's name alone. No torch here: members import it.
"""

from __future__ import annotations


def column_of(giver: str, quantity: str) -> str:
    """Return the column of a quantity: ``column_of("teacher", "entropy")`` is teacher_entropy.

    Args:
        giver: teacher, policy (the student before the update) or reference.
        quantity: a name of ``quantities.QUANTITIES``.
    """
    return giver if quantity == "logprobs" else f"{giver}_{quantity}"


TEACHER = column_of("teacher", "logprobs")
TEACHER_ENTROPY = column_of("teacher", "entropy")
TEACHER_LIST_ENTROPY = column_of("teacher", "topk_list_entropy")
TEACHER_TOP1 = column_of("teacher", "top1")
TEACHER_TOP1_ID = column_of("teacher", "top1_id")
TEACHER_MASS_ABOVE = column_of("teacher", "mass_above")
POLICY = column_of("policy", "logprobs")
POLICY_ENTROPY = column_of("policy", "entropy")
REFERENCE = column_of("reference", "logprobs")
REFERENCE_TOP1 = column_of("reference", "top1")  # its log-prob of the teacher's most probable token

POLICY_KL = "policy_kl"  # to the token's own teachers
DRIFT_OVERLAP = "drift_overlap"  # the share of the policy's top k that is the teacher's too
TEACHER_WEIGHT = "teacher_weight"  # of a token's teachers together

# Which rows of which teachers belong to a token, [N, M]; M is above 1 where teachers are pooled.
TEACHER_INDEX = "teacher_index"
TEACHER_ROW = "teacher_row"
PAIR_WEIGHT = "pair_weight"  # of a token and one of its teachers

BEHAVIOUR = "behaviour"  # the sampler's own log-prob
REWARD = "reward"  # of the response
RIGHT = "right"  # the verdict on the response
DOMAIN = "domain"  # its number
ADVANTAGE = "advantage"
FIXED_ADVANTAGE = "advantage_fixed"  # without the signals whose credit follows the policy
DECAY = "decay"  # what weights/overlap leaves of a token
