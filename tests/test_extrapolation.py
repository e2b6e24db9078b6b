"""ExOPD, its guards, and the reference: golden numbers, the fixed point, what transformers says."""

import math
from types import SimpleNamespace

import pytest
import torch
from one_step import First, by_transformers, opd, said
from test_weights import step_of

from opdctl.errors import RecipeError
from opdctl.loss.signals._cliff import threshold
from opdctl.loss.signals.extrapolation import Extrapolation
from opdctl.models.model import load


def signal(**keys):
    verdicts = SimpleNamespace(obeyed=lambda rollout: rollout.text != "thinks")
    ctx = SimpleNamespace(verdicts=verdicts)
    return Extrapolation(Extrapolation.Config(**keys), ctx)


def columns(s, t, b, **more):
    found = {"policy": s, "teacher": t, "reference": b, "teacher_weight": [1.0] * len(s)}
    return step_of([len(s)], **found | more)


def test_golden_number_and_what_lambda_one_is():
    step = columns([-1.2], [-0.7], [-1.5])
    assert signal().credit(step).tolist() == pytest.approx([0.70])
    assert signal(lam=1.0).credit(step).tolist() == pytest.approx([0.50])
    assert signal(lam=0.0).credit(step).tolist() == pytest.approx([-0.3])  # towards the reference


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.25, 3.0])
def test_the_fixed_point_is_the_extrapolated_distribution(lam):
    """There the credit is the same for every token, so its expected gradient is zero."""
    generator = torch.Generator().manual_seed(0)
    q, r = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    p = (lam * q + (1 - lam) * r).log_softmax(-1)
    found = signal(lam=lam).credit(columns(p.tolist(), q.tolist(), r.tolist()))
    assert float(found.max() - found.min()) < 1e-12
    elsewhere = signal(lam=lam).credit(columns(r.tolist(), q.tolist(), r.tolist()))
    assert float(elsewhere.max() - elsewhere.min()) > 0.1


@pytest.mark.parametrize(
    ("p", "c", "expected"),
    [
        (0.99, 5, 1.352),
        (0.999, 5, 1.233),
        (0.9999, 5, 1.175),
        (0.99, 2, 1.152),
        (0.999, 2, 1.100),
        (0.9999, 2, 1.075),
    ],
)
def test_threshold_at_a_neutral_base(p, c, expected):
    logp = torch.tensor([p], dtype=torch.float64).log()
    assert float(threshold(logp, None, c)) == pytest.approx(expected, abs=5e-4)
    half = torch.tensor([0.5], dtype=torch.float64).log()
    assert torch.allclose(threshold(logp, half, c), threshold(logp, None, c), atol=1e-9)


def test_at_the_threshold_the_tail_is_a_cth_of_the_teachers():
    p, b, c = 0.97, 0.8, 3.0
    lam = float(threshold(*(torch.tensor([x], dtype=torch.float64).log() for x in (p, b)), c))
    odds = lam * math.log(p / (1 - p)) + (1 - lam) * math.log(b / (1 - b))
    assert 1 / (1 + math.exp(odds)) == pytest.approx((1 - p) / c)
    logs = torch.tensor([0.9, 1.0, 0.999], dtype=torch.float64).log()
    above = threshold(logs, torch.tensor([0.95, 1.0, 0.2], dtype=torch.float64).log(), c)
    assert above[:2].tolist() == [math.inf, math.inf] and 1 < float(above[2]) < math.inf


def test_the_guard_caps_lambda_where_the_teacher_is_certain():
    step = columns(
        [-1.0] * 3,
        [-0.5] * 3,
        [-2.0] * 3,
        teacher_top1=[math.log(0.999), math.log(0.999), math.log(0.6)],
        reference_top1=[math.log(0.5), math.log(0.9995), math.log(0.1)],
    )
    guarded = signal(lam=2.0, guard="reference", guard_margin=0.05)
    assert guarded.strength(step.columns).tolist() == pytest.approx([1.183, 2, 2], abs=5e-4)
    assert guarded.logged["capped"] == pytest.approx(1 / 3)
    neutral = signal(lam=2.0, guard="neutral", guard_margin=0.05)
    assert neutral.strength(step.columns).tolist() == pytest.approx([1.183, 1.183, 2], abs=5e-4)
    below = signal(lam=0.5, guard="neutral").strength(step.columns).tolist()
    assert below == [0.5] * 3  # it interpolates: nothing to cap


def test_the_format_watch_lowers_lambda_and_remembers():
    watch = signal(lam=1.4, format_drop=0.2, format_steps=2)

    def lam(bad):
        step = step_of([1] * 4, policy=[0.0] * 4, teacher=[0.0] * 4, reference=[0.0] * 4)
        step.columns["teacher_weight"] = torch.ones(4)
        for i, rollout in enumerate(step.rollouts):
            rollout.truncated, rollout.text = i < bad, "thinks" if i == 3 and bad == 3 else ""
        watch.credit(step)
        return round(watch.logged["lambda"], 6)

    assert [lam(1), lam(1), lam(2)] == [1.4, 1.4, 1.4]
    kept = watch.state()
    assert lam(3) == 1.2 and watch.logged["well_formed"] == 0.0
    assert [lam(1), lam(2)] == [1.2, 1.2]  # for good; the count began again
    watch.load(kept)
    assert lam(1) == 1.4  # a step that is well formed ends the row
    assert lam(2) == 1.4 and lam(2) == 1.2


def test_the_reference_is_scored_as_transformers_does(on_disk, tmp_path):
    keys = {"signals": {"extrapolation": {"guard": "reference"}}, "reference": str(on_disk / "u")}
    first = First(opd(on_disk, tmp_path, **keys))
    model, teacher = load(str(on_disk / "u")), load(str(on_disk / "t"))
    rows = by_transformers(model, first.rollouts).detach()
    assert torch.allclose(first.columns["reference"], said(rows, first.rollouts), atol=1e-5)
    modal = by_transformers(teacher, first.rollouts).detach().max(-1)
    assert torch.allclose(first.columns["teacher_top1"], modal.values, atol=1e-5)
    there = rows.gather(-1, modal.indices[:, None])[:, 0]
    assert torch.allclose(first.columns["reference_top1"], there, atol=1e-5)


def test_the_students_start_is_a_reference(on_disk, tmp_path):
    keys = {"signals": {"extrapolation": {}}, "reference": "policy"}
    columns = First(opd(on_disk, tmp_path, **keys)).columns
    assert torch.equal(columns["reference"], columns["policy"])
    expected = 1.25 * (columns["teacher"] - columns["policy"])
    assert torch.allclose(columns["advantage"], expected, atol=1e-6)


def test_a_reference_that_is_the_teacher_is_refused_and_keys_that_do_nothing_are_noted(
    on_disk, tmp_path
):
    with pytest.raises(RecipeError, match="there is no gain to scale"):
        opd(on_disk, tmp_path, signals={"extrapolation": {}}, reference=str(on_disk / "t"))

    def noted(**keys):
        given = {"signals": {"extrapolation": keys}, "reference": str(on_disk / "u")}
        notes = opd(on_disk, tmp_path, **given).recipe.notes()
        return {n.path.rpartition("extrapolation.")[2] for n in notes if "extrapolation" in n.path}

    assert noted() == noted(guard="neutral", guard_clip=4.0, format_drop=0.1) == set()
    assert noted(lam=1.0) == {"lam"}
    assert noted(guard_clip=4.0, guard_above=0.5, format_steps=2) == {
        "guard_clip",
        "guard_above",
        "format_steps",
    }
