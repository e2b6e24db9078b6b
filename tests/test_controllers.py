"""Controllers that read a step: the length limit of Prune-OPD, beside the decay that it follows."""

import json
from types import SimpleNamespace

import pytest
import torch
from one_step import First, by_transformers
from test_weights import step_of, weight

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.config.registry import member
from opdctl.config.settings import longest_turn
from opdctl.errors import Interrupted, RecipeError
from opdctl.kernels.topk import overlap_ratio
from opdctl.train.context import Context
from opdctl.train.metrics import Watch
from running import carry_out, plain

WINDOW = {"least": 2, "most": 6, "step": 1, "margin": 1}
DECAY = {"k": 4, "tau": 0.6, "drop": 0.4, "base": 0.5}
PRUNED = {
    "signals": {},
    "objectives": {"topk_pg": {"k": 6, "weights": {"overlap": DECAY}}},
    "controllers": {"length": WINDOW},
    "sampling": {"max_tokens": 3},
}


def window(start, **keys):
    """The member on a context that holds nothing but the stage's limit."""
    sampling = SimpleNamespace(max_tokens=start)
    ctx = SimpleNamespace(config=SimpleNamespace(sampling=sampling), longest=0)
    cls = member("controllers", "length")
    return cls(cls.Config(**keys), ctx, None)


# the decay -----------------------------------------------------------------------------------


def test_the_decay_by_hand():
    """tau .7, drop .25: two rollouts of five and four tokens. Bad are those below .7, not at it."""
    overlap = [1.0, 0.69, 0.7, 0.2, 0.0, 0.5, 0.5, 0.5, 0.9]
    step = step_of([5, 4], drift_overlap=overlap)
    factor_N = weight("overlap", tau=0.7, drop=0.25, base=0.5).factor(step)
    decay = [1.0, 0.75, 0.75, 0.5, 0.25, 0.75, 0.5, 0.25, 0.25]
    assert step.columns["decay"].tolist() == decay
    assert factor_N.tolist() == [d + 0.5 for d in decay]


def test_the_decay_ends_at_zero_and_the_base_stays():
    """drop .4: the third bad token would make it -.2. Without a base nothing is left."""
    overlap = [0.0, 0.0, 0.0, 1.0, 0.0]
    for base in (0.0, 0.5):
        step = step_of([5], drift_overlap=overlap)
        found = weight("overlap", drop=0.4, base=base).factor(step)
        assert found.tolist() == pytest.approx([0.6 + base, 0.2 + base, base, base, base])
        assert step.columns["decay"][2:].tolist() == [0, 0, 0]


def test_a_hundred_bad_tokens_take_everything_with_the_papers_drop():
    step = step_of([120], drift_overlap=[0.1] * 120)
    weight("overlap").factor(step)
    assert window(2048).effective(step) == [99]


def test_outside_the_nucleus_is_bad():
    """Of probabilities .5 .3 .2 the first two are the nucleus of .6: 0, .5, .8 lie above."""
    step = step_of([3], teacher_mass_above=[0.0, 0.5, 0.8])
    found = weight("overlap", by="nucleus", top_p=0.6, drop=0.5, base=0).factor(step)
    assert found.tolist() == [1, 1, 0.5]


