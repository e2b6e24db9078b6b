"""Maps between states of unequal widths: fitted, frozen, trained through, kept; then OPD."""

import itertools
import signal

import pytest
import torch
from one_step import opd, refused, write
from safetensors.torch import load_file
from test_resume import IN_COMMIT, IN_SAMPLING, copy_without
from test_states import columns_of
from test_update import spans_of

from conftest import make_model, make_model64
from opdctl.errors import StageFailed
from opdctl.loss.objectives import bridge as module
from opdctl.loss.objectives.bridge import Bridge, bridge
from opdctl.models.hidden_layers import layers_of
from opdctl.run.rundir import RunDir, read_rows
from opdctl.scoring.asks import Pass
from opdctl.train import update
from running import HERE, assert_same, carry_out, inside, plain, worker

OFF = {"signals": {}}


def states(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linked(n=300, d=6, e=9):
    """States of two sides that share some directions, and which rows are held out."""
    ours = states(0, n, d) * torch.linspace(0.2, 2.0, d, dtype=torch.float64)
    scale = torch.linspace(0.1, 3.0, e, dtype=torch.float64)
    theirs = ours @ states(1, d, e) * scale + 0.3 * states(2, n, e) + 5.0
    return ours, theirs, torch.arange(n) % 10 == 0


def test_the_teachers_directions_are_the_principal_ones():
    ours, theirs, held = linked()
    _, theirs_re, mean, fitted = bridge(ours, theirs, held, 3)
    fit = theirs[~held]
    assert torch.allclose(mean, fit.mean(0), atol=1e-12)
    _, size, axes = torch.linalg.svd(fit - fit.mean(0), full_matrices=False)
    assert torch.allclose((theirs_re @ axes[:3].T).abs(), torch.eye(3).double(), atol=1e-9)
    share = size[:3].square().sum() / size.square().sum()
    assert fitted["variance"] == pytest.approx(float(share), abs=1e-12)


@pytest.mark.parametrize("ridges", [(1e-12,), (0.5,), module.RIDGES])
def test_the_students_map_is_the_least_squares_one(ridges, monkeypatch):
    """By the normal equations; the ridge with the least error on what was held out; R2 and cosine
    of those rows by their definition."""
    monkeypatch.setattr(module, "RIDGES", ridges)
    ours, theirs, held = linked(n=40)
    ours_rd, theirs_re, mean, fitted = bridge(ours, theirs, held, 3)
    z = (theirs - mean) @ theirs_re.T
    h, gram = ours[~held], ours[~held].T @ ours[~held]
    errors = {}
    for ridge in ridges:
        add = ridge * gram.trace() / len(gram) * torch.eye(len(gram)).double()
        solved = torch.linalg.solve(gram + add, h.T @ z[~held]).T
        errors[ridge] = float((ours[held] @ solved.T - z[held]).square().sum()), solved
    best = min(errors, key=lambda r: errors[r][0])
    assert fitted["ridge"] == best and torch.allclose(ours_rd, errors[best][1], atol=1e-9)
    assert fitted["r2"] == pytest.approx(1 - errors[best][0] / float(z[held].square().sum()))
    if ridges == (1e-12,):
        exact = torch.linalg.lstsq(h, z[~held]).solution.T
        assert torch.allclose(ours_rd, exact, atol=1e-8)
    a, b = ours[held] @ ours_rd.T, z[held]
    cosine = ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean()
    assert fitted["fit"] == pytest.approx(float(cosine))
    assert fitted["r2"] < 1 and fitted["fit"] < 1


def test_what_is_held_out_is_not_fitted_on():
    ours, theirs, held = linked()
    other = theirs.clone()
    other[held] += 100 * states(3, int(held.sum()), 9)
    a, b = bridge(ours, theirs, held, 3), bridge(ours, other, held, 3)
    assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    assert b[3]["r2"] < 0.5 < a[3]["r2"]


def test_every_tenth_prompt_of_a_teacher_is_held_out(monkeypatch):
    """With all of its tokens; batches are taken until there are enough."""
    seen, taken = [], []

    def fitted(ours, theirs, held, rank):
        seen.append((ours, held))
        return torch.zeros(1), torch.zeros(1), torch.zeros(1), {"r2": 0, "fit": 0, "variance": 0}

    def batches():
        for step in itertools.count():
            taken.append(step)
            group = torch.arange(6).repeat_interleave(2) + 5 * step  # the last one comes again
            rows = group.double()[:, None, None].expand(-1, 2, 4)
            yield [("a", rows, rows, group), ("b", rows[:2], rows[:2], group[:2])]

    monkeypatch.setattr(module, "bridge", fitted)
    Bridge(Bridge.Config(rank=1, tokens=40)).fit(batches())
    assert taken == [0, 1, 2] and len(seen) == 4  # two teachers, two layers
    ours, held = seen[0]
    order = {number: i for i, number in enumerate(dict.fromkeys(ours[:, 0].tolist()))}
    assert len(order) == 16 and len(ours) == 36
    assert held.tolist() == [order[n] % 10 == 0 for n in ours[:, 0].tolist()]
    assert held.sum() == 6  # 10 comes twice, and is held out both times
    assert seen[2][1].tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("unit", [True, False])
def test_loss_and_gradient_are_those_of_autograd(unit, float64):
    """Two teachers of other widths and depths, by transformers' own output_hidden_states;
    micro-batches and chunks change nothing."""
    model, spans, rank = make_model64(0, layers=3), spans_of(), 4
    teachers = [make_model64(5, width=40, layers=5), make_model64(6, width=16, layers=2)]
    layers = layers_of(model, ["all"])
    beside = [(1, 3, 5), (1, 2, 2)]  # 1.5 and 1 / 2 round up
    objective = Bridge(Bridge.Config(rank=rank, unit=unit))
    for i, teacher in enumerate(teachers):
        width = teacher.net.config.n_embd
        given = ((3, rank, 24), (3, rank, width), (3, width))
        objective.maps[str(i)] = tuple(states(7 * i + k, *shape) for k, shape in enumerate(given))
    columns, taught = columns_of(spans, teachers, layers, (0.7, 1.3))

    model.net.zero_grad(set_to_none=True)
    total = 0.0
    for i, span in enumerate(spans):
        ids, rows = torch.tensor([span.ids]), slice(span.start - 1, len(span.ids) - 1)
        a = model.net(ids, output_hidden_states=True).hidden_states
        with torch.no_grad():
            b = teachers[i % 2].net(ids, output_hidden_states=True).hidden_states
        p_s, p_t, mean = objective.maps[str(i % 2)]
        value = 0.0
        for n in range(3):
            x = a[n + 1][0, rows] @ p_s[n].T
            y = (b[beside[i % 2][n]][0, rows] - mean[n]) @ p_t[n].T
            if unit:
                x, y = (h / h.norm(dim=-1, keepdim=True) for h in (x, y))
            value = value + (x - y).square().mean(-1) / 3
        total = total + (0.7, 1.3)[i % 2] * value.mean() / len(spans)
    total.backward()
    grads = {n: p.grad for n, p in model.net.named_parameters()}

    before = update.rows_in
    for micro_batch, rows in itertools.product((0, 2), (0, 3)):
        model.net.zero_grad(set_to_none=True)
        update.rows_in = (lambda *_, rows=rows: rows) if rows else before
        try:
            batch = update.Batch(spans, columns, [update.LossTerm(objective)], taught, layers)
            result = update.accumulate(model, batch, Pass(micro_batch=micro_batch))
            loss, table = result.loss, result.table
        finally:
            update.rows_in = before
        assert loss == pytest.approx(float(total.detach()), abs=1e-12)
        for name, parameter in model.net.named_parameters():
            if grads[name] is not None:
                assert (parameter.grad - grads[name]).abs().max() < 1e-12, name
    assert table.keys() == {"bridge_cosine", "bridge_distance"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bridge -> OPD with a teacher that is wider and deeper."""
    folder = tmp_path_factory.mktemp("bridge") / "run"
    done = inside("run", HERE / "bridge.yaml", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_bridge_then_opd(whole):
    """Fitted once, before the first step; the head moves in the second stage alone."""
    run = RunDir(whole)
    rows = read_rows(run.stage("bridged") / "metrics.jsonl")
    assert {"bridge_r2", "bridge_fit", "bridge_variance"} <= rows[0].keys()
    assert 0 < rows[0]["bridge_r2"] < 1 and 0.5 < rows[0]["bridge_fit"] < 1
    assert rows[0]["bridge_cosine"] > 0.5  # the first step's rollouts were not fitted on
    assert not any("bridge_r2" in row for row in rows[1:])
    assert all(row["grad_norm"] > 0 for row in rows)
    ledger = run.record("bridged")["compute"]
    assert ledger["teacher_tokens"] > ledger["train_tokens"] + 200  # those to fit on too
    small, bridged, distilled = (
        load_file(run.output(stage) / "model.safetensors")
        for stage in ("small", "bridged", "distilled")
    )
    head, first = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(small[head], bridged[head]) and not torch.equal(small[first], bridged[first])
    assert not torch.equal(bridged[head], distilled[head])


@pytest.mark.parametrize(
    ("patch", "n"),
    [
        (IN_SAMPLING, 7),  # of what the maps are fitted on
        (IN_SAMPLING, 45),  # of a step
        (IN_COMMIT, 1),
        (IN_COMMIT, 2),
    ],
)
def test_killed_and_resumed_it_has_the_same_bits(whole, tmp_path, patch, n):
    copy_without(whole, tmp_path / "run", "bridged")
    killed = worker(tmp_path / "run", "bridged", patch.replace("{n}", str(n)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = RunDir(tmp_path / "run").stage("bridged")
    kept = list((folder / "checkpoints").glob("step-*/members.safetensors"))
    assert len(kept) == (n if patch == IN_COMMIT else len(kept)) and (kept or n in (7, 45))
    again = worker(tmp_path / "run", "bridged")
    assert again.returncode == 0, again.stdout
    assert ("bridge to teacher" in again.stdout) == (not kept)  # not fitted twice
    assert_same(whole, tmp_path / "run", ["bridged"])


def test_what_cannot_be_bridged_is_said(on_disk, tmp_path, stage):
    problem = refused(stage, **OFF, objectives={"bridge": {"rank": 33, "tokens": 30}})
    assert problem.message == "33 directions, and a side has 32 numbers"
    rows = [torch.zeros(4, 1, 32), torch.zeros(4, 1, 48), torch.arange(4)]
    with pytest.raises(StageFailed, match="32 numbers are fewer than its rank 33"):
        Bridge(Bridge.Config(rank=33, tokens=4)).fit(iter([[("a", *rows)]]))
    keys = {"objectives": {"bridge": {"rank": 2, "tokens": 1}}, **OFF}
    with pytest.raises(StageFailed, match="it has one prompt, and one is held out"):
        carry_out(stage(**keys, prompts={"per_step": 1}))
    problem = refused(stage, **OFF, objectives={"bridge": {"layers": [0]}})
    assert problem.path == "stages.it.objectives.bridge.layers"


def test_a_gradients_stage_fits_nothing(on_disk, tmp_path):
    from opdctl.errors import RecipeError
    from running import one_stage

    given = {"kind": "gradients", "student": str(on_disk / "s"), "signals": {}}
    given |= {"teachers": {"teacher": str(on_disk / "t")}}
    with pytest.raises(RecipeError) as caught:
        from one_step import prompts

        objectives = {"divergence": {}, "hidden": {"layers": "all"}, "bridge": {}}
        one_stage(tmp_path / "run", {"sums": prompts(on_disk)}, **given, objectives=objectives)
    (problem,) = caught.value.problems
    assert problem.path == "stages.it.objectives.bridge" and "is fitted" in problem.message


def test_pooled_teachers_have_maps_each(tmp_path):
    """Of unequal widths, beside a divergence, in one stage."""
    folder = tmp_path / "models"
    folder.mkdir()
    sizes = {"s": {}, "t": {"hidden": 48, "layers": 3}, "u": {"hidden": 24, "layers": 1}}
    write(folder, {n: make_model(i, **keys) for i, (n, keys) in enumerate(sizes.items())})
    teachers = {n: {"model": str(folder / n), "serves": {"sums": True}} for n in "tu"}
    objectives = {"bridge": {"rank": 4, "tokens": 60}, "divergence": {"normalise": "token_mean"}}
    keys = {**OFF, "teachers": teachers, "pooled": True, "objectives": objectives}
    rows = carry_out(opd(folder, tmp_path, **keys))
    assert len(rows) == 2 and all(plain(r)["grad_norm"] > 0 for r in rows)
    assert {"bridge_cosine", "bridge_distance", "divergence"} <= rows[0].keys()
