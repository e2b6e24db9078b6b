"""The bug list, first part: scores, counts and samples that were wrong elsewhere while the loss
went down.

One test per failure; its docstring says where it happened. Each runs the product as a stage does.
The other parts: test_known_failures_gradients.py and test_known_failures_runs.py.
"""

import pytest
import torch
from one_step import WITH_TEACHER, First, apart, by_transformers, prompts, refused, said

from opdctl.kernels.reference import divergence
from opdctl.models.model import load, save
from opdctl.rollout.prompts import PromptOrder
from opdctl.scoring.score import score
from opdctl.train.score_step import set_advantage
from opdctl.types import ScoreRequest
from running import carry_out, one_stage

# What a teacher says


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_teacher_log_probs_off_by_one(stage, on_disk, max_tokens):
    """AReaL #1728 (one-token answers too), slime #1085 and #1135, verl #7514, RLCSD #6.

    Teacher = student is exactly zero, another teacher is transformers' own forward, and scores
    rolled by one token are loud.
    """
    keys = {"sampling": {"max_tokens": max_tokens}}
    same = First(stage(teacher="policy", **keys))
    assert not same.columns["advantage"].any() and same.logged["reverse_kl_std"] == 0
    other = First(stage(**keys))
    theirs = by_transformers(load(on_disk / "t"), other.rollouts)
    assert (other.columns["teacher"] - said(theirs, other.rollouts)).abs().max() < 1e-4
    same.columns["teacher"] = same.columns["teacher"].roll(1)
    assert set_advantage(same.step, same.setup.signals)["reverse_kl_std"] > 0.3


def test_one_token_answers_lose_all_signal(stage):
    """AReaL #1729."""
    short = First(stage(sampling={"max_tokens": 1}))
    assert {r.length for r in short.rollouts} == {1}
    assert short.columns["advantage"].abs().min() > 1e-3
    alone = [short.gradient([i])[1].norm() for i in range(len(short.rollouts))]
    assert min(alone) > 1e-3


def test_scores_reach_the_wrong_rollout(stage, on_disk):
    """EasyDistill 1.0 read stored logits by the number of the step, which a shuffle breaks."""
    sums = prompts(on_disk)
    keys = {"minibatches": 3, "prompts": {"per_step": 12}, "optim": {"lr": 0.0}}
    keys |= {"teachers": {"a": str(on_disk / "s"), "b": str(on_disk / "t")}}
    data, runtime = {"a": sums, "b": sums}, {"micro_batch": 2}
    ctx = stage(data=data, runtime=runtime, **WITH_TEACHER["reverse"], **keys)
    for row in carry_out(ctx):  # the student's own domain and the other's, however they are mixed
        assert row["divergence_by_domain"]["a"] < 1e-6 < 0.1 < row["divergence_by_domain"]["b"]


def test_a_teacher_is_shown_another_prompt(stage, on_disk, tmp_path):
    """tinker-cookbook #796: two renderers cost .29 nat a token. Ours scores the student's ids."""
    other = load(on_disk / "t")
    other.tokenizer.chat_template = "{% for m in messages %}9{{ m.content }}{% endfor %}="
    save(other, tmp_path / "t")
    plain, chat = (First(stage(teacher=t)) for t in ("t", tmp_path / "t"))
    assert load(tmp_path / "t").render("1+1=") != load(on_disk / "t").render("1+1=")
    assert torch.equal(plain.columns["teacher"], chat.columns["teacher"])


def test_padded_vocabularies_leak_mass(stage, on_disk, tmp_path):
    """LMOps #286, TRL #2215: rows beyond the tokenizer's ids; filled with zeros by Liger, with the
    other model's logits by ms-swift."""
    for name in ("one", "other"):
        wide = load(on_disk / "s")
        ids = wide.valid_V
        wide.net.resize_token_embeddings(ids + 8)
        with torch.no_grad():  # the tied head would give them nearly all of the mass
            wide.net.get_input_embeddings().weight[ids:] = 30 * torch.randn(8, 32)
        save(wide, tmp_path / name)
    for student, teacher in (("one", "other"), ("one", "s"), ("s", "one")):
        at = {n: on_disk / n if n == "s" else tmp_path / n for n in (student, teacher)}
        keys = {"student": at[student], "teacher": at[teacher], **WITH_TEACHER["reverse"]}
        first = First(stage(**keys))
        assert max(i for r in first.rollouts for i in r.response_ids) < ids
        assert first.gradient()[2]["divergence"].max() < 1e-5


# What a loss is divided by


def test_the_denominator_counts_an_answer_that_is_not_used(stage, on_disk):
    """TRL #4719, #5653, #5669: GKD divided 48 sampled tokens by 12 or by 136."""
    found = []
    for column in ("answer", "long"):
        rows = carry_out(stage(data={"sums": prompts(on_disk, column)}))
        found.append([(r["loss"], r["grad_norm"], r["tokens"]) for r in rows])
    assert found[0] == found[1]


