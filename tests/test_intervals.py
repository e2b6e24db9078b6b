"""Coverage of the intervals over prompts and seeds, by simulation; and their ends."""

import math

import numpy as np
import pytest

from opdctl.evidence.judge import _decide
from opdctl.evidence.measured import Measured
from opdctl.evidence.verdict import Condition, format_estimate, verdict
from opdctl.intervals import Z, mean_ends, resampled_ends, share_ends, student, wilson

NOMINAL = 0.95


def verdicts(rng, tries, seeds, prompts, p, spread=0.0, samples=1, shared=False):
    """Shares of right samples, [tries, prompts] for each seed; on average they are p.

    A seed moves the chance of a right answer by at most ``spread``. Where prompts are shared, half
    of them are decided by the prompt alone, the same on every seed.
    """
    move = spread * rng.triangular(-1, 0, 1, (tries, seeds, 1))
    chance = np.clip(np.broadcast_to(p + move, (tries, seeds, prompts)), 0, 1)
    if shared:
        easy = rng.random((tries, 1, prompts)) < chance  # right for sure, or wrong
        chance = np.where(rng.random((tries, 1, prompts)) < 0.5, easy, chance)
    return list(np.moveaxis(rng.binomial(samples, chance) / samples, 1, 0))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("p", [0.03, 0.5, 0.97])
@pytest.mark.parametrize(
    ("seeds", "prompts"), [(1, 20), (1, 100), (2, 4), (2, 20), (5, 20), (5, 100), (5, 500)]
)
def test_coverage_of_a_share(seeds, prompts, p, shared):
    """Nominal .95, within what this many tries can tell: three standard errors."""
    rng, tries = np.random.default_rng(seeds * prompts), 150_000 // (seeds * prompts * 3) + 200
    allowed = 3 * math.sqrt(NOMINAL * (1 - NOMINAL) / tries)
    for spread in (0.0, 0.02, 0.3) if p == 0.5 else (0.0, 0.02):
        for samples in (1, 4):
            of_seeds = verdicts(
                rng, tries, seeds, prompts, p, spread if seeds > 1 else 0.0, samples, shared
            )
            low, high = share_ends(of_seeds)
            assert (low >= 0).all() and (low <= high).all() and (high <= 1).all()
            covered = float(((low <= p) & (p <= high)).mean())
            assert covered > NOMINAL - allowed - 0.01, (spread, samples, covered)


@pytest.mark.parametrize(
    ("seeds", "prompts", "p", "better", "spread"),
    [
        (1, 20, 0.03, 0.0, 0.0),
        (2, 4, 0.5, 0.0, 0.0),
        (2, 20, 0.5, 0.1, 0.1),
        (5, 20, 0.9, 0.05, 0.05),
    ],
)
def test_coverage_of_a_paired_difference(seeds, prompts, p, better, spread):
    """Two models answer the same prompts on every seed; the seed moves one of them."""
    rng, tries, covered, decided = np.random.default_rng(prompts), 200, 0, 0
    condition = Condition("gain", lambda s: s["x", "d"] - s["y", "d"], least=better, delta=0.0)
    for _ in range(tries):
        hard, runs = rng.random(prompts), []
        for _ in range(seeds):
            move = spread * rng.uniform(-1, 1)
            same = rng.random(prompts) < 0.5  # of both models: the prompt alone decides
            draws = [np.where(same, hard, rng.random(prompts)) for _ in range(2)]
            right = [draws[0] < p + better + move, draws[1] < p]
            runs.append(
                Measured({(m, "d"): r.astype(float) for m, r in zip("xy", right, strict=True)})
            )
        result = _decide([condition], runs)
        low, high = result["interval"]["gain"]
        covered += low - 1e-9 <= better <= high + 1e-9
        decided += result["holds"] is False
    allowed = 3 * math.sqrt(NOMINAL * (1 - NOMINAL) / tries)
    assert covered / tries > NOMINAL - allowed and decided / tries < 0.025 + allowed


def measured(**right):
    return Measured({(m, "d"): np.array(r, float) for m, r in right.items()})


def test_seeds_that_agree_leave_the_width_of_the_prompts():
    """2 seeds x 4 prompts, the same 2 right on both: no certainty in either direction."""
    runs = [measured(x=[1, 1, 0, 0]), measured(x=[1, 0, 1, 0])]
    for least in (0.3, 0.7):
        (condition,) = [Condition("s", lambda s: s["x", "d"], least=least)]
        result = _decide([condition], runs)
        low, high = result["interval"]["s"]
        assert result["holds"] is None and low < 0.3 and high > 0.7
    alike = [np.array([1.0, 1, 0, 0])] * 2
    assert share_ends(alike) == pytest.approx(wilson(0.5, 4)), "the prompts are the same"
    none = [np.zeros(20)] * 5
    assert share_ends(none) == pytest.approx(wilson(0.0, 20))


