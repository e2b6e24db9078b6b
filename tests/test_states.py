"""Hidden states as a loss: which rows, which layers, which tokens; and that no head is read."""

import itertools

import architectures
import pytest
import torch
from one_step import First, apart, opd, prompts, refused, write
from test_update import spans_of

from conftest import make_model, make_model64
from opdctl.checks.preflight._run_checks import check
from opdctl.errors import UsageError
from opdctl.kernels.head import Head
from opdctl.loss.objectives.hidden import Hidden
from opdctl.loss.weights.window import Window
from opdctl.models.gradient_checkpointing import enable_checkpointing
from opdctl.models.hidden_layers import (
    Layers,
    forward_kwargs,
    hidden_states,
    layer_numbers,
    layers_of,
)
from opdctl.models.model import Model, load
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.score import score
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache
from opdctl.train import update
from opdctl.train.score_step import score_step
from opdctl.types import Compute
from running import carry_out, one_stage

OFF = {"signals": {}}


def test_layers_by_name_and_by_number():
    """Numbered from 1; the embedding is none of them."""
    assert layer_numbers("all", 4) == (1, 2, 3, 4) and layer_numbers("last", 4) == (4,)
    assert layer_numbers("even", 5) == (2, 4) and layer_numbers("odd", 5) == (1, 3, 5)
    assert layer_numbers("4,2", 4) == (2, 4)
    model = make_model64(0, layers=3)
    assert layers_of(model, ["odd", "2"]) == Layers((1, 2, 3), 3)
    for which in ("4", "0,1"):
        with pytest.raises(UsageError, match="layers 1 to 3"):
            layers_of(model, [which])
    with pytest.raises(UsageError, match="layers even: random gpt2 0 has the layers 1 to 1"):
        layers_of(make_model64(0, layers=1), ["even"])


@pytest.mark.parametrize(
    ("ours", "theirs", "beside"),
    [
        (28, 36, {1: 1, 2: 2, 14: 18, 15: 19, 27: 35}),  # 13 x 35 / 27 = 16.85, 14 x 35 / 27 = 18.1
        (36, 28, {1: 1, 2: 2, 18: 14, 19: 15, 35: 27}),
        (3, 4, {1: 1, 2: 3}),  # 1.5 rounds up
        (5, 5, {1: 1, 2: 2, 3: 3, 4: 4}),
        (2, 9, {1: 1}),
        (1, 9, {}),
    ],
)
def test_which_layer_of_another_depth(ours, theirs, beside):
    """Golden numbers of the proportional map, worked out by hand; the last is beside the last."""
    layers = Layers(layer_numbers("all", ours), ours)
    pairs = dict(zip(layers.inner, layers.counterparts(theirs), strict=True))
    assert pairs.items() >= beside.items() and len(pairs) == ours - 1
    assert all(1 <= n <= theirs for n in pairs.values())


@pytest.mark.parametrize("name", architectures.SHAPES)
def test_the_states_are_those_of_transformers(name, tmp_path):
    """Check each architecture: the layer's own output, and the row that the head reads."""
    architectures.write(tmp_path, name)
    model = load(str(tmp_path))
    ids_BT, seen = torch.arange(12).reshape(2, 6), []
    (first,) = [m for n, m in model.net.named_modules() if n.endswith((".layers.0", ".h.0"))]
    hook = first.register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        out = model.backbone(ids_BT, use_cache=False, **forward_kwargs((1, 2), model))
        found_NLD = hidden_states(model, out, torch.arange(12), (1, 2))
        hook.remove()
        own = model.net(ids_BT, output_hidden_states=True).hidden_states
    assert (found_NLD[:, 0] == seen[0].flatten(0, 1)).all()
    own = own[0 if name == "mamba2" else 1], own[-1]  # its list has no embedding
    for place in (0, 1):
        assert (found_NLD[:, place] == own[place].flatten(0, 1)).all()


