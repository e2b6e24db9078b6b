"""Every method of ``opdctl/methods``: listed with its paper, shown, run; nonsense is refused."""

import math

import pytest
from one_step import prompts

from opdctl.cli.catalogue import detail, listing
from opdctl.config.registry import member
from opdctl.errors import RecipeError
from opdctl.recipe.methods import method, methods
from opdctl.run.rundir import read_json
from running import carry_out, one_stage

TINY = {  # what methods/NAME.yaml says of answers of a few tokens
    "effopd": {"controllers": {"extrapolate": {"size": 6}}},
    "oprd_bridge": {
        "objectives": {"bridge": {"tokens": 30, "weights": {"window": {"last": 2000}}}}
    },
    "prune_opd": {"controllers": {"length": {"least": 2, "most": 7, "step": 1, "margin": 1}}},
}


def stage_of(on_disk, folder, name, **keys):
    """Context of two steps of a method on the models of ``on_disk``."""
    entry = {k: v for k, v in method(name).items() if k != "about"}
    kind = entry.setdefault("kind", "opd")
    entry |= {"student": str(on_disk / "s"), "steps": 2, **TINY.get(name, {})}
    entry["prompts"] = {**entry.get("prompts", {}), "per_step": 3}
    entry["sampling"] = {**entry.get("sampling", {}), "max_tokens": 5}
    if kind == "opd":
        entry["teachers"] = {"sums": str(on_disk / "t")}
    return one_stage(folder, {"sums": prompts(on_disk)}, **entry | keys)


@pytest.mark.parametrize("name", methods())
def test_a_method_runs(name, on_disk, tmp_path):
    rows = carry_out(stage_of(on_disk, tmp_path / "run", name))
    assert len(rows) == 2
    for row in rows:
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        assert "skipped" not in row and "non_finite" not in row
        # of samples that are not the student's own the trainer has another distribution
        assert "sources" not in method(name) or "logprob_gap" not in row


def test_a_method_is_listed_with_its_paper_and_shown():
    for row in listing("methods"):
        assert "arXiv" in row["about"] or "thinkingmachines.ai" in row["about"], row
        assert "\n" not in row["about"], row
        shown = detail(row["name"])
        assert "objectives" in shown["text"] or "sources" in shown["text"]


def refused(on_disk, folder, **keys):
    """What an opd stage of these keys is refused for: {path: message}."""
    with pytest.raises(RecipeError) as caught:
        stage_of(on_disk, folder, "mopd", **keys)
    return {p.path.removeprefix("stages.it."): p.message for p in caught.value.problems}