def test_a_share_of_one_seed_is_wilsons_and_of_several_students():
    for right in (0, 3, 20):
        ends = share_ends([np.array([1.0] * right + [0.0] * (20 - right))])
        assert list(map(float, ends)) == wilson(right / 20, 20)
    scores = [np.full(1000, s) for s in (0.80, 0.85, 0.90)]
    half = 4.303 * 0.05 / math.sqrt(3)
    assert mean_ends(scores) == pytest.approx((0.85 - half, 0.85 + half))
    low, high = map(float, share_ends(scores))  # the same, bent to stay within 0 and 1
    k = half**2 / (0.85 * 0.15)
    assert (0.85 - low) ** 2 == pytest.approx(k * low * (1 - low), rel=0.01)
    assert (high - 0.85) ** 2 == pytest.approx(k * high * (1 - high), rel=0.01)


def test_samples_of_a_prompt_count_as_much_as_they_differ():
    together, apart = [1.0] * 10 + [0.0] * 10, [0.5] * 20
    widths = [float(np.diff(share_ends([np.array(v)]))[0]) for v in (together, apart)]
    assert widths[0] == pytest.approx(float(np.diff(wilson(0.5, 20))[0])) and 0 < widths[1] < 0.2


def test_quantiles_of_student():
    for free, value in ((1, 12.706), (4, 2.776), (30, 2.042), (60, 2.000), (499, 1.965)):
        assert float(student(free)) == pytest.approx(value, abs=6e-4)
    assert float(student(math.inf)) == Z and 2.776 < float(student(3.5)) < 3.182


def test_an_interval_contains_its_estimate_and_is_unbounded_where_a_number_is_not_finite():
    for right in ([0] * 20, [1] * 20, [1] + [0] * 19):
        for runs in ([measured(x=right)], [measured(x=right)] * 2):
            result = _decide([Condition("s", lambda s: s["x", "d"])], runs)
            low, high = result["interval"]["s"]
            assert low <= result["measured"]["s"] <= high and high - low > 0.05
    same = measured(x=[1, 0, 1, 0], y=[1, 0, 1, 0])
    low, high = _decide([Condition("s", lambda s: s["x", "d"] - s["y", "d"])], [same])["interval"][
        "s"
    ]
    assert low < -0.1 and high > 0.1, "equal answers to 4 prompts"
    each, drawn = np.array([1.0, 2.0]), np.full((2, 40), 1.5)
    drawn[0, :3] = np.nan
    assert resampled_ends(each, drawn) == (-math.inf, math.inf)
    assert resampled_ends(np.array([1.0, math.nan]), drawn) == (-math.inf, math.inf)
    ratio = Condition("r", lambda s: s["x", "d"] / (s["y", "d"] - s["y", "d"]), most=2.0)
    assert _decide([ratio], [same])["holds"] is None


@pytest.mark.parametrize("touches", [False, True])
@pytest.mark.parametrize("wrong", [(math.nan,) * 3, (0.5, math.nan, 0.6), (math.nan, 0.4, 0.6)])
def test_no_number_is_no_verdict(wrong, touches):
    assert verdict(Condition("x", lambda s: 0, least=0.5, touches=touches), *wrong) is None
    assert verdict(Condition("x", lambda s: 0, most=0.5, touches=touches), *wrong) is None
    unbounded = (0.5, -math.inf, math.inf)
    assert verdict(Condition("x", lambda s: 0, least=0.5, touches=touches), *unbounded) is None


def test_a_number_at_its_threshold_meets_it():
    below = 0.62 - 0.65  # -.030000000000000027
    kept = Condition("x", lambda s: 0, least=-0.03, delta=0.0)
    assert verdict(kept, below, below, below) is True and below < -0.03
    assert verdict(kept, -0.031, -0.031, -0.031) is False
    most = Condition("x", lambda s: 0, most=0.3, delta=0.0)
    assert verdict(most, 0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2) is True and 0.1 + 0.2 > 0.3
    more = Condition("x", lambda s: 0, least=1e-6, delta=0.0)
    assert verdict(more, 0.0, 0.0, 0.0) is False


def test_one_way_to_write_an_interval():
    assert format_estimate(0.25, [0.2, 0.31]) == "0.250 [0.200, 0.310]"
    assert format_estimate(-0.0, [-1e-05, 2e-05]) == "0.000 [-1.0e-05, 2.0e-05]"
    assert format_estimate(None, [None, None]) == "? [?, ?]"
    assert format_estimate(0.5, [-math.inf, math.inf]) == "0.500 [-inf, inf]"
