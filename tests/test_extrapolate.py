"""Leaps along the last direction (EffOPD): the line to the bit, what is kept, and exact resume."""

import signal

import pytest
import torch
from architectures import write
from one_step import prompts, refused
from test_controllers import stopped_at

from opdctl.config.registry import member
from opdctl.errors import Interrupted, RecipeError, UsageError
from opdctl.models.extrapolation import line_of
from opdctl.models.model import load
from opdctl.run.rundir import read_json, read_rows
from opdctl.train.assemble import on_policy
from opdctl.train.context import Context
from running import assert_same, carry_out, one_stage, plain, worker

BOTH = [r"attn\.", r"mlp\."]
LEAPS = {
    "signals": {},
    "objectives": {"divergence": {}},
    "controllers": {"extrapolate": {"size": 6, "candidates": 3}},
    "optim": {"lr": 1e-3},
}


def bytes_of(model):
    return {n: p.detach().numpy().tobytes() for n, p in model.net.named_parameters()}


def verdicts(ctx, *by_candidate):
    """A verifier that passes so many of the answers of W and of each candidate, in turn."""
    counts = iter(by_candidate)

    def verify(rollouts):
        count = next(counts)
        return [float(i < count) for i in range(len(rollouts))]

    ctx.verdicts.verify = verify


# the line ------------------------------------------------------------------------------------


def test_points_of_the_line(model):
    """start + c (start - previous) on attention and MLP alone; c = 0 gives back every byte."""
    line = line_of(model, BOTH, "here")
    before, previous = bytes_of(model), line.snapshot()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            parameter.view(-1)[0] = -0.0  # 0 x anything added to it is another byte
    start, there = line.snapshot(), bytes_of(model)
    weights = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    line.move_to(start, previous, 4.0)
    moved = bytes_of(model)
    for name, weight in weights.items():
        inside = "self_attn." in name or "mlp." in name
        assert (moved[name] != there[name]) == inside and inside == (name in start)
        if inside:
            old = torch.frombuffer(bytearray(before[name]), dtype=torch.float32).view_as(weight)
            now = dict(model.net.named_parameters())[name].detach()
            assert torch.equal(now, weight + 4.0 * (weight - old))
    line.move_to(start, previous, 2.0)
    line.move_to(start, previous, 4.0)
    assert bytes_of(model) == moved  # a point does not depend on the way to it
    line.move_to(start, previous, 0)
    assert bytes_of(model) == there


def test_masters_move_and_the_parameters_are_their_rounding(model):
    from opdctl.models.master_weights import MasterWeights

    model.net.to(torch.bfloat16)
    model.masters = MasterWeights(model.net)
    line = line_of(model, BOTH, "here")
    previous = line.snapshot()
    with torch.no_grad():
        for master in model.masters.named.values():
            master.add_(1e-4)  # bfloat16 would round most of it away
    model.masters.publish()
    start = line.snapshot()
    assert next(iter(start.values())).dtype == torch.float32
    line.move_to(start, previous, 2.0)
    for name, master in model.masters.named.items():
        if name in start:
            assert torch.equal(master, start[name] + 2.0 * (start[name] - previous[name]))
        assert torch.equal(model.masters.parameters[name], master.bfloat16())
    line.move_to(start, previous, 0)
    assert all(torch.equal(model.masters.named[n], start[n]) for n in start)


def test_a_pattern_that_names_nothing_is_refused(model):
    with pytest.raises(UsageError) as caught:
        line_of(model, [r"attn\.", r"ffn\."], "stages.it.controllers.extrapolate.modules")
    assert r"'ffn\\.' is found in no trained weight" in caught.value.message
    assert "model.layers.*.mlp.up_proj.weight" in caught.value.hint


# in product space ----------------------------------------------------------------------------


def adapted(stage, **lora):
    pytest.importorskip("peft", reason="the extra peft")
    model = stage(lora={"rank": 2, "alpha": 6, **lora}).models.student()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model, generator


def dense(model):
    """W + the products of all adapters that are on, by layer, in float64."""
    weights = {}
    for name, layer in model.net.named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight.detach().double()
            for on in layer.active_adapters:
                if on in layer.lora_A:
                    parts = (layer.lora_A, layer.lora_B)
                    a, b = (part[on].weight.detach().double() for part in parts)
                    weight = weight + layer.scaling[on] * (b @ a)
            weights[name] = weight
    return weights


def shake(model, generator):
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def far(weights, expected):
    return max(float((weights[n] - expected[n]).abs().max()) for n in expected)