@pytest.mark.parametrize("by", ["overlap", "nucleus"])
def test_both_numbers_are_those_of_whole_distributions(stage, by):
    """The columns that the core makes, against transformers' own forward of both models."""
    keys = {**DECAY, "by": by, "top_p": 0.5}
    objectives = {"policy_gradient": {"weights": {"overlap": keys}}}
    first = First(stage(objectives=objectives))
    teacher = next(iter(first.setup.teachers.values()))[0].model
    rows = [by_transformers(m, first.rollouts, valid_V=m.valid_V) for m in (first.model, teacher)]
    logp_NV, logq_NV = (r.detach() for r in rows)
    if by == "overlap":
        ours, theirs = (x.topk(4, -1).indices for x in (logp_NV, logq_NV))
        assert torch.equal(first.columns["drift_overlap"], overlap_ratio(ours, theirs))
        bad_N = first.columns["drift_overlap"] < 0.6
    else:
        ids_N = torch.tensor([i for r in first.rollouts for i in r.response_ids])
        ranked = logq_NV.sort(descending=True)
        before_NV = ranked.values.exp().cumsum(-1) - ranked.values.exp()
        place_N = (ranked.indices == ids_N[:, None]).nonzero()[:, 1]
        above_N = before_NV.gather(-1, place_N[:, None])[:, 0]
        assert (first.columns["teacher_mass_above"] - above_N).abs().max() < 1e-6
        bad_N = above_N >= 0.5
        assert 0 < int(bad_N.sum()) < len(bad_N)
    expected, at = [], 0
    for rollout in first.rollouts:
        so_far = bad_N[at : at + rollout.length].double().cumsum(0)
        expected += (1 - 0.4 * so_far).clamp(0, 1).tolist()
        at += rollout.length
    assert first.columns["decay"].tolist() == pytest.approx(expected)
    means = {"drift_bad": float(bad_N.double().mean())}
    if by == "overlap":
        means["drift_overlap"] = float(first.columns["drift_overlap"].mean())
    assert {k: v for k, v in first.logged.items() if k.startswith("drift")} == means
    factor = first.columns["factor.policy_gradient.overlap"]
    assert factor.tolist() == pytest.approx([d + 0.5 for d in expected])


# the window ----------------------------------------------------------------------------------


def test_the_window_by_hand():
    """Limit 5, margin 1, step 2, clamped to 3..8, hits .5, patience 2; (lengths, hits, limit)."""
    found = window(5, least=3, most=8, step=2, margin=1, hits=0.5, patience=2)
    for lengths, hits, limit in [
        ([4, 1], 0.5, 7),  # 4 is within 1 of 5, and half is enough
        ([7, 6, 5, 5], 0.5, 8),  # 9 is above the largest
        ([8, 8], 1.0, 8),
        ([6, 6], 0.0, 8),  # one miss
        ([7, 7], 1.0, 8),  # and none
        ([1, 1], 0.0, 8),
        ([1, 1], 0.0, 6),  # the second in a row
        ([4, 5, 1], 1 / 3, 6),  # the count began anew
        ([1, 1], 0.0, 4),
        ([2, 2], 0.0, 4),  # within 1 of 4 is 3
        ([2, 2], 0.0, 3),  # 2 is below the smallest
        ([2, 2], 0.0, 3),  # within 1 of 3 would be 2, and least is 3
        ([3, 2], 0.5, 5),
    ]:
        assert found.follow(lengths) == pytest.approx(hits)
        assert found.ctx.longest == limit


def test_the_papers_window():
    """Margin and step 100, a tenth of hits, three misses, from 2048."""
    found = window(2048)
    found.follow([1948.0] + [0.0] * 9)
    assert found.ctx.longest == 2148
    for _ in range(3):
        assert found.ctx.longest == 2148
        found.follow([2047.0] * 10)
    assert found.ctx.longest == 2048


def test_its_state_is_enough_to_go_on():
    found = window(6, least=1, most=9, step=1, margin=0, patience=3)
    found.follow([1.0])
    state = found.state()
    other = window(6, least=1, most=9, step=1, margin=0, patience=3)
    other.load(state)
    for member_ in (found, other):
        member_.follow([1.0])
        member_.follow([1.0])
        assert member_.ctx.longest == 5
    assert state == {"limit": 6, "misses": 1}


def test_effective_lengths_come_from_the_decay_or_are_the_lengths():
    step = step_of([3, 2], decay=[0.5, 1e-9, 0.0, 1.0, 0.3])
    assert window(4).effective(step) == [1, 2]
    assert window(4).effective(step_of([3, 2])) == [3, 2]


def test_demonstrations_are_not_counted():
    step = step_of([3, 1])
    step.rollouts[0].source = "dataset"
    found = window(3, least=1, most=9, margin=0, step=1)
    assert found.read(step) == {"limit": 3, "most": 9, "hits": 0, "effective": 1}


# in a stage ----------------------------------------------------------------------------------


def test_a_stage_samples_as_far_as_the_window_of_the_step_before(stage):
    ctx = stage(**PRUNED, steps=5)
    rows = carry_out(ctx)
    limits = [row["length_limit"] for row in rows]
    assert limits[0] == 3 and len(set(limits)) > 1
    for row, following in zip(rows, limits[1:], strict=False):
        moved = 1 if row["length_hits"] >= 0.1 else 0
        assert following == min(6, row["length_limit"] + moved)
        assert row["length_effective"] <= row["length"] <= row["length_limit"]
        assert row["length_most"] == 6
    logged = (ctx.folder / "rollouts" / "step-000005.jsonl").read_text().splitlines()
    ids = [json.loads(line)["ids"] for line in logged]
    assert max(map(len, ids)) == limits[-1] > 3  # random models do not end
    assert rows[-1]["truncated"] == sum(len(i) == limits[-1] for i in ids) / len(ids)


