"""The claims of the labs on made-up measurements: each holds where it should, else fails."""

import numpy as np
import pytest

from opdctl.config.registry import member, members
from opdctl.config.schema import build
from opdctl.evidence.judge import _decide
from opdctl.evidence.measured import Measured, compute_facts, per_prompt
from opdctl.recipe.recipe import lookup

SCORES = {  # (model, domain): accuracy
    **{("sft", d): s for d, s in {"chat": 0.8, "math": 0.4, "sort": 0.3}.items()},
    **{("reason", d): s for d, s in {"chat": 0.6, "math": 0.9, "sort": 0.3}.items()},
    **{("last", d): s for d, s in {"chat": 0.5, "math": 0.6, "sort": 0.9}.items()},
    **{("opd", d): s for d, s in {"chat": 0.79, "math": 0.88, "sort": 0.9}.items()},
    **{("rl", d): s for d, s in {"chat": 0.6, "math": 0.86, "sort": 0.88}.items()},
}
FLOPS = {"opd": 1.0, "reason": 8.0, "last": 8.0, "rl": 12.0}
G2 = {
    "student": "stage:opd",
    "before": "stage:last",
    "stages": {"a": "stage:sft", "b": "stage:reason", "c": "stage:last"},
    "rl": {"b": "stage:reason", "c": "stage:last"},
    "domains": {"chat": True, "math": True},
    "last": {"sort": True},
}
MODES = {
    "student": "stage:opd",
    "teacher": "stage:rl",
    "think": {"math": True},
    "no_think": {"sort": True},
}
ONE = {"opd": "stage:opd", "rl": "stage:rl", "domains": {"math": True, "sort": True}}
T1 = {"opd": "stage:opd", "teacher": "stage:rl", "domain": "math"}
D5 = {
    "student": "stage:opd",
    "average": "stage:last",
    "specialists": {"math": "stage:reason", "sort": "stage:last"},
    "efforts": {"low": {"math": True}, "high": {"sort": True}},
}
M4 = {
    "start": "stage:sft",
    "student": "stage:opd",
    "teachers": {"math": "stage:reason", "sort": "stage:last"},
    "other": "stage:rl",
    "other_teachers": {"math": "stage:reason", "sort": "stage:last"},
}
T3 = {
    "before": "stage:sft",
    "trained": "stage:last",
    "student": "stage:opd",
    "lost": {"chat": True},
    "learned": {"sort": True},
}
VARIANCE = {
    ("v", "variance of policy_gradient"): 9.0,
    ("v", "variance of divergence"): 2.0,
    ("v", "cosine of policy_gradient and divergence"): 0.99,
    ("v", "gap of rebuilt logits"): 1e-6,
}

# claim: its roles, and what makes it fail: a change of one score, fact or curve
CASES = {
    "g1": ({"end": "stage:last", "after": {"math": "stage:reason"}}, {("last", "math"): 0.89}),
    "g2": (G2, {("opd", "math"): 0.8}),
    "g3": (
        {"one": "stage:opd", "several": "stage:rl", "domains": {"math": True}},
        {("opd", "math"): 0.8},
    ),
    "g4": (
        {
            "start": "stage:last",
            "teachers": {"math": "stage:reason"},
            "without": {"math": "stage:third"},
        },
        {("third", "math"): 0.8},
    ),
    "q1": (ONE, {("opd", "math"): 0.6}),
    "q1_all": (ONE, {("opd", "all flops"): 2.0}),
    "q2": (
        {"opd": "stage:opd", "rl": "stage:rl", "start": "stage:sft", "domains": {"math": True}},
        {("rl", "math", "pass@32"): 0.99},
    ),
    "q3": (
        {"opd": "stage:opd", "start": "stage:sft", "domains": {"chat": True}},
        {("opd", "chat"): 0.7},
    ),
    "q4": (MODES, {("opd", "sort", "obedience"): 0.7}),
    "q5": (
        {
            "before": "stage:reason",
            "after": "stage:rl",
            "reasoning": {"math": True},
            "general": {"sort": True},
        },
        {("rl", "math"): 0.6},
    ),
    "d1": ({"gradients": "stage:v"}, {("v", "variance of divergence"): 8.0}),
    "d2": ({"gradients": "stage:v"}, {("v", "gap of rebuilt logits"): 1e-3}),
    "d3": (
        {"student": "stage:opd"},
        {("opd", "row"): {"head_loads": 5, "teachers": 3, "heads": 2}},
    ),
    "d5": (D5, {("opd", "math", "tokens"): 9.0}),
    "m4": (M4, {("rl", "row"): {"kl": {"math": 0.3, "sort": 0.3}}}),
    "s1": (
        {"student": "stage:opd", "direct": "stage:rl", "domains": {"math": True}},
        {("opd", "math"): 0.855},
    ),
    "s2": (
        {"raw": "stage:last", "direct": "stage:rl", "domains": {"math": True}},
        {("last", "math"): 0.865},
    ),
    "s3": (
        {
            "student": "stage:opd",
            "without": {"the teacher's RL": "stage:last", "OPD": "stage:rl"},
            "domains": {"math": True},
        },
        {("rl", "math"): 0.885},
    ),
    "s4": (
        {"before": "stage:rl", "after": "stage:opd", "domains": {"math": True}},
        {("opd", "math"): 0.855},  # .859 differs on 10 prompts of 1000: undecided
    ),
    "t1": (T1, {("opd", "row"): {"accuracy": {"math": 0.5}}}),
    "t2": (
        {
            "opd": "stage:opd",
            "sft": "stage:third",
            "start": "stage:sft",
            "teacher": "stage:reason",
            "domain": "math",
        },
        {("third", "math"): 0.85},
    ),
    "t3": (T3, {("opd", "sort"): 0.7}),
}