def columns_of(spans, teachers, layers, weights=(1.0, 1.0)):
    """Columns and teachers of spans that are taught in turn."""
    lengths = list(map(len, spans))
    place = torch.arange(sum(lengths)).split(lengths)
    columns = {n: torch.zeros(sum(lengths), 1, dtype=torch.long) for n in ("index", "row")}
    columns = {f"teacher_{n}": c for n, c in columns.items()}
    columns["pair_weight"] = torch.ones(sum(lengths), 1)
    held = []
    for t, teacher in enumerate(teachers):
        mine = [i for i in range(len(spans)) if i % len(teachers) == t]
        want = ("hidden", "inner") if layers.inner else ("hidden",)
        scores = score(teacher, [spans[i] for i in mine], Asks.of(*want, layers=layers))
        at = torch.cat([place[i] for i in mine])
        columns["teacher_index"][at, 0] = t
        columns["teacher_row"][at, 0] = torch.arange(len(at))
        columns["pair_weight"][at, 0] = weights[t]
        held.append(CachedTeacher(None, scores.hidden_ND, inner_NLD=scores.inner_NLD, name=str(t)))
    return columns, TeacherCache(held, torch.device("cpu"))


def ours(model, spans, teachers, *, masks=(), micro_batch=0, rows=0, **keys):
    """Loss, gradient by name, table."""
    objective = Hidden(Hidden.Config(**keys))
    layers = layers_of(model, [objective.which])
    columns, taught = columns_of(spans, teachers, layers, (0.7, 1.3))
    columns |= {f"mask{i}": m for i, m in enumerate(masks)}

    class Mask:
        def __init__(self, name):
            self.name = name

        def mask(self, columns):
            return columns[self.name]

    term = update.LossTerm(objective, masks=[Mask(f"mask{i}") for i in range(len(masks))])
    model.net.zero_grad(set_to_none=True)
    before = update.rows_in
    update.rows_in = (lambda *_: rows) if rows else before
    try:
        batch = update.Batch(spans, columns, [term], taught, layers)
        result = update.accumulate(model, batch, Pass(micro_batch=micro_batch))
        loss, table = result.loss, result.table
    finally:
        update.rows_in = before
    grads = {n: p.grad for n, p in model.net.named_parameters()}
    return loss, grads, table


def by_autograd(model, spans, teachers, layers, unit=False, mask=None):
    """The same by transformers' own output_hidden_states, a span at a time, mean over responses."""
    model.net.zero_grad(set_to_none=True)
    total, kept, at = 0.0, 0, 0
    for i, span in enumerate(spans):
        ids = torch.tensor([span.ids])
        rows = slice(span.start - 1, len(span.ids) - 1)
        teacher = teachers[i % len(teachers)]
        a = model.net(ids, output_hidden_states=True).hidden_states
        with torch.no_grad():
            b = teacher.net(ids, output_hidden_states=True).hidden_states
        depth, other = len(a) - 1, len(b) - 1
        value_T = 0.0
        for n in layers:
            beside = int((n - 1) / max(1, depth - 1) * (other - 1) + 0.5) + 1
            x, y = a[n][0, rows], b[beside][0, rows]
            if unit:
                x, y = (h / h.norm(dim=-1, keepdim=True) for h in (x, y))
            value_T = value_T + (x - y).square().mean(-1) / len(layers)
        m = torch.ones_like(value_T) if mask is None else mask[at : at + len(span)].to(value_T)
        at += len(span)
        if m.sum():
            kept += 1
            total = total + (0.7, 1.3)[i % len(teachers)] * (value_T * m).sum() / m.sum()
    (total / kept).backward()
    return float(total.detach() / kept), {n: p.grad for n, p in model.net.named_parameters()}


CHOICES = {
    "all": (1, 2, 3),
    "last": (3,),
    "even": (2,),
    "odd": (1, 3),
    (1, 2): (1, 2),  # without the last
}


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("which", CHOICES)
def test_loss_and_gradient_are_those_of_autograd(which, unit, float64):
    """Two teachers, one of another depth; micro-batches and chunks change nothing."""
    model, spans = make_model64(0, layers=3), spans_of()
    teachers = [make_model64(5, layers=3), make_model64(6, layers=5)]
    expected, grads = by_autograd(model, spans, teachers, CHOICES[which], unit)
    grads = {n: g for n, g in grads.items() if g is not None}
    keys = {"layers": which if isinstance(which, str) else list(which), "unit": unit}
    for micro_batch, rows in itertools.product((0, 2), (0, 3)):
        loss, computed, table = ours(
            model, spans, teachers, micro_batch=micro_batch, rows=rows, **keys
        )
        assert loss == pytest.approx(expected, abs=1e-12)
        for name, grad in grads.items():
            assert (computed[name] - grad).abs().max() < 1e-12, name
        assert {
            n for n, g in computed.items() if g is not None and g.abs().max() > 0
        } <= grads.keys()
    assert table.keys() == {"cosine", "hidden_distance"}


