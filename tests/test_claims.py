"""Claims on made-up measurements whose answer is known, and the estimators behind them."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from opdctl.evidence.claims.m1 import M1
from opdctl.evidence.claims.m3 import M3
from opdctl.evidence.claims.m5 import M5
from opdctl.evidence.judge import _decide
from opdctl.evidence.measured import Measured
from opdctl.evidence.verdict import DELTA, Condition, verdict
from opdctl.intervals import wilson
from opdctl.recipe.recipe import load
from opdctl.run.fingerprint import fingerprints, semantic
from opdctl.train.evaluation import half_width, pass_at_k, record

TEACHERS = {"a": "stage:ta", "b": "stage:tb"}


def run_with(**scores):
    """Measurements with exactly these scores: 1000 prompts, 10 samples, keys model_domain."""
    found = Measured()
    for name, score in scores.items():
        model, domain = name.rsplit("_", 1)
        whole, rest = divmod(round(score * 10_000), 1000)
        right = np.array([whole + (i < rest) for i in range(1000)], float)
        found.values[model, domain] = right / 10
    return found


def base(**more):
    return run_with(**{"sft_a": 0.4, "sft_b": 0.2, "ta_a": 0.9, "tb_b": 0.9, **more})


def judge(claim, roles, runs):
    conditions, note = claim.conditions(roles, runs)
    return _decide(conditions, runs), note


def test_m1_on_one_seed_and_on_several():
    roles = M1.Config(student="stage:s", start="stage:sft", teachers=TEACHERS)
    good = base(s_a=0.88, s_b=0.85)
    found, _ = judge(M1, roles, [good])
    assert found["holds"] is True
    assert found["measured"]["r_a"] == pytest.approx(0.48 / 0.5)
    assert found["measured"]["Norm"] == pytest.approx((0.96 + 0.65 / 0.7) / 2)
    bad, _ = judge(M1, roles, [base(s_a=0.88, s_b=0.5)])
    assert bad["holds"] is False
    found, _ = judge(M1, roles, [good, base(s_a=0.87, s_b=0.86), base(s_a=0.89, s_b=0.86)])
    assert found["holds"] is True
    wild = [base(s_a=0.9, s_b=0.9), base(s_a=0.9, s_b=0.9), base(s_a=0.75, s_b=0.9)]
    found, _ = judge(M1, roles, wild)
    assert found["measured"]["Norm"] > 0.9 and found["holds"] is None  # the interval is wide


def test_t_interval_over_seeds():
    runs = [base(s_a=x, s_b=0.9) for x in (0.80, 0.85, 0.90)]
    found = _decide([Condition("s", lambda s: s["s", "a"], least=0.5)], runs)
    low, high = found["interval"]["s"]
    half = 4.303 * 0.05 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.85 - half, 0.85 + half), abs=1e-6)


def test_m1_leaves_out_narrow_gaps():
    roles = M1.Config(student="stage:s", start="stage:sft", teachers={**TEACHERS, "c": "stage:tc"})
    runs = [base(s_a=0.9, s_b=0.9, sft_c=0.5, tc_c=0.55, s_c=0.1)]
    conditions, note = M1.conditions(roles, runs)
    assert [p.name for p in conditions] == ["Norm", "r_a", "r_b"] and "c" in note


def test_m3():
    roles = M3.Config(
        student="stage:s",
        start="stage:sft",
        teachers=TEACHERS,
        kl_only="stage:k",
        orm_only="stage:o",
    )
    scores = {"s_a": 0.88, "s_b": 0.85, "k_a": 0.87, "k_b": 0.85, "o_a": 0.5, "o_b": 0.2}
    found, _ = judge(M3, roles, [base(**scores)])
    assert found["holds"] is True and found["measured"]["Norm(ORM only)"] == pytest.approx(0.1)
    found, _ = judge(M3, roles, [base(**{**scores, "o_a": 0.9, "o_b": 0.8})])
    assert found["holds"] is False
    found, _ = judge(M3, roles, [base(**{**scores, "s_a": 0.7})])
    assert found["holds"] is False  # the outcome hurts


def test_m5():
    roles = M5.Config(student="stage:s", start="stage:sft", domains={"a": True})
    assert judge(M5, roles, [base(s_a=0.41)])[0]["holds"] is True
    assert judge(M5, roles, [base(s_a=0.5)])[0]["holds"] is False
    assert judge(M5, roles, [base(s_a=0.3)])[0]["holds"] is False


def test_missing_measurement_is_a_key_error_with_its_name():
    roles = M5.Config(student="stage:s", start="stage:sft", domains={"a": True})
    with pytest.raises(KeyError) as caught:
        judge(M5, roles, [base()])
    assert caught.value.args[0] == ("s", "a")


@pytest.mark.parametrize(
    ("estimate", "low", "high", "expected"),
    [
        (0.91, 0.89, 0.93, True),
        (0.91, 0.80, 0.99, None),
        (0.89, 0.88, 0.95, None),
        (0.80, 0.75, 0.85, False),
        (0.9, 0.87, 0.93, True),
    ],
)
def test_verdicts(estimate, low, high, expected):
    condition = Condition("x", lambda s: 0, least=0.9, delta=DELTA)
    assert verdict(condition, estimate, low, high) is expected


def test_bootstrap_is_paired_and_covers():
    rng = np.random.default_rng(0)
    found = Measured()
    hard = rng.random(800)
    for model, shift in (("x", 0.0), ("y", 0.05)):
        found.values[model, "a"] = rng.binomial(8, np.clip(hard * 0.8 + shift, 0, 1)) / 8
    draws = found.resampled()
    single = np.std(draws["x", "a"])
    paired = np.std(draws["y", "a"] - draws["x", "a"])
    assert (
        paired < 0.9 * single
    )  # unpaired it would be 1.41: prompts and their difficulty are shared
    half = half_width(list(found.values["x", "a"]))
    assert 1.96 * single == pytest.approx(half, rel=0.15)


def test_nothing_right_is_no_certainty():
    """0 of 20 has an interval that reaches beyond 0, in a table and in a claim."""
    row = record("m", "d", 4, [0] * 20, [3] * 80, [4] * 20)
    assert row["ci95"] == wilson(0.0, 20) and row["ci95"][1] > 0.15
    found = Measured()
    found.values = {
        ("m", "d"): np.zeros(20),
        ("n", "d"): np.ones(20),
        ("m", "d", "tokens"): np.ones(20),
    }
    drawn = found.resampled()
    low, high = np.quantile(drawn["m", "d"], [0.025, 0.975])
    assert 0.0 <= low < 0.001 and 0.16 < high < 0.20  # Wilson: .161
    assert np.quantile(drawn["n", "d"], 0.025) == pytest.approx(1 - high, abs=0.02)
    assert (drawn["m", "d", "tokens"] == 1.0).all()  # no share


def test_pass_at_k_is_unbiased():
    """Against every subset of k samples, exactly."""
    for n, right in itertools.product((4, 6), range(7)):
        if right > n:
            continue
        outcomes = [1] * right + [0] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            exact = sum(any(s) for s in subsets) / len(subsets)
            assert pass_at_k(n, right, k) == pytest.approx(exact)


def test_record_and_interval():
    random.seed(0)
    right = [sum(random.random() < 0.7 for _ in range(4)) for _ in range(500)]
    row = record("m", "d", 4, right, [3] * 2000, [4] * 500)
    assert row["n"] == 2000 and row["pass_at_k"].keys() == {"1", "2", "4"}
    assert row["pass_at_k"]["1"] == pytest.approx(row["accuracy"])
    low, high = row["ci95"]
    assert low < 0.7 < high and (high - low) / 2 == pytest.approx(0.02, abs=0.004)
    assert json.dumps(row)


RECORDED = sorted((Path(__file__).parent.parent / "docs" / "claims").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_what_is_recorded_was_measured_on_the_recipe_as_it_is(path):
    """A recipe that changes has to be measured again before its table says anything."""
    found = json.loads(path.read_text())
    overrides = tuple(w for w in found["command"].split() if "=" in w)
    for seed, recorded in found["fingerprints"].items():
        recipe = load(found["recipe"], size=found["size"], seed=int(seed), overrides=overrides)
        assert fingerprints(recipe) == recorded
    assert {c["name"] for c in found["claims"]} == set(recipe.claims)


def test_a_key_that_came_later_leaves_finished_runs_as_they_are():
    before = fingerprints(load("mimo"))
    same = fingerprints(load("mimo", overrides=("stages.mopd.prompts.pool=0",)))
    other = fingerprints(load("mimo", overrides=("stages.mopd.prompts.pool=7",)))
    assert before == same
    assert {s for s in before if before[s] != other[s]} == {"mopd", "eval_mopd"}
    assert "pool" not in semantic(load("mimo"), "mopd")["stage"]["prompts"]