def measurement(changes=None):
    changes = changes or {}
    measured = Measured()

    def put(key, value):
        whole, rest = divmod(round(value * 10_000), 1000)
        measured.values[key] = np.array([whole + (i < rest) for i in range(1000)], float) / 10

    for key, value in {
        **SCORES,
        ("third", "math"): 0.45,
        ("sft", "math", "pass@32"): 0.8,
        ("opd", "math", "pass@32"): 0.9,
        ("rl", "math", "pass@32"): 0.79,
        **{(m, d, "obedience"): 0.97 for m in ("opd", "rl") for d in ("math", "sort")},
        ("opd", "math", "tokens"): 4.0,
        ("opd", "sort", "tokens"): 6.0,
        **{k: v for k, v in changes.items() if k[0] != "v" and k[1] in ("chat", "math", "sort")},
    }.items():
        put(key, value)
    for stage, flops in FLOPS.items():
        measured.facts |= {(stage, n): flops for n in ("student flops", "all flops")}
    measured.facts |= {k: v for k, v in {**VARIANCE, **changes}.items() if len(k) == 2}
    rows = {
        "opd": [
            {
                "head_loads": 3,
                "teachers": 3,
                "heads": 2,
                "kl": {"math": 0.2, "sort": 0.2},
                "accuracy": {"math": min(0.4 + 0.1 * i, 0.9)},
            }
            for i in range(10)
        ],
        "rl": [
            {"kl": {"math": 0.9, "sort": 0.9}, "accuracy": {"math": min(0.4 + 0.01 * i, 0.9)}}
            for i in range(60)
        ],
    }
    for (stage, kind), value in [(k[:2], v) for k, v in changes.items()]:
        if kind == "row":
            rows[stage] = [{**row, **value} for row in rows[stage]]
    measured.rows = rows
    return measured


def verdict(claim, roles, *runs):
    cls, problems = member("claims", claim), []
    config = build(cls.Config, roles, "", problems, lookup)
    assert not problems, problems
    conditions, _ = cls.conditions(config, list(runs))
    return _decide(conditions, list(runs))


@pytest.mark.parametrize("claim", CASES)
def test_holds_and_fails(claim):
    roles, change = CASES[claim]
    good = measurement()
    good_verdict = verdict(claim, roles, good)
    assert good_verdict["holds"] is True, good_verdict
    bad = verdict(claim, roles, measurement(change))
    assert bad["holds"] is False, bad
    several = verdict(claim, roles, *[good] * 3)
    assert (
        several["holds"] is True and several["measured"].keys() == good_verdict["measured"].keys()
    )


def test_every_claim_has_such_a_case():
    assert set(members("claims")) == {*CASES, "m1", "m2", "m3", "m5", "m6"}


def test_t1_counts_steps_to_the_teachers_level():
    result = verdict("t1", T1, measurement())
    # level .86 - .03: the mean of three steps passes it at .78, .88, .9 -> steps 5, 6, 7
    assert result["measured"]["share of RL's steps"] == pytest.approx(7 / 60)


def test_q2_needs_the_whole_interval_above_zero():
    roles, _ = CASES["q2"]
    same = measurement({("opd", "math", "pass@32"): 0.8})
    assert verdict("q2", roles, same)["holds"] is not True


def test_missing_facts_name_stage_and_fact():
    nothing = measurement()
    nothing.facts.clear()
    with pytest.raises(KeyError) as caught:
        verdict("d2", {"gradients": "stage:v"}, nothing)
    assert caught.value.args[0] == ("v", "gap of rebuilt logits")
    nothing.rows = {}
    with pytest.raises(KeyError) as caught:
        verdict("d3", {"student": "stage:opd"}, nothing)
    assert caught.value.args[0] == ("opd", "head_loads")


def test_facts_and_scores_of_records():
    flops = {"rollout": 1.0, "teacher": 2.0, "teacher_sampling": 4.0, "train": 8.0}
    assert compute_facts({"compute": {"flops": flops}}) == {"student flops": 9.0, "all flops": 15.0}
    assert compute_facts({}) == {}
    row = {
        "model": "m",
        "domain": "d",
        "samples": 4,
        "right": [0, 1, 4],
        "pass_at_k": {"1": 0, "2": 0, "4": 0},
        "tokens": [8, 4, 12],
        "obeyed": [4, 2, 0],
    }
    scores = per_prompt(row)
    assert scores["m", "d"].tolist() == [0, 0.25, 1] == scores["m", "d", "pass@1"].tolist()
    assert scores["m", "d", "pass@2"].tolist() == [0, 0.5, 1]
    assert scores["m", "d", "pass@4"].tolist() == [0, 1, 1]
    assert scores["m", "d", "tokens"].tolist() == [2, 1, 3]
    assert scores["m", "d", "obedience"].tolist() == [1, 0.5, 0]