PG = {"policy_gradient": {}}
TWICE = "has the gradient of the reverse KL to the teacher, which {} has too"
NONSENSE = {
    "two objectives": (
        {"signals": {"reverse_kl": {}}, "objectives": {**PG, "divergence": {}}},
        "objectives.divergence",
        TWICE.format("objectives.policy_gradient"),
    ),
    "right and wrong at once": (
        {
            "signals": {},
            "objectives": {
                "divergence": {"weights": {"outcome_gate": {}, "scope": {"path": "right"}}}
            },
        },
        "objectives.divergence.weights",
        "outcome_gate of wrong rollouts and scope of right rollouts: nothing is left",
    ),
    "a cap for another clip": (
        {
            "reference": "policy",
            "signals": {"extrapolation": {"guard": "neutral", "guard_clip": 4.0}},
            "objectives": {"policy_gradient": {"weights": {"truncated": {"cap": 5.0}}}},
        },
        "signals.extrapolation.guard_clip",
        "the cap of lambda is for a clip of 4, objectives.policy_gradient clips at 5",
    ),
    "states twice": (
        {"signals": {}, "objectives": {"hidden": {}, "bridge": {"rank": 4}}},
        "objectives.bridge",
        "brings the student's states to the teacher's, as objectives.hidden does",
    ),
    "away from the teacher": (
        {"signals": {}, "objectives": {"divergence": {"coef": -1.0}}},
        "objectives.divergence.coef",
        "-1.0 is below 0.0",
    ),
    "more directions than numbers": (
        {"signals": {}, "objectives": {"bridge": {"rank": 40}}},
        "objectives.bridge.rank",
        "40 directions, and a side has 32 numbers",
    ),
    "no such layer": (
        {"signals": {}, "objectives": {"hidden": {"layers": [1, 9]}}},
        "objectives.hidden.layers",
        "[1, 9], and the student has the layers 1 to 2",
    ),
    "a reference for nothing": (
        {"reference": "policy"},
        "reference",
        "nothing here measures from it",
    ),
    "two samples of it": (
        {"signals": {}, "objectives": {"topk_tail": {}, "sampled_kl": {}}},
        "objectives.sampled_kl",
        TWICE.format("objectives.topk_tail"),
    ),
    "imitates itself": (
        {"signals": {}, "objectives": {"nll": {}}},
        "objectives.nll",
        "imitation of the student's own samples has no gradient on average",
    ),
    "imitates its failures": (
        {"signals": {}, "objectives": {"nll": {"weights": {"outcome_gate": {}}}}},
        "objectives.nll",
        "imitates the student's own failures",
    ),
    "half of a sequence's KL": (
        {"signals": {"return_to_go": {"own": False}}, "objectives": PG},
        "signals.return_to_go.own",
        "without the token's own part the gradient lacks its single-step term",
    ),
    "a jsd that is the reverse KL": (
        {
            "signals": {"reverse_kl": {}},
            "objectives": {**PG, "divergence": {"direction": "jsd", "beta": 1.0}},
        },
        "objectives.divergence",
        TWICE.format("objectives.policy_gradient"),
    ),
    "floors differ": (
        {
            "signals": {"reverse_kl": {"floor": 0.2}},
            "objectives": {"policy_gradient": {"weights": {"reopold": {}}}},
        },
        "objectives.policy_gradient.weights.reopold.floor",
        "the reward's floor is 0.2, the mask's 0.1",
    ),
    "no reference": (
        {"signals": {"extrapolation": {}}, "objectives": PG},
        "signals.extrapolation",
        "needs reference.logprobs, which nothing here provides",
    ),
    "two signals": (
        {"signals": {"reverse_kl": {}, "extrapolation": {}}, "reference": "policy"},
        "signals.extrapolation",
        TWICE.format("signals.reverse_kl"),
    ),
    "shares": (
        {
            "sources": {"mixture": {"student": 0.9}},
            "signals": {},
            "objectives": {"divergence": {}},
        },
        "sources.mixture",
        "the shares sum to 1.4",
    ),
    "gradient of the policy on the data": (
        {"sources": {"mixture": {}}, "objectives": {"policy_gradient": {"weights": {}}}},
        "objectives.policy_gradient",
        "holds for the student's own samples, and sources.mixture mixes in others",
    ),
    "no importance weight": (
        {"sources": {"teacher_mixed": {}}, "objectives": {"policy_gradient": {"weights": {}}}},
        "objectives.policy_gradient",
        "holds for the student's own samples, and sources.teacher_mixed mixes in others",
    ),
    "imitates itself in part": (
        {"sources": {"mixture": {}}, "signals": {}, "objectives": {"nll": {}}},
        "objectives.nll",
        "imitation of the student's own samples has no gradient on average",
    ),
    "a source of another kind of stage": (
        {"sources": {"dataset": {}}, "signals": {}, "objectives": {"divergence": {}}},
        "sources.dataset",
        "a part of a mixture here",
    ),
    "another temperature": (
        {"loss_temperature": 0.5, "objectives": {"policy_gradient": {"weights": {}}}},
        "objectives.policy_gradient",
        "its expectation is over what was sampled, at another temperature than the loss",
    ),
    "truncated, reverse": (
        {
            "signals": {},
            "objectives": {"divergence": {"support": "topk_teacher", "form": "truncated"}},
        },
        "objectives.divergence.form",
        "the reverse direction to a truncated teacher has no finite value",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_a_combination_without_sense_is_refused(case, on_disk, tmp_path):
    keys, path, message = NONSENSE[case]
    assert refused(on_disk, tmp_path / "run", **keys) == {path: message}


def test_keys_of_a_weight_that_nothing_reads_are_noted(on_disk, tmp_path):
    def noted(**keys):
        objectives = {"topk_pg": {"k": 4, "weights": {"overlap": keys}}}
        ctx = stage_of(on_disk, tmp_path / str(keys), "mopd", signals={}, objectives=objectives)
        start = "stages.it.objectives.topk_pg.weights.overlap."
        return {n.path.removeprefix(start): n.message for n in ctx.recipe.notes()}

    assert noted() == {} and noted(by="nucleus") == {}
    assert noted(top_p=0.5) == {"top_p": "is not read where a token is bad by overlap"}
    assert noted(by="nucleus", tau=0.2) == {"tau": "is not read where a token is bad by nucleus"}
    assert noted(tau=0.0) == {"tau": "0: nothing ever decays"}
    assert noted(drop=0.0) == {"drop": "0: nothing ever decays"}


def test_one_kl_on_two_sides_of_the_outcome_is_allowed(on_disk, tmp_path):
    sides = {
        "policy_gradient": {"weights": {"outcome_gate": {"on": "right"}}},
        "divergence": {"weights": {"outcome_gate": {"on": "wrong"}}},
    }
    stage_of(on_disk, tmp_path / "run", "mopd", signals={"reverse_kl": {}}, objectives=sides)


def test_a_weight_that_needs_logits_is_refused_where_a_teacher_gives_log_probs_alone():
    """A teacher that provides log-probs of the samples and nothing else."""
    from opdctl.config.schema import build
    from opdctl.recipe.recipe import lookup
    from opdctl.stages.rl import member_problems

    found: list = []
    keys = {
        "kind": "opd",
        "student": "a/s",
        "objectives": {"policy_gradient": {"weights": {"confidence": {}, "tip": {}}}},
    }
    config = build(lookup("stages", "opd"), keys, "", found, lookup)
    assert not found
    problems = member_problems(config, {"teacher.logprobs"})
    assert {(p.path, p.message) for p in problems} == {
        (
            "objectives.policy_gradient.weights.confidence",
            "needs teacher.entropy, which nothing here provides",
        ),
        (
            "objectives.policy_gradient.weights.tip",
            "needs teacher.hidden, which nothing here provides",
        ),
        (
            "objectives.policy_gradient.weights.tip",
            "needs policy.kl, which nothing here provides",
        ),
    }


def test_a_mixture_by_token_is_refused_on_an_engine_that_cannot():
    from types import SimpleNamespace

    from opdctl.config.schema import build
    from opdctl.recipe.recipe import lookup
    from opdctl.stages._combinations import source_problems

    keys = {"kind": "opd", "student": "a/s", "sources": {"teacher_mixed": {}}}
    config = build(lookup("stages", "opd"), keys, "", [], lookup)
    for engine, expected in (("transformers", []), ("vllm", ["sources.teacher_mixed"])):
        recipe = SimpleNamespace(runtime=SimpleNamespace(engine=engine))
        found = source_problems(config, recipe)
        assert [p.path for p in found] == expected
        assert all("vllm cannot" in p.message for p in found)


def test_baseline_of_vopd_full_and_on_the_top(on_disk, tmp_path):
    """The credit is the log-ratio plus the exact KL of the token; the top one's is the renormalised
    KL on the student's own ids. That its mean is zero: test_sampled.py."""
    import torch
    from one_step import First, by_transformers

    from opdctl.models.model import load

    for top in (0, 4):
        keys = method("vopd")
        given = {"support": "topk_student", "k": top} if top else {}
        signals = {**keys["signals"], "kl_baseline": given}
        ctx = stage_of(on_disk, tmp_path / str(top), "vopd", signals=signals)
        first = First(ctx)
        p, q = (by_transformers(load(str(on_disk / m)), first.rollouts).detach() for m in "st")
        if top:
            ids = p.topk(top).indices
            p, q = (x.gather(-1, ids).log_softmax(-1) for x in (p, q))
        kl = (p.exp() * (p - q)).sum(-1)
        columns = first.columns
        assert first.step.steps == 2 and first.step.done == 0
        expected = columns["teacher"] - columns["policy"] + kl
        assert torch.allclose(columns["advantage"], expected, atol=1e-4)


def test_what_a_signal_remembers_is_in_the_checkpoint(on_disk, tmp_path):
    """A stage that is stopped between a credit and its update, and resumed, is as one that never
    was: the step is taken again."""
    import sys

    from opdctl.errors import Interrupted
    from opdctl.train.context import Context
    from running import plain

    class Stopped(Context):
        left = 10**9

        def check(self):
            self.left -= sys._getframe(1).f_code.co_name == "_update"  # the credit is given
            if self.left < 0:
                raise Interrupted("stopped as asked")

    signals = {"extrapolation": {"lam": 2.0, "format_drop": 0.01, "format_steps": 1}}
    keys = {"signals": signals, "steps": 5, "context": Stopped}
    whole = carry_out(stage_of(on_disk, tmp_path / "whole", "exopd", **keys))
    lambdas = [row["extrapolation_lambda"] for row in whole]
    assert len(set(lambdas)) > 2, lambdas
    ctx = stage_of(on_disk, tmp_path / "cut", "exopd", **keys)
    rows, attempts = [], 0
    while len(rows) < 5:
        attempts += 1
        again = Stopped(ctx.run, ctx.recipe, "it", attempt=attempts)
        again.left = 1
        try:
            rows = carry_out(again)
        except Interrupted:
            rows = []
    assert attempts > 2
    drop = ("attempt", "memory_mib", "kernel")
    for a, b in zip(whole, rows, strict=True):
        a, b = ({k: v for k, v in plain(r).items() if k not in drop} for r in (a, b))
        assert a == b


@pytest.mark.parametrize("name", ["eopd", "exopd", "gkd", "minillm", "dagger", "scope"])
def test_the_measured_gradient_is_the_one_that_the_stage_descends(on_disk, tmp_path, name):
    """Sum of objectives, source, reference and temperature included: the first batch's norm."""
    known = member("stages", "gradients").Config.__dataclass_fields__
    minibatches = {"minibatches": 1} if "minibatches" in method(name) else {}
    stage = stage_of(on_disk, tmp_path / "opd", name, seed_group="one", **minibatches)
    entry = {k: v for k, v in stage.recipe.to_dict()["stages"]["it"].items() if k in known}
    entry |= {"kind": "gradients", "batches": 2, "together": True}
    measured = one_stage(tmp_path / "all", {"sums": prompts(on_disk)}, **entry)
    (ours, _), (theirs, _) = carry_out(measured), carry_out(stage)
    assert ours["grad_norm"]["their sum"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    facts = read_json(measured.folder / "facts.json")
    assert facts["variance of their sum"] > 0
    if name in ("eopd", "minillm"):
        alone = [v for k, v in ours["grad_norm"].items() if k != "their sum"]
        assert len(alone) == 2 and min(abs(theirs["grad_norm"] - v) for v in alone) > 1e-3


def test_gradients_of_one_objective_are_measured_together_only(on_disk, tmp_path):
    keys = {"kind": "gradients", "student": str(on_disk / "s"), "teachers": {"sums": "policy"}}
    keys |= {"signals": {}, "objectives": {"divergence": {}}}
    with pytest.raises(RecipeError) as caught:
        one_stage(tmp_path / "run", {"sums": prompts(on_disk)}, **keys)
    assert caught.value.problems[0].path == "stages.it.objectives"
    one_stage(tmp_path / "run", {"sums": prompts(on_disk)}, **keys, together=True)
    keys |= {"signals": {"reverse_kl": {}}, "objectives": {"policy_gradient": {}, "divergence": {}}}
    one_stage(tmp_path / "two", {"sums": prompts(on_disk)}, **keys)
    with pytest.raises(RecipeError) as caught:  # one KL twice, as in the opd stage
        one_stage(tmp_path / "sum", {"sums": prompts(on_disk)}, **keys, together=True)
    assert "which objectives.policy_gradient has too" in str(caught.value)
    keys |= {"sources": {"mixture": {"student": 0.5, "dataset": 0.5}}}
    with pytest.raises(RecipeError) as caught:  # neither is one of them right on others' samples
        one_stage(tmp_path / "others", {"sums": prompts(on_disk)}, **keys)
    assert "holds for the student's own samples" in str(caught.value)
