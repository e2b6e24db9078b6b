"""Several teachers in one update: pooled, ordered by teacher, read once, loaded on demand."""

import json

import pytest
import torch
from test_divergence import objective
from test_update import spans_of

from conftest import make_model, make_model64
from opdctl.errors import StageFailed, UsageError
from opdctl.kernels.reference import divergence
from opdctl.loss.objectives.nll import Nll
from opdctl.loss.token_teacher import gather_columns, order_by_teacher
from opdctl.models.model import save
from opdctl.run.rundir import RunDir, read_rows
from opdctl.scoring.ask_teachers import TeacherRequests, check_scores
from opdctl.scoring.asks import Asks, Pass
from opdctl.scoring.score import Scores, score
from opdctl.scoring.teacher_cache import CachedTeacher, TeacherCache
from opdctl.train import update
from opdctl.types import Prompt, Rollout, ScoreRequest
from running import inside


def pooled(spans, teachers, weights):
    """Every teacher scores every span; columns [N, M]."""
    requests = [ScoreRequest(tuple(ids), start) for ids, start in spans]
    hidden = [score(t, requests, Asks.of("hidden")).hidden_ND for t in teachers]
    N, M = len(hidden[0]), len(teachers)
    columns = {
        "teacher_index": torch.arange(M).expand(N, M).clone(),
        "teacher_row": torch.arange(N)[:, None].expand(N, M).clone(),
        "pair_weight": torch.tensor(weights).expand(N, M).clone(),
    }
    held = [CachedTeacher(t.lm_head(), h) for t, h in zip(teachers, hidden, strict=True)]
    return columns, TeacherCache(held, torch.device("cpu"))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"chunk_mib": 1}])
def test_pooled_is_the_weighted_sum_over_teachers(model64, options):
    """The divergence sums over teachers; an objective without a teacher counts once a token."""
    spans, weights = spans_of(), [0.7, 0.2, 0.0]
    teachers = [make_model64(5), make_model64(6, width=40), make_model64(7)]
    columns, taught = pooled(spans, teachers, weights)
    terms = [*objective(), update.LossTerm(Nll(Nll.Config()), coef=0.3, normalise="token_mean")]
    model64.net.zero_grad(set_to_none=True)
    batch = update.Batch(spans, columns, terms, taught)
    result = update.accumulate(model64, batch, Pass(**options))
    loss, table = result.loss, result.table
    ours = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
    model64.net.zero_grad(set_to_none=True)
    total, count, nll = 0.0, 0, []
    for ids, start in spans:
        rows = slice(start - 1, len(ids) - 1)
        log_p = model64.net(torch.tensor([ids])).logits[0, rows].log_softmax(-1)
        for teacher, weight in zip(teachers, weights, strict=True):
            with torch.no_grad():
                log_q = teacher.net(torch.tensor([ids])).logits[0, rows].log_softmax(-1)
            total = total + weight * divergence(log_p, log_q, "reverse").sum()
        nll.append(-log_p.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0])
        total = total + 0.3 * nll[-1].sum()
        count += len(ids) - start
    (total / count).backward()
    theirs = torch.cat([p.grad.flatten() for p in model64.net.parameters()])
    assert loss == pytest.approx(total.item() / count, abs=1e-12)
    assert theirs.norm() > 1e-3 and (ours - theirs).abs().max() < 1e-12
    assert torch.allclose(table["nll"], torch.cat(nll).detach(), atol=1e-12)


def test_pairs_are_ordered_by_teacher():
    columns = {
        "teacher_index": torch.tensor([[1, 0], [0, 1], [1, 0]]),
        "teacher_row": torch.tensor([[10, 20], [11, 21], [12, 22]]),
        "pair_weight": torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 4.0]]),
        "advantage": torch.tensor([7.0, 8.0, 9.0]),
    }
    token, place = order_by_teacher(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), columns)
    assert list(zip(token.tolist(), place.tolist(), strict=True)) == [
        *((0, 1), (1, 0), (2, 1)),  # teacher 0
        *((0, 0), (2, 0)),  # teacher 1: the first of token 2 is there though it weighs nothing
    ]
    found = gather_columns(columns, token, place)
    assert found["teacher_row"].tolist() == [20, 11, 22, 10, 12]
    assert found["pair_weight"].tolist() == [2, 3, 4, 1, 0]
    assert found["advantage"].tolist() == [7, 8, 9, 7, 9]