@pytest.mark.parametrize("normalise", ["seq_mean", "token_mean", "domain_mean"])
def test_the_loss_is_scaled_by_the_number_of_micro_batches(stage, normalise):
    """verl #7200 (8 times), TRL #6006, ms-swift #10104; GRPO-Zero reports the last one's loss."""
    objective = {"divergence": {"normalise": normalise}}
    first = First(stage(signals={}, objectives=objective))
    loss, whole, _ = first.gradient()
    for size in (1, 4):
        other_loss, other, _ = first.gradient(micro_batch=size)
        assert other_loss == pytest.approx(loss, rel=1e-5) and apart(other, whole) < 1e-4


def test_weights_by_the_padded_length(stage):
    """A response counts by its own tokens, however long the longest of its batch is."""
    first = First(stage(prompts={"per_step": 12}))
    order = sorted(range(12), key=lambda i: first.rollouts[i].length)
    both = [order[0], order[-1]]
    assert first.rollouts[both[0]].length < first.rollouts[both[1]].length
    alone = [first.gradient([i])[1] for i in both]
    assert apart(first.gradient(both)[1], sum(alone) / 2) < 1e-4


def test_a_rank_without_tokens(stage):
    """prime-rl: it must run backward, or all others wait for it. A micro-batch of ours does."""
    first = First(stage())
    loss, expected, _ = first.gradient(micro_batch=1)
    context = first.spans[0].ids
    first.spans.insert(0, ScoreRequest(context, len(context)))
    other_loss, found, _ = first.gradient(micro_batch=1)
    assert other_loss == pytest.approx(loss, rel=1e-6) and apart(found, expected) < 1e-6
    loss, alone, _ = first.gradient([0])
    assert loss == 0 and not alone.any()


def test_ragged_batches_give_nan(stage):
    """TRL #5594: padding reached the loss. Ours neither samples nor scores by its neighbours."""
    together, single = (First(stage(runtime={"rollout_batch": w})) for w in (12, 1))
    assert together.spans == single.spans and len({len(s.ids) for s in single.spans}) > 2
    alone = [score(single.model, [s]).logprobs_N for s in single.spans]
    assert (together.columns["policy"] - torch.cat(alone)).abs().max() < 1e-4


# Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_temperature_that_is_declared_and_not_used(stage, on_disk, temperature):
    """tinker-cookbook, slime #2085 and #2325, verl #6867; TRL's GKD in the loss."""
    keys = {"objectives": {"policy_gradient": {}, "divergence": {"direction": "forward"}}}
    sampling = {"temperature": temperature, "max_tokens": 6}
    first = First(stage(sampling=sampling, **keys))
    models = {"student": first.model, "teacher": load(on_disk / "t")}
    log = {n: by_transformers(m, first.rollouts, temperature).detach() for n, m in models.items()}
    for name, model in (("behaviour", "student"), ("policy", "student"), ("teacher", "teacher")):
        expected = said(log[model], first.rollouts)
        assert (first.columns[name] - expected).abs().max() < 1e-4, name
    table = first.gradient()[2]
    expected = divergence(log["student"], log["teacher"], "forward")
    assert (table["divergence"] - expected).abs().max() < 1e-4
    assert (table["ratio"] - 1).abs().max() < 1e-4


@pytest.mark.parametrize("key", ["top_p", "top_k", "min_p", "min_tokens"])
def test_ratios_biased_by_a_truncated_sampler(stage, key):
    """TRL #6789: the engine renormalises what it cut, the trainer does not. Refused with why."""
    problem = refused(stage, sampling={"max_tokens": 6, key: 0.9})
    assert problem.path == f"stages.it.sampling.{key}"
    assert "the whole distribution is sampled" in problem.hint


def test_labels_that_are_not_shifted(stage, on_disk, tmp_path):
    """ms-swift #8436. The first loss of an sft stage is transformers' own."""
    sft = {"kind": "sft", "student": str(on_disk / "s"), "steps": 1, "prompts": {"per_step": 6}}
    ctx = one_stage(tmp_path / "run", {"sums": prompts(on_disk)}, **sft)
    (row,) = carry_out(ctx)
    model, total, count = load(on_disk / "s"), 0.0, 0
    for prompt in PromptOrder(ctx, model).at(0):
        ids, answer = model.render(prompt.text), model.encode(prompt.answer)
        labels = torch.tensor([[-100] * len(ids) + answer])
        loss = model.net(torch.tensor([ids + answer]), labels=labels).loss
        total, count = total + loss.item() * len(answer), count + len(answer)
    assert row["loss"] == pytest.approx(total / count, rel=1e-5) and row["tokens"] == count