def test_tokens_outside_the_window_are_not_counted(float64):
    """The last two and the first three tokens of each response; also on a real step's rollouts."""
    model, spans = make_model64(0, layers=3), spans_of()
    lengths = list(map(len, spans))
    sequence_N = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor(lengths))
    place_N = torch.cat([torch.arange(n) for n in lengths])
    ends = {"last": 2, "first": 3}
    expected = {
        "last": torch.tensor([p >= n - 2 for n in lengths for p in range(n)]),
        "first": place_N < 3,
    }

    class Step:
        @staticmethod
        def places():
            return place_N, torch.tensor(lengths)[sequence_N]

    for end, count in ends.items():
        mask_N = Window(Window.Config(**{end: count})).mask(Step)
        assert (mask_N == expected[end]).all() and 0 < mask_N.sum() < len(mask_N)
        teachers = [make_model64(5, layers=3), make_model64(6, layers=3)]
        value, grads = by_autograd(model, spans, teachers, (1, 2, 3), mask=expected[end])
        loss, computed, table = ours(model, spans, teachers, layers="all", masks=[mask_N])
        assert loss == pytest.approx(value, abs=1e-12)
        assert all((computed[n] - g).abs().max() < 1e-12 for n, g in grads.items() if g is not None)
        assert (table["hidden_distance"][~mask_N] == 0).all()


class Unread:
    """Every way to a logit is closed, and counts who tries."""

    def __init__(self, patch):
        self.tries = []
        for name in ("logits", "at", "adjoint", "new_grad"):
            patch.setattr(Head, name, lambda *_, name=name, **__: self.tries.append(name) or 1 / 0)
        patch.setattr(Model, "own_logits", lambda *_: self.tries.append("own") or 1 / 0)


RUN = {**OFF, "objectives": {"hidden": {"layers": "all", "weights": {"window": {"last": 3}}}}}


@pytest.mark.parametrize("tied", [True, False])
def test_no_head_is_read_on_either_side(tied, tmp_path, monkeypatch):
    """Scores and update of a real step with every way to a logit closed; what is kept for backward
    has nothing as wide as the vocabulary. An untied head is left as it was, bit for bit."""
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder, {n: make_model(s, tied=tied, extra_rows=400) for s, n in enumerate("st")})
    ctx = opd(folder, tmp_path, **RUN)
    first = First(ctx)  # sampled, and both models loaded, which compares their logits
    unread, shapes = Unread(monkeypatch), []
    first.step = score_step(first.rollouts, first.model, first.setup, ctx, Compute())
    assert first.step.teacher_cache.held[0].head is None
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t) or t, lambda t: t)
    with hooks:
        loss, grad, table = first.gradient()
    assert not unread.tries and loss > 0 and grad.norm() > 0
    weights = {p.data_ptr() for p in first.model.net.parameters()}
    rows = first.model.head.out_features
    assert rows > 400 and shapes
    assert not [t for t in shapes if t.data_ptr() not in weights and rows in t.shape]
    head = first.model.head.weight
    assert (head.grad is None) == (not tied)  # a tied one moves through the embedding
    assert table["masked"].sum() > 0
    monkeypatch.undo()
    optimizer = update.make_optimizer(first.model, first.optim)
    before = head.detach().clone()
    assert update.step(first.model, optimizer, 1e-3, 1.0, loss)[1]
    assert bool((head == before).all()) == (not tied)


def test_beside_a_loss_of_logits_it_is_their_sum(stage):
    """L_OPD + mu L_rep: the gradient of both is that of one and mu times that of the other."""
    policy = {"signals": {"reverse_kl": {}}}
    hidden = {"layers": "all", "coef": 10.0}
    both = First(stage(**policy, objectives={"policy_gradient": {}, "hidden": hidden}))
    alone = First(stage(**policy, objectives={"policy_gradient": {}}))
    rep = First(stage(**OFF, objectives={"hidden": hidden}))
    assert [r.response_ids for r in rep.rollouts] == [r.response_ids for r in both.rollouts]
    expected = alone.gradient()[1] + rep.gradient()[1]
    assert apart(both.gradient()[1], expected) < 1e-5
    assert apart(alone.gradient()[1], expected) > 0.1