def stopped_at(ctx, count):
    """The stage, stopped at the count-th look at the stop flag."""
    seen = []

    def check():
        seen.append(1)
        if len(seen) == count:
            raise Interrupted("here")

    ctx.check = check
    with pytest.raises(Interrupted):
        member("stages", "opd")().run(ctx)


@pytest.mark.parametrize("count", [9, 14, 23])
def test_a_stop_anywhere_keeps_the_window(stage, count):
    """Also one after the limit of the next step was set and before the update."""
    whole = stage(**PRUNED, steps=4)
    expected = [plain(row) for row in carry_out(whole)]
    cut = stage(**PRUNED, steps=4)
    stopped_at(cut, count)
    again = Context(cut.run, cut.recipe, "it", attempt=2)
    assert [plain(row) for row in carry_out(again)] == expected
    name = "output/model.safetensors"
    assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_limit_that_narrows_is_no_collapse_and_one_that_widens_cuts_by_intent(stage):
    watch = Watch(stage(**PRUNED).config.watch, "it")
    row = {"rollouts": 4, "tokens": 40, "length": 40.0, "truncated": 0.0, "length_most": 60}
    dog = watch.dogs["length"]
    assert not dog.look({**row, "length": 9.0, "length_limit": 12}, row)
    assert (
        "of the first step's 12"
        in dog.look({**row, "length": 2.0, "length_limit": 12}, row)["collapse"]
    )
    assert not dog.look({**row, "truncated": 1.0, "length_limit": 59}, row)
    assert "limit" in dog.look({**row, "truncated": 1.0, "length_limit": 60}, row)


def test_what_looks_ahead_looks_at_the_largest_limit(stage):
    ctx = stage(**PRUNED)
    assert longest_turn(ctx.config) == 6
    assert max(r.length for r in CheckedStage(ctx).rollouts) == 6
    assert ctx.sampling.max_tokens == 3


def served(by):
    """A teacher that gives log-probs alone, and the decay."""
    objectives = {"policy_gradient": {"weights": {"overlap": {"by": by}}}}
    teachers = {"teacher": "http://127.0.0.1:1"}
    return {"teachers": teachers, "signals": {"reverse_kl": {}}, "objectives": objectives}


REFUSED = {
    "start outside": ({"sampling": {"max_tokens": 9}}, "controllers.length", "outside 2 to 6"),
    "upside down": (
        {"controllers": {"length": {**WINDOW, "least": 7}}},
        "controllers.length.least",
        "least is 7, most 6",
    ),
    "two decays": (
        {
            "objectives": {
                "topk_pg": {"weights": {"overlap": DECAY}},
                "divergence": {"direction": "forward", "weights": {"overlap": {}}},
            },
        },
        "objectives.topk_pg.weights.overlap",
        "differs from that of another objective",
    ),
    "a costly length": (
        {"signals": {"reverse_kl": {}, "outcome": {"length_penalty": 0.1, "baseline": "none"}},
         "objectives": {"policy_gradient": {}}},
        "controllers.length",
        "moves the limit by which signals.outcome.length_penalty is counted",
    ),
    "a server": (
        served("overlap"),
        "objectives.policy_gradient.weights.overlap",
        "needs teacher.topk, and teacher teacher (http://127.0.0.1:1) is behind a server",
    ),
    "no teacher's nucleus": (
        served("nucleus"),
        "objectives.policy_gradient.weights.overlap",
        "needs teacher.mass_above, and",
    ),
    "room in vllm": (
        {"runtime": {"engine": "vllm", "engine_args": {"max_model_len": 6}}},
        "runtime.engine_args.max_model_len",
        "a response of stages.it may have 6 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(stage, case):
    keys, path, what = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        stage(**{**PRUNED, **keys})
    found = {p.path.removeprefix("stages.it."): p.message for p in caught.value.problems}
    assert what in found.get(path, ""), found