@pytest.mark.parametrize("micro_batch", [0, 2, 1])
@pytest.mark.parametrize("keys", [{}, {"support": "topk_union"}, {"support": "topk_student"}])
@pytest.mark.parametrize("form", ["tail", "generalised"])
def test_loads_per_minibatch_are_its_teachers(model64, micro_batch, keys, form):
    """However sequences and chunks are cut, and whatever is asked of a head, it is read once."""
    from test_divergence import taught as routed

    spans = spans_of()
    columns, taught = routed(spans, [make_model64(5), make_model64(6), make_model64(7)])
    for times in (1, 2):
        batch = update.Batch(spans, columns, objective(form=form, k=3, **keys), taught)
        update.accumulate(model64, batch, Pass(micro_batch=micro_batch, chunk_mib=1))
        assert taught.loads == 3 * times


def test_domain_mean_by_hand(model64):
    """Two domains of equal share, one with twelve times the tokens: half of the weight each."""
    term = update.LossTerm(None, normalise="domain_mean")
    sequence = torch.tensor([0] * 12 + [1] + [2] * 12 + [3])
    domain = torch.tensor([0] * 12 + [1] + [0] * 12 + [1])
    found = update.normalisers(term, sequence, 4, {"domain": domain})
    assert torch.allclose(found[domain == 0], torch.tensor(0.5 / 24))
    assert torch.allclose(found[domain == 1], torch.tensor(0.5 / 2))

    class Last:
        def mask(self, columns):
            return torch.cat([torch.zeros(13), torch.ones(13)])

    term.masks.append(Last())
    found = update.normalisers(term, sequence, 4, {"domain": domain})
    assert torch.allclose(found[13:25], torch.tensor(0.5 / 12)) and found[25] == 0.5
    assert found[:13].abs().max() == 0