def test_an_adapters_line_is_that_of_the_product(stage):
    """Two leaps that are kept, and one that is not: the dense weights are on the line each time,
    what is trained is not touched, and what A and B alone would give is elsewhere."""
    model, generator = adapted(stage)
    line = line_of(model, BOTH, "here")
    names = list(model.trainable_parameters())
    for c, kept in ((4.0, True), (2.0, False), (6.0, True)):
        before, previous = dense(model), line.snapshot()
        factors = {n: layer for n, layer in model.net.named_modules() if hasattr(layer, "lora_A")}
        old = {
            n: [m.lora_A["default"].weight.clone(), m.lora_B["default"].weight.clone()]
            for n, m in factors.items()
        }
        shake(model, generator)
        start, there, trained = line.snapshot(), dense(model), bytes_of(model)
        line.move_to(start, previous, c)
        on_line = {n: there[n] + c * (there[n] - before[n]) for n in there}
        assert far(dense(model), on_line) < 1e-5
        naive = {}
        for n, layer in factors.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a, b = a + c * (a - old[n][0]), b + c * (b - old[n][1])
            naive[n] = layer.get_base_layer().weight + 3.0 * (b @ a)
        assert far({n: w.detach().double() for n, w in naive.items()}, on_line) > 0.1
        moved = {n: p for n, p in bytes_of(model).items() if ".default." in n}
        assert moved == {n: p for n, p in trained.items() if ".default." in n}
        assert list(model.trainable_parameters()) == names  # what lies beside is not trained
        if kept:
            line.keep()
        else:
            line.move_to(start, previous, 0)
            assert bytes_of(model) == trained and far(dense(model), there) == 0
    state = line.state()
    assert {len(v) for n, v in state.items() if n.endswith(".A")} == {8}  # two leaps x two x rank 2
    other, _ = adapted(stage)
    with torch.no_grad():
        for name, parameter in other.trainable_parameters().items():
            parameter.copy_(dict(model.net.named_parameters())[name])
    line_of(other, BOTH, "here").load(state)
    assert bytes_of(other) == bytes_of(model)


def test_an_adapter_on_experts_is_refused(stage, tmp_path):
    """peft stacks their factors in one tensor: ranks that are put together would mix experts."""
    pytest.importorskip("peft", reason="the extra peft")
    base = str(tmp_path / "moe")
    write(base, "qwen3_moe")
    model = stage(student=base, teacher=base, lora={"rank": 2}).models.student()
    with pytest.raises(UsageError, match=r"here: the adapter is on experts .*mlp\.experts"):
        line_of(model, [r"attn\."], "here")
    lora = {"rank": 2, "targets": ["q_proj"]}
    model = stage(student=base, teacher=base, lora=lora).models.student()
    line_of(model, [r"attn\."], "here")


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_an_adapters_output_is_where_it_leapt_to(stage, on_disk, tmp_path, output):
    from opdctl.models.lora import merged
    from opdctl.models.model import save

    model, generator = adapted(stage, output=output)
    line = line_of(model, [r"mlp\.down_proj", r"q_proj"], "here")
    previous = line.snapshot()
    shake(model, generator)
    line.move_to(line.snapshot(), previous, 4.0)
    line.keep()
    expected = dense(model)
    save(model, tmp_path / "out")
    if output == "adapter":
        config = read_json(tmp_path / "out" / "adapter_config.json")
        assert config["r"] == config["lora_alpha"] == 6
        read_back = merged(load(str(on_disk / "s")), str(tmp_path / "out"))
    else:
        read_back = load(str(tmp_path / "out"))
    weights = {
        n: m.weight.detach().double() for n, m in read_back.net.named_modules() if n in expected
    }
    assert weights.keys() == expected.keys() and far(weights, expected) < 1e-5


# what is kept --------------------------------------------------------------------------------


class Leaping:
    """A controller on a real model, before any step."""

    def __init__(self, stage, **keys):
        keys = {"size": 6, "candidates": 3, **keys}
        self.ctx = stage(**{**LEAPS, "controllers": {"extrapolate": keys}})
        self.model = self.ctx.models.student()
        parts = on_policy(self.ctx, self.model, self.ctx.config.teachers)
        self.it = parts.controllers["extrapolate"]
        self.it.start()

    def step(self):
        """Move the weights as an update would."""
        with torch.no_grad():
            for parameter in self.model.net.parameters():
                parameter.add_(0.01)

    def weights(self):
        named = self.model.net.named_parameters()
        return torch.cat([p.detach().flatten() for n, p in named if "mlp." in n])