def test_pooled_teachers_are_summed_by_their_weight(stage, on_disk):
    keys = {**OFF, "objectives": {"hidden": {"layers": "all"}}}
    on = {"serves": {"sums": True}}
    shares = {"t": 0.25, "u": 0.75}
    pool = {n: {"model": str(on_disk / n), "weight": w, **on} for n, w in shares.items()}
    pooled = First(stage(teachers=pool, pooled=True, **keys)).gradient()
    alone = {n: First(stage(teacher=n, **keys)).gradient() for n in "tu"}
    expected = sum(shares[n] * alone[n][1] for n in "tu")
    assert apart(pooled[1], expected) < 1e-5 < apart(alone["t"][1], expected)


def test_layers_that_are_computed_again_give_the_same_gradient(stage):
    keys = {**OFF, "objectives": {"hidden": {"layers": "all"}}}
    first = First(stage(**keys))
    expected = first.gradient()[1]
    enable_checkpointing(first.model.net, "it")
    first.model.gradient_checkpointing = True
    assert apart(first.gradient()[1], expected) < 1e-6


def test_what_has_no_states_or_other_widths_is_refused(on_disk, tmp_path, stage):
    """Check that validate, which reads folders, names both and says what to use instead."""
    served = {"teachers": {"teacher": "http://localhost:9"}}
    problem = refused(stage, **OFF, objectives={"hidden": {"layers": "odd"}}, **served)
    assert problem.path == "stages.it.objectives.hidden"
    assert "needs teacher.hidden{odd}" in problem.message
    assert "teacher (http://localhost:9) is behind a server, which gives" in problem.message
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder, {"s": make_model(0), "t": make_model(1, hidden=48)})
    problem = refused(
        lambda **keys: opd(folder, tmp_path, **keys), **OFF, objectives={"hidden": {}}
    )
    assert problem.path == "stages.it.objectives.hidden"
    assert "width 32, and those of teacher teacher (" in problem.message
    assert problem.message.endswith("are 48 wide")
    assert "--method oprd_bridge" in problem.hint
    for layers in ([], [0, 1], [2, 2]):
        problem = refused(stage, **OFF, objectives={"hidden": {"layers": layers}})
        assert problem.path == "stages.it.objectives.hidden.layers"
    for window in ({}, {"last": 1, "first": 1}):
        keys = {"hidden": {"weights": {"window": window}}}
        assert "window" in refused(stage, **OFF, objectives=keys).path
    problem = refused(stage, **OFF, objectives={"hidden": {"layers": [3, 9]}})
    assert problem.message == "[3, 9], and the student has the layers 1 to 2"
    with pytest.raises(UsageError, match=r"layers 3,9.* has the layers 1 to 2"):
        layers_of(load(str(on_disk / "s")), ["3,9"])  # of a model whose size no recipe says


def test_widths_that_only_a_configuration_says_are_refused_before_the_start(tmp_path, float64):
    """GPT-2 has another name for its width, which ``validate`` does not read."""
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder, {"s": make_model64(0), "t": make_model64(1, width=40), "u": make_model64(2)})
    said = {}
    for teacher, objective in (("t", "hidden"), ("u", "hidden"), ("t", "divergence")):
        ctx = opd(folder, tmp_path, teacher=teacher, objectives={objective: {}}, **OFF)
        said[teacher, objective] = next(f for f in check(ctx) if f.check == "widths")
    severities = {key: finding.severity for key, finding in said.items()}
    assert list(severities.values()) == ["error", "ok", "ok"], severities
    finding = said["t", "hidden"]
    assert "of width 24 and, of teacher (" in finding.what and finding.what.endswith("), 40")
    assert "oprd_bridge" in finding.do


def test_the_mix_of_the_method_file_is_a_stage(on_disk, tmp_path):
    """The override that oprd.yaml shows."""
    from opdctl.recipe.methods import methods

    lines = [x for x in methods()["oprd"].read_text().splitlines() if x.startswith("# 'signals")]
    assert len(lines) == 1
    overrides = [f"stages.it.{o}" for o in lines[0].removeprefix("# ").strip("'").split("' '")]
    keys = {"kind": "opd", "student": str(on_disk / "s"), "steps": 2, "prompts": {"per_step": 3}}
    keys |= {"teachers": {"sums": str(on_disk / "t")}, "sampling": {"max_tokens": 5}}
    ctx = one_stage(tmp_path / "run", {"sums": prompts(on_disk)}, *overrides, **keys)
    assert ctx.config.objectives["hidden"].coef == 10
    for row in carry_out(ctx):
        assert {"hidden_distance", "kl", "logprob_gap"} <= row.keys() and row["grad_norm"] > 0