def test_a_bad_score_names_the_rollout():
    prompts = [Prompt(f"id{i}", "math", "q", "a", {}) for i in range(2)]
    rollouts = [Rollout(p, [1], [2, 3], group=i) for i, p in enumerate(prompts)]
    asked = TeacherRequests(
        requests=[r.request for r in rollouts], names=[r.name for r in rollouts]
    )
    good = torch.zeros(4)
    check_scores("t", Scores({"logprobs": good}), asked)
    with pytest.raises(StageFailed, match=r"teacher t scored 3 of 4 tokens.*id0"):
        check_scores("t", Scores({"logprobs": good[:3]}), asked)
    for bad in (float("nan"), float("inf"), -float("inf")):
        value = good.clone()
        value[2] = bad
        with pytest.raises(StageFailed, match=r"not finite in the rollout of prompt id1 \(math\)"):
            check_scores("t", Scores({"logprobs": value}), asked)
        hidden = torch.zeros(4, 3)
        hidden[3, 1] = bad
        with pytest.raises(StageFailed, match="id1"):
            check_scores("t", Scores(hidden_ND=hidden), asked)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four models on disk and a data set of two domains, one with long answers."""
    folder = tmp_path_factory.mktemp("models")
    for i in range(4):
        (folder / f"m{i}").mkdir()
        save(make_model(i), folder / f"m{i}")
    for domain in ("sums", "words"):
        rows = [{"prompt": f"{domain} {i}=", "answer": str(i)} for i in range(20)]
        (folder / f"{domain}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(folders, out, *keys):
    data = [
        x for d in ("sums", "words") for x in (f"data.{d}.kind=jsonl", f"data.{d}.path={d}.jsonl")
    ]
    done = inside(
        *("stage", "opd", "--student", "./m0", "--teacher", "sums=./m1"),
        *("--teacher", "words=./m2", "--out", out, *data),
        *("steps=3", "prompts.per_step=4", "sampling.max_tokens=5", *keys),
        cwd=folders,
    )
    assert done.returncode == 0, done.stderr
    stage = RunDir(folders / out).stage("opd")
    weights = (stage / "output" / "model.safetensors").read_bytes()
    return read_rows(stage / "metrics.jsonl"), weights


FULL = ("signals={}", "objectives={divergence: {k: 4}}")


def test_teachers_are_loaded_on_demand_and_evicted(folders):
    """One resident teacher at a time gives the same weights as all, and more loads."""
    all_rows, expected = run(folders, "all", *FULL)
    rows, found = run(folders, "one", *FULL, "runtime.resident_teachers=1")
    assert found == expected
    assert [r["teacher_loads"] for r in all_rows] == [2, 0, 0]
    assert [r["teacher_loads"] for r in rows] == [2, 2, 2]
    assert [r["head_loads"] for r in rows] == [2, 2, 2]
    assert all(r["kernel"] == "chunked" and r["divergence"] >= 0 for r in rows)
    assert {"overlap", "overlap_mass", "teacher_entropy", "teacher_logprob"} <= rows[0].keys()


COMPOSED = {
    "icepop": {"objectives": {"policy_gradient": {"weights": {"icepop": {}}}}},
    "truncated": {"objectives": {"policy_gradient": {"weights": {"truncated": {}}}}},
    "baseline": {"signals": {"reverse_kl": {}, "kl_baseline": {}}},
    "top_baseline": {"signals": {"reverse_kl": {}, "kl_baseline": {"support": "topk_student"}}},
    "union": {"objectives": {"divergence": {"support": "topk_union", "k": 3, "direction": "jsd"}}},
    "tail": {"objectives": {"topk_tail": {"k": 3}}},
    "candidates": {"objectives": {"topk_pg": {"k": 3, "support": "topk_teacher"}}},
    "hidden": {"objectives": {"hidden": {"unit": True}}},
    "k2": {"objectives": {"sampled_kl": {"normalise": "domain_mean"}}},
    "reference": {
        "objectives": {"divergence": {"direction": "forward"}, "policy_gradient": {"coef": 0.1}}
    },
}


def test_every_composition_runs_routed_and_pooled(folders, tmp_path):
    """Real stages of one run; nothing is NaN, and every one of them trains."""
    both = {"sums": True, "words": True}
    teachers = {
        "routed": {"sums": "./m1", "words": "./m2"},
        "pooled": {n: {"model": f"./{m}", "serves": both} for n, m in (("a", "m1"), ("b", "m2"))},
    }
    stages = {}
    for name, keys in COMPOSED.items():
        for way, given in teachers.items():
            stages[f"{name}_{way}"] = {
                "kind": "opd",
                "student": "./m0",
                "steps": 2,
                "prompts": {"per_step": 4},
                "sampling": {"max_tokens": 5},
                "teachers": given,
                "pooled": way == "pooled",
                "signals": {"reverse_kl": {}}
                if name in ("icepop", "truncated", "reference")
                else {},
                **keys,
            }
    data = {d: {"kind": "jsonl", "path": f"{d}.jsonl"} for d in ("sums", "words")}
    recipe = {"name": "composed", "data": data, "stages": stages}
    (folders / "composed.json").write_text(json.dumps(recipe))
    done = inside("run", "composed.json", "--out", tmp_path / "run", cwd=folders)
    assert done.returncode == 0, done.stderr
    for name in stages:
        rows = read_rows(RunDir(tmp_path / "run").stage(name) / "metrics.jsonl")
        assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows), name
        assert not any("non_finite" in row for row in rows), name


def test_two_teachers_of_a_domain_have_to_be_pooled(folders):
    keys = ("teachers.sums={model: ./m1, serves: {sums: true, words: true}}", "--dry-run")
    done = inside(
        *("stage", "opd", "--student", "./m0", "--teacher", "sums=./m1", "--teacher", "words=./m2"),
        *("data.sums.kind=jsonl", "data.sums.path=sums.jsonl", "data.words.kind=jsonl"),
        *("data.words.path=words.jsonl", *keys),
        cwd=folders,
    )
    assert done.returncode == 2 and "pooled: true" in done.stderr


def test_another_tokenizer_is_refused_by_its_first_token(folders):
    """Same size, other content: the error names the token and what to use instead."""
    (folders / "other").mkdir(exist_ok=True)
    alphabet = "0123456789abcdefghijklmnopqrstuvwxyz =+;"
    save(make_model(1, alphabet=alphabet), folders / "other")
    done = inside(
        *("stage", "opd", "--student", "./m0", "--teacher", "./other", "--out", "refused"),
        *("data.sums.kind=jsonl", "data.sums.path=sums.jsonl", "--dry-run"),
        cwd=folders,
    )
    assert done.returncode == 2
    assert "','" in done.stderr and "sources.teacher" in done.stderr


def test_a_head_that_is_not_one_linear_layer_is_refused_by_name(model):
    """A LoRA head would get the gradient of a dense one."""

    class LoraLinear(torch.nn.Linear):
        pass

    model.net.lm_head.__class__ = LoraLinear
    with pytest.raises(UsageError, match=r"head is a LoraLinear.*"):
        model.lm_head()