CASES = {  # right answers of W and of each candidate -> which is kept, how many were asked
    "all better": ([1, 2, 3, 4], {}, 3, 4),
    "the first fails": ([3, 2, 6, 6], {}, 0, 2),
    "the third fails": ([3, 4, 5, 4], {}, 2, 4),
    "as good is kept": ([3, 3, 3, 2], {}, 2, 4),
    "worse than the best, not than the start": ([1, 5, 4, 6], {}, 1, 3),
    "strictly better": ([3, 3, 6, 6], {"margin": 0.001}, 0, 2),
    "a margin of two in six": ([1, 3, 4, 6], {"margin": 2 / 6}, 1, 3),
    "a loss that is borne": ([3, 2, 1, 0], {"margin": -1 / 6}, 3, 4),
    "two errors of one gain": ([3, 4, 6, 6], {"errors": 2.0}, 0, 2),  # 1/6 against .167 x 2
    "two errors of four gains": ([2, 6, 6, 6], {"errors": 2.0}, 1, 3),  # 4/6 against .211 x 2
}


@pytest.mark.parametrize("case", CASES)
def test_candidates_are_kept_while_they_are_no_worse(stage, case):
    right, keys, kept, tried = CASES[case]
    leaping = Leaping(stage, **keys)
    before = leaping.weights()
    leaping.step()
    at, all_of_it = leaping.weights(), bytes_of(leaping.model)
    verdicts(leaping.ctx, *right)
    facts = leaping.it.act(1)
    assert facts == {"scores": pytest.approx([n / 6 for n in right[:tried]]), "accepted": kept}
    assert torch.equal(leaping.weights(), at + 2.0 * kept * (at - before) if kept else at)
    if not kept:
        assert bytes_of(leaping.model) == all_of_it
    assert leaping.it.sampled > 0


def test_the_next_direction_is_from_what_was_kept(stage):
    """Check leaps at 1, 2 and 4, not at 3, 5, 6, 7; a leap is no part of the next direction."""
    leaping, acted = Leaping(stage), []
    place = leaping.weights()
    for done in range(1, 9):
        leaping.step()
        at = leaping.weights()
        verdicts(leaping.ctx, 1, 2, 1)
        if leaping.it.act(done):
            acted.append(done)
            assert torch.equal(leaping.weights(), at + 2.0 * (at - place))
            place = leaping.weights()
        else:
            assert torch.equal(leaping.weights(), at)
    assert acted == [1, 2, 4, 8]


def test_a_stop_gives_every_byte_back(stage):
    leaping = Leaping(stage)
    leaping.step()
    there, state = bytes_of(leaping.model), leaping.it.state()
    leaping.ctx.verdicts.verify = lambda rollouts: [1.0] * len(rollouts)
    seen = []

    def check():
        seen.append(1)
        if len(seen) == 9:  # in the second candidate
            raise Interrupted("here")

    leaping.ctx.check = check
    with pytest.raises(Interrupted):
        leaping.it.act(1)
    assert bytes_of(leaping.model) == there
    assert leaping.it.state().keys() == state.keys()
    assert all(torch.equal(v, state[n]) for n, v in leaping.it.state().items())


def test_the_set_is_fixed_in_the_stages_shares_and_its_draws_disturb_nothing(stage, on_disk):
    """Two domains 1 : 2; the same prompts again; the rollouts of training are those of a stage
    without the controller as long as no leap is kept."""
    data = {"a": prompts(on_disk), "b": prompts(on_disk)}
    shares = {"domains": {"a": 1, "b": 2}, "per_step": 6}
    keys = {**LEAPS, "data": data, "prompts": shares, "steps": 4}
    keys["teachers"] = {n: str(on_disk / "t") for n in data}
    ctx = stage(**keys)
    it = on_policy(ctx, ctx.models.student(), ctx.config.teachers).controllers["extrapolate"]
    again = on_policy(ctx, ctx.models.student(), ctx.config.teachers).controllers["extrapolate"]
    assert it.prompts == again.prompts and len({p.id for p in it.prompts}) == 6
    assert [p.domain for p in it.prompts] == ["a"] * 2 + ["b"] * 4
    expected = carry_out(stage(**{**keys, "controllers": {}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member("controllers", "extrapolate"), "better", lambda *_: False)
        rows = carry_out(stage(**keys))
    for row, other in zip(rows, expected, strict=True):
        kept = {k: v for k, v in plain(row).items() if not k.startswith("extrapolate_")}
        assert kept == plain(other)
    assert ["extrapolate_accepted" in r for r in rows] == [True, True, False, True]


def test_what_it_samples_is_in_the_ledger(stage):
    """Check a model that never ends a response: prompt and six tokens, for W and each candidate."""
    with_it, without = stage(**LEAPS, steps=1), stage(**{**LEAPS, "controllers": {}}, steps=1)
    ours, theirs = (member("stages", "opd")().run(c) for c in (with_it, without))
    row = read_rows(with_it.folder / "metrics.jsonl")[0]
    assert row["extrapolate_scores"] == [0] * 4  # nothing is right, so all is as good
    assert row["extrapolate_blind"] is True
    assert row["extrapolate_accepted"] == 3
    more = ours.rollout_tokens - theirs.rollout_tokens
    assert 4 * 6 * 6 < more <= 4 * 6 * (9 + 6)
    size = with_it.models.student().parameters
    assert ours.flops["rollout"] - theirs.flops["rollout"] == 2.0 * size * more
    assert ours.train_tokens == theirs.train_tokens


def test_too_few_prompts_are_refused_before_the_first_step(stage):
    ctx = stage(**{**LEAPS, "controllers": {"extrapolate": {}}})
    with pytest.raises(UsageError) as caught:
        carry_out(ctx)
    assert "size is 50, and sums has 12 prompts" in caught.value.message
    assert caught.value.hint.endswith("size=12")
    assert not (ctx.folder / "metrics.jsonl").exists()


def test_refused(stage, on_disk, tmp_path):
    pattern = {"controllers": {"extrapolate": {"modules": ["attn["]}}}
    problem = refused(stage, **{**LEAPS, **pattern})
    assert problem.path.endswith("controllers.extrapolate.modules")
    assert "no verifier" not in problem.message and "attn[" in problem.message
    keys = {"kind": "sft", "student": str(on_disk / "s"), "controllers": {"extrapolate": {}}}
    with pytest.raises(RecipeError) as caught:  # nothing samples, so nothing is verified
        one_stage(tmp_path / "sft", {"sums": prompts(on_disk)}, **keys)
    assert caught.value.problems[0].path == "stages.it.controllers"
    data = {"sums": {**prompts(on_disk), "answer_column": ""}}
    problem = refused(stage, **LEAPS, data=data)  # no answers, and a verifier that compares
    assert problem.path == "data.sums.answer_column"


# resume --------------------------------------------------------------------------------------

IN_VALIDATION = """
import os, signal
import opdctl.rollout.engines.transformers as engine
real, seen = engine.draw_tokens, []
def draw(*a):
    seen.append(1)
    if len(seen) == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
engine.draw_tokens = draw
"""
STEPS = {"steps": 5, "runtime": {"checkpoint_every": 3}}
ADAPTED = {"lora": {"rank": 2, "output": "adapter"}}


def whole(stage, **keys):
    """The run that nobody stops."""
    ctx = stage(**LEAPS, **STEPS, **keys)
    done = worker(ctx.run.path, "it")
    assert done.returncode == 0, done.stdout
    return ctx.run.path


@pytest.mark.parametrize(
    ("keys", "kills"),
    [({}, (9, 22, 20, 35)), (ADAPTED, (16, 33, 35))],
    ids=["weights", "adapter"],
)
def test_killed_in_validations_it_ends_with_the_same_bits(stage, keys, kills):
    """Kill each time in another one, by SIGKILL, and resume from what was logged: of 102 draws each
    attempt makes those that are left."""
    if keys:
        pytest.importorskip("peft", reason="the extra peft")
    expected = whole(stage, **keys)
    ctx = stage(**LEAPS, **STEPS, **keys)
    for n in kills:
        killed = worker(ctx.run.path, "it", IN_VALIDATION.replace("{n}", str(n)))
        assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert worker(ctx.run.path, "it").returncode == 0
    assert_same(expected, ctx.run.path, ["it"])
    rows = read_rows(ctx.folder / "metrics.jsonl")
    assert [r.get("extrapolate_accepted") for r in rows] == [3, 3, None, 3, None]


@pytest.mark.parametrize("count", [12, 31, 47])
def test_a_stop_in_a_validation_commits_the_step_without_it(stage, count):
    """The step is not taken again: its row waits in the checkpoint, and the leap is made when the
    stage goes on. Ledger, metrics and weights are those of a stage that was never stopped."""
    plainly = stage(**LEAPS, **STEPS)
    ledger = member("stages", "opd")().run(plainly)
    cut = stage(**LEAPS, **STEPS)
    stopped_at(cut, count)
    newest = sorted((cut.folder / "checkpoints").glob("step-*"))[-1]
    held = read_json(newest / "state.json")
    assert held["row"]["loss"] and held["step"] in (1, 2, 4)
    assert (cut.folder / "wal" / f"step-{held['step'] - 1:06d}").exists()  # what was answered
    assert len(read_rows(cut.folder / "metrics.jsonl")) == held["step"] - 1
    again = Context(cut.run, cut.recipe, "it", attempt=2)
    compute = member("stages", "opd")().run(again)
    rows = [[plain(r) for r in read_rows(c.folder / "metrics.jsonl")] for c in (plainly, again)]
    assert rows[0] == rows[1]
    assert (compute.rollout_tokens, compute.flops) == (ledger.rollout_tokens, ledger.flops)
    name = "output/model.safetensors"
    assert (again.folder / name).read_bytes() == (plainly.folder / name).read_bytes()
