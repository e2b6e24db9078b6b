"""``opdctl diagnose``: gradients against autograd, success against enumeration, and real pairs."""

import itertools
import json
import math
import shlex
import shutil

import pytest
import torch
from test_preflight import context, folder, recipe_of  # noqa: F401  (folder is a fixture)
from test_served import serving
from typer.testing import CliRunner

from conftest import make_model
from opdctl.checks.diagnosis import directions, nodes
from opdctl.checks.diagnosis.diagnosed_recipe import data_entries, from_recipe
from opdctl.checks.diagnosis.directions import (
    centred,
    cosine,
    ideal,
    outcome_draws,
    sampled_draws,
    score_nodes,
)
from opdctl.checks.diagnosis.measure import Effort, measure
from opdctl.checks.diagnosis.next_commands import for_models, for_stage
from opdctl.checks.diagnosis.recommend import SIGNALS, recipe_keys, recommend, recoverability
from opdctl.checks.diagnosis.summary import mean_and_interval, pool_domains, summarize_gain
from opdctl.cli.app import app
from opdctl.cli.diagnosis_page import write
from opdctl.cli.diagnosis_tables import grids
from opdctl.errors import UsageError
from opdctl.intervals import newcombe, wilson
from opdctl.kernels.head import Head
from opdctl.kernels.reference import divergence
from opdctl.models.model import load, save
from opdctl.recipe.recipe import resolve
from opdctl.run.launch import new_run
from opdctl.types import Prompt, Rollout
from running import inside, opdctl


def tensor(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss_of, logits_CV):
    leaf = logits_CV.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf).sum(), leaf)[0]


def test_steps_are_minus_the_gradients_of_the_losses():
    z, t = tensor(6, 9, seed=0), tensor(6, 9, seed=1)
    logp, logq = z.log_softmax(-1), t.log_softmax(-1)
    found = directions.signal_directions(z, t, 4)
    for name, direction in (("reverse_kl", "reverse"), ("forward_kl", "forward"), ("jsd", "jsd")):
        expected = -gradient(lambda x, d=direction: divergence(x.log_softmax(-1), logq, d), z)
        assert torch.allclose(found[name], expected, atol=1e-12), name
    p, q, r = logp.exp(), logq.exp(), logp - logq
    kl = (p * r).sum(-1, keepdim=True)
    assert torch.allclose(found["reverse_kl"], -p * (r - kl), atol=1e-12)
    assert torch.allclose(found["forward_kl"], q - p, atol=1e-12)
    ids = z.topk(4).indices
    weight = logp.gather(-1, ids).softmax(-1)
    gap = (logq - logp).gather(-1, ids)

    def candidates(x):
        return -(weight * gap * x.log_softmax(-1).gather(-1, ids)).sum(-1)

    assert torch.allclose(found["top_k"], -gradient(candidates, z), atol=1e-12)


def test_the_ideal_step_is_the_gradient_of_the_success_rate():
    z, success = tensor(6, 5, seed=2), tensor(6, 5, seed=3).sigmoid()
    expected = gradient(lambda x: (x.softmax(-1) * success).sum(-1), z)
    assert torch.allclose(ideal(z.log_softmax(-1), success), expected, atol=1e-14)
    assert float(ideal(z, torch.full_like(z, 0.25)).abs().max()) < 1e-15


def scores_of(V=9, K=4):
    """Both sides at six nodes, over hidden rows that are the logits themselves."""
    z, t, eye = tensor(6, V, seed=4), tensor(6, V, seed=5), torch.eye(V, dtype=torch.float64)
    head = Head(eye, V)
    return z, t, score_nodes(z, head, t, head, candidates=K, top=3, size=4)


@pytest.mark.parametrize("K", [4, 9])
def test_one_draw_by_enumeration(K):
    z, t, scores = scores_of(K=K)
    logp, gap = z.log_softmax(-1), t.log_softmax(-1) - z.log_softmax(-1)
    assert (scores.ids_NK[:, 0] == (logp.exp() + t.softmax(-1)).argmax(-1)).all()
    g = ideal(scores.logp_NK, tensor(6, K, seed=6).sigmoid())
    cos, noise = sampled_draws(scores, g)
    for n in range(6):
        mean, square, expected = torch.zeros(K).double(), 0.0, 0.0
        for y in range(9):
            step = gap[n, y] * (torch.eye(9).double()[y] - logp[n].exp())
            step = centred(step[scores.ids_NK[n]])
            p = float(logp[n, y].exp())
            mean, square = mean + p * step, square + p * float(step @ step)
            expected += p * float(cosine(g[n], step))
        assert float(cos[n]) == pytest.approx(expected, abs=1e-12)
        assert torch.allclose(mean, scores.directions["reverse_kl"][n], atol=1e-12)
        assert float(noise[n]) == pytest.approx(square / float(mean @ mean) - 1, rel=1e-9)


def test_one_verdict_by_enumeration():
    _, _, scores = scores_of()
    success = tensor(6, 4, seed=7).sigmoid()
    g, p = ideal(scores.logp_NK, success), scores.logp_NK.softmax(-1)
    cos, noise = outcome_draws(scores.logp_NK, success)
    for n in range(6):
        base = float(p[n] @ success[n])
        mean, square, expected = torch.zeros(4).double(), 0.0, 0.0
        for y, verdict in itertools.product(range(4), (0.0, 1.0)):
            chance = float(success[n, y]) if verdict else 1 - float(success[n, y])
            step = (verdict - base) * (torch.eye(4).double()[y] - p[n])
            weight = float(p[n, y]) * chance
            mean, square = mean + weight * step, square + weight * float(step @ step)
            expected += weight * float(cosine(g[n], step))
        assert torch.allclose(mean, g[n], atol=1e-12), "the expected outcome step is the ideal one"
        assert float(cos[n]) == pytest.approx(expected, abs=1e-12)
        assert float(noise[n]) == pytest.approx(square / float(mean @ mean) - 1, rel=1e-9)


def test_a_server_knows_the_candidates():
    _, _, whole = scores_of(K=9)
    scores = directions.score_candidates(whole.ids_NK, whole.logp_NK, whole.logq_NK)
    assert torch.allclose(scores.directions["sampled"], whole.directions["reverse_kl"], atol=1e-12)


def test_windows_double_and_the_budget_holds():
    assert [nodes.window(d) for d in (0, 1, 2, 3, 4, 7, 8)] == [
        (0, 0), (1, 1), (2, 3), (2, 3), (4, 7), (4, 7), (8, 15)
    ]  # fmt: skip
    prompts = [Prompt(f"{i}", "d", "", "", {}) for i in range(9)]
    rollouts = [Rollout(p, [1], list(range(20))) for p in prompts]
    right = [1.0] * 7 + [0.0] * 2
    chosen = nodes.choose_nodes(rollouts, right, 32, seed=3)
    assert chosen == nodes.choose_nodes(rollouts, right, 32, seed=3)
    assert len(chosen) == 30, "whole rollouts: five of six windows each are 6 x 5"
    each = {i: [n for n in chosen if n.rollout == i] for i in {n.rollout for n in chosen}}
    assert {7, 8} <= each.keys(), "wrong rollouts are taken in turn with right ones"
    windows = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    for of in each.values():
        assert [nodes.window(n.depth) for n in of] == windows
        assert [n.stands_for for n in of] == [1, 1, 2, 4, 8, 4]
    rollouts[0].observed = ((3, 8),)
    assert max(n.depth for n in nodes.choose_nodes(rollouts, right, 99, 3) if n.rollout == 0) < 3


def test_success_against_enumeration(tmp_path):
    """Every continuation of a tiny vocabulary, by the model's own probabilities."""
    student = make_model(3, layers=1, alphabet="01=")
    save(student, tmp_path / "s")
    rows = [{"prompt": f"{a}{b}=", "answer": "1"} for a in "01" for b in "01"] * 3
    rows += [{"prompt": "1" * n + "=", "answer": "1"} for n in range(3, 12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = recipe_of(tmp_path, {"sums": "policy"}, "s", sampling={"max_tokens": 3})
    ctx = context(tmp_path, recipe)
    model = load(str(tmp_path / "s"))
    prompt = ctx.prompts.of("sums", "train")[0]
    whole = Rollout(prompt, model.render(prompt), [0, 0, 0])
    one = model.ids("1")[0]
    forced = [one, model.end_of_turn, model.ids("0")[0]]
    count = 300
    found = nodes.continuation_verdicts(ctx, model, [whole], [nodes.Node(0, 0)], [forced], count)[0]
    for verdicts, k in zip(found, forced, strict=True):
        exact = 0.0
        for rest in [[y] for y in range(model.valid_V)] + [
            [y, e] for y in range(model.valid_V) for e in model.ends
        ]:
            ids = [k, *rest] if k not in model.ends else [k]
            if ids[-1] not in model.ends or any(i in model.ends for i in ids[:-1]):
                continue
            if model.decode(ids).strip() != "1":
                continue
            whole_ids = torch.tensor([[*whole.prompt_ids, *ids]])
            logp = model.net(whole_ids).logits[0, len(whole.prompt_ids) : -1].log_softmax(-1)
            chance = logp.gather(-1, torch.tensor(ids[1:])[:, None]).sum().exp()
            exact += float(chance.detach())
        spread_of = math.sqrt(exact * (1 - exact) / count)
        assert sum(verdicts) / count == pytest.approx(exact, abs=4 * spread_of + 1e-9)
    assert 0.02 < sum(found[0]) / count < 0.98, "something to estimate"
    assert not any(found[1]) and not any(found[2])
    last = nodes.continuation_verdicts(
        ctx, model, [whole], [nodes.Node(0, 2)], [[one, model.eos]], 2
    )[0]
    assert last == [[0.0, 0.0], [0.0, 0.0]], "no room for an end: cut, and so wrong"


def test_an_interval_counts_responses():
    value, owner = torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), torch.tensor([0, 0, 0, 1])
    found = mean_and_interval(value, owner)
    half = 1.96 * math.sqrt(2 * (0.75**2 + 0.75**2)) / 4
    assert found["mean"] == 0.75 and found["ci95"][1] == pytest.approx(0.75 + half)


def pairs_of(both, second, first, neither):
    pairs = ((1.0, 1.0), both), ((0.0, 1.0), second), ((1.0, 0.0), first), ((0.0, 0.0), neither)
    return [pair for pair, count in pairs for _ in range(count)]


def test_an_interval_does_not_vanish_where_all_verdicts_are_alike():
    assert newcombe(pairs_of(36, 12, 2, 0)) == pytest.approx([0.0569, 0.3404], abs=5e-5), "paper"
    for share, count in ((0.0, 20), (1.0, 20), (0.3, 20), (1.0, 1)):  # the ends solve the test
        for end in wilson(share, count):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(
                    1.96 * (end * (1 - end) / count) ** 0.5, abs=1e-7
                )
    for alike, most in (((0, 0, 0, 20), 0.16), ((20, 0, 0, 0), 0.16), ((10, 0, 0, 10), 0.09)):
        low, high = newcombe(pairs_of(*alike))
        assert low == -high and high == pytest.approx(most, abs=0.005)
    assert newcombe(pairs_of(0, 20, 0, 0)) == [pytest.approx(0.772, abs=1e-3), 1.0]
    found = summarize_gain(
        pool_domains([{"right": pairs_of(0, 0, 0, 12)}, {"right": pairs_of(8, 0, 0, 0)}])
    )
    assert found["gain"] == 0 and found["ci95"] == newcombe(pairs_of(8, 0, 0, 12))
    assert found["solves"] == {"of": 12, "mean": 0.0, "ci95": wilson(0.0, 12)}
    assert found["loses"] == {"of": 8, "mean": 0.0, "ci95": wilson(0.0, 8)}


def test_an_interval_of_a_gain_covers_it():
    """Over every table of 12 pairs, by its multinomial probability."""
    chances, n = (0.3, 0.4, 0.1, 0.2), 12
    covered = 0.0
    for a, b, c in itertools.product(range(n + 1), repeat=3):
        if (d := n - a - b - c) >= 0:
            low, high = newcombe(pairs_of(a, b, c, d))
            ways = math.factorial(n) / math.prod(map(math.factorial, (a, b, c, d)))
            chance = ways * math.prod(p**k for p, k in zip(chances, (a, b, c, d), strict=True))
            covered += chance * (low <= 0.3 <= high)
    assert 0.93 < covered < 0.99


SMALL = Effort(prompts=40, budget=512, top=4, samples=4)


def diagnosed(tmp_path, models, teachers, **keys):
    (tmp_path / "run").mkdir(parents=True, exist_ok=True)
    result = measure(context(tmp_path / "run", recipe_of(models, teachers, **keys)), SMALL)
    (entry,) = result["teachers"].values()
    return result, entry, recommend(entry, lines_of(entry, result["student"]))


def lines_of(entry, student="S", name="teacher", data=None, overrides=()):
    teachers = [entry["model"] if name == "teacher" else f"{name}={entry['model']}"]
    effort = {"prompts": 40, "budget": 512, "top": 4, "samples": 4}
    return for_models(entry, name, student, teachers, data or {}, overrides, effort)


def test_recommendations_of_real_pairs(folder, tmp_path):  # noqa: F811
    whole, good, said = diagnosed(tmp_path / "a", folder, {"sums": f"{folder}/teacher"})
    assert diagnosed(tmp_path / "again", folder, {"sums": f"{folder}/teacher"})[0] == whole
    assert said["verdict"] == "go" and good["gain"]["together"]["ci95"][0] > 0
    assert recoverability(good)["new_knowledge"] and recoverability(good)["estimate"] > 0.5
    cos = good["alignment"]["signals"]["reverse_kl"]["wrong"]
    assert cos["ci95"][0] > 0.8 and good["reach"]["first_order"]["ci95"][0] > 0
    assert good["reach"]["profile"][0]["beyond"] > 0.1
    assert said["do"] and "opdctl stage opd" in said["do"][0]
    _, _, said = diagnosed(tmp_path / "b", folder, {"sums": f"{folder}/student"})
    assert said["verdict"] == "nothing_to_learn"
    _, bad, said = diagnosed(
        tmp_path / "c", folder, {"sums": f"{folder}/student"}, student="teacher"
    )
    assert said["verdict"] == "another_teacher" and "worse" in " ".join(said["reasons"])
    assert bad["reach"]["first_order"]["ci95"][1] < 0
    save(make_model(77), tmp_path / "unrelated")
    _, far, said = diagnosed(tmp_path / "d", folder, {"sums": f"{tmp_path}/unrelated"})
    assert far["step0"]["overlap"]["mean"] < 0.5 and "not compatible" in " ".join(said["reasons"])
    assert said["verdict"] == "another_teacher"


def entry(gain, overlap, kl=0.5, accuracy=0.8):
    low, high = gain - 0.1, gain + 0.1
    together = {"gain": gain, "ci95": [low, high], "prompts": 100, "teacher": accuracy}
    numbers = {"overlap": overlap, "overlap_mass": 0.9, "reverse": kl}
    step0 = {"top": 16, **{k: {"mean": v, "ci95": [v, v]} for k, v in numbers.items()}}
    found = {"same": False, "served": False, "model": "T", "domains": ["sums"]}
    return found | {"gain": {"together": together}, "step0": step0}


def test_recommendations_follow_the_numbers():
    def verdict(*given, **keys):
        return said(*given, **keys)["verdict"]

    def said(*given, **keys):
        found = entry(*given, **keys)
        return recommend(found, lines_of(found))

    assert verdict(0.3, 0.8) == "go" and verdict(0.3, 0.6) == "go"
    assert said(0.3, 0.8)["do"] == ["opdctl stage opd --student S --teacher T"], "no signal judged"
    assert verdict(0.3, 0.4) == "cold_start" and verdict(0.05, 0.4) == "cold_start"
    assert "opdctl stage sft --student S --teacher T" in said(0.3, 0.4)["do"][0]
    assert verdict(0.05, 0.8) == "unclear" and verdict(-0.3, 0.8) == "another_teacher"
    assert verdict(0.3, 0.8, kl=1e-4) == "nothing_to_learn"
    assert verdict(0.05, 0.4, accuracy=0.0) == "another_teacher"
    unmeasured = {"same": False, "model": "T", "domains": ["sums"]}
    assert recommend(unmeasured, lines_of(unmeasured))["verdict"] == "not_measured"
    few, again = entry(0.05, 0.8), "opdctl diagnose --student S --teacher T --budget 512"
    assert said(0.05, 0.8)["do"] == [f"{again} --top 4 --samples 4 --prompts 160"]
    few["gain"]["together"]["prompts"] = 39
    few = recommend(few, lines_of(few))
    assert not few["do"] and any("all its prompts" in reason for reason in few["reasons"])


@pytest.mark.parametrize(
    ("numbers", "verdict", "kinds"),
    [
        ((0.05, 0.4, 0.5, 0.0), "another_teacher", []),  # right on none: no sample would be kept
        ((-0.3, 0.4, 0.5, 0.0), "another_teacher", []),
        ((-0.3, 0.4, 0.5, 0.2), "another_teacher", []),
        ((0.05, 0.8, 0.5, 0.0), "another_teacher", []),
        ((0.3, 0.4, 1e-4, 0.8), "nothing_to_learn", []),
        ((0.05, 0.8, 1e-4, 0.8), "nothing_to_learn", []),
        ((0.3, 0.4, 0.5, 0.8), "cold_start", ["stage sft"]),
        ((0.05, 0.4, 0.5, 0.2), "cold_start", ["stage sft", "diagnose --student"]),
        ((0.05, 0.8, 0.5, 0.8), "unclear", ["diagnose --student"]),
        ((0.3, 0.8, 0.5, 0.8), "go", ["stage opd"]),
    ],
)
def test_no_command_goes_against_its_verdict(numbers, verdict, kinds):
    """Nor does a reason: what a verdict does not call for is not talked about."""
    found = entry(*numbers)
    said = recommend(found, lines_of(found))
    assert said["verdict"] == verdict
    assert [" ".join(line.split()[1:3]) for line in said["do"]] == kinds
    more = any("four times the prompts" in reason for reason in said["reasons"])
    assert more == ("diagnose --student" in kinds)
    of_recipe = recommend(found, for_stage("mimo", False, "mopd", (), {"prompts": 100}))
    assert not any("stage sft" in line for line in of_recipe["do"])
    assert any("an sft stage" in r for r in of_recipe["reasons"]) == ("stage sft" in kinds)


def dry(line):
    """Carry out a command up to its first stage, in this process; what it printed."""
    words = shlex.split(line)
    assert words[0] == "opdctl"
    done = CliRunner().invoke(app, [*words[1:], "--dry-run"])
    assert done.exit_code == 0, (line, done.exception)
    return done.output


def test_what_to_do_is_whole_commands(folder, tmp_path):  # noqa: F811
    """Each is planned as it stands; data, keys and the k that was judged are in it."""
    spaced = tmp_path / "a b.jsonl"
    shutil.copy(folder / "p.jsonl", spaced)
    data = {str(spaced): data_entries(str(spaced), {}), "gcd": data_entries("gcd", {})}
    overrides = ("sampling.max_tokens=4", "data.gcd.limit=5", "data.a_b.limit=50")
    overrides += ("teachers.other.weight=2", "runtime.threads=1", "seed=3")
    local = {"model": f"{folder}/teacher", "domains": ["a_b"]}
    given = (f"{folder}/student", "a_b", data, overrides)
    lines, served = (lines_of(local | model, *given) for model in ({}, {"model": "http://h:1#m"}))
    for signal in SIGNALS:
        for wrong in (False, True):
            line = lines.opd(*recipe_keys(signal, 5, False, wrong))
            assert "opd    opd   run" in dry(line) and ("outcome_gate" in line) == wrong
            assert "seed=3" in line and "'data.a_b.path=\"" in line
            assert "gcd" not in line and "other" not in line
    assert "k: 5," in lines.opd(*recipe_keys("top_k", 5, False))
    dry(served.opd(*recipe_keys("sampled", 5, True)))
    (cold,) = lines.sft()
    assert "sft    sft   run" in dry(cold) and "sources.teacher.sampling.max_tokens=4" in cold
    again = shlex.split(lines.with_more_prompts())
    assert again.count("--data") == 2 and str(spaced) in again and set(overrides) <= set(again)
    run = new_run(recipe_of(folder, {"sums": f"{folder}/teacher"}), "", tmp_path / "run").path
    for target, is_run in ((f"{run}/resolved.yaml", False), (str(run), True)):
        whole = for_stage(target, is_run, "opd", ("stages.opd.steps=7",), {"prompts": 9})
        assert "opd    opd   run" in dry(whole.opd(*recipe_keys("jsd", 5, False)))
        words = ["opdctl", "diagnose", target, "--stage", "opd", "stages.opd.steps=7"]
        assert (
            shlex.split(whole.with_more_prompts()) == [*words, "--prompts", "36"]
            and not whole.sft()
        )


def test_a_served_teacher_is_measured_as_far_as_it_says(folder, tmp_path):  # noqa: F811
    """The same model behind a server and in a folder: what both say is the same."""

    def sevens(_, given):
        answer = {"finish_reason": "stop", "message": {"content": "7"}}
        return given if "choices" in given else {"choices": [answer]}

    model = load(f"{folder}/teacher")
    tokens = {"tokenizer": model.tokenizer, "model": model}
    with serving(sevens, **tokens) as server:
        served, found, said = diagnosed(tmp_path / "a", folder, {"sums": server.url})
    _, local, _ = diagnosed(tmp_path / "b", folder, {"sums": f"{folder}/teacher"})
    assert said["verdict"] == "go" and len(found["missing"]) == 3
    assert sum("not measured" in reason for reason in said["reasons"]) == 3
    both = found["step0"].keys() & local["step0"].keys()
    agreed = {"overlap", "overlap_mass", "overlap_teacher_mass", "overlap_advantage", "entropy"}
    assert both == agreed | {"top", "tokens"} and found["step0"]["top"] == 5
    assert found["step0"].keys() - both == {"log_ratio"}
    for what in agreed:
        here, there = (e["step0"][what]["mean"] for e in (local, found))
        assert there == pytest.approx(here, abs=1e-5), what
    assert 0.1 < found["step0"]["overlap"]["mean"] < 1
    rows = zip(local["profile"], found["profile"], strict=True)
    assert all(a["overlap"] == pytest.approx(b["overlap"], abs=1e-5) for a, b in rows)
    assert found["alignment"]["signals"].keys() == {"sampled", "outcome"}
    assert found["gain"]["together"]["teacher"] == 1
    titles = [str(grid.columns[2].header) for grid in grids(served, found)]
    assert "overlap" in titles and "H(T)" not in titles
    served["teachers"]["sums"]["recommendation"] = said
    page = write([served], tmp_path / "d.html").read_text()
    assert "log S - log T" in page and "KL(S" not in page


def test_on_the_command_line(folder, tmp_path):  # noqa: F811
    """Real processes: JSON and nothing else on stdout, progress beside it, and a page."""
    command = ("diagnose", "--student", f"{folder}/student", "--teacher", f"{folder}/teacher")
    command += ("--data", f"{folder}/p.jsonl", "--prompts", 20, "--budget", 256)
    command += ("sampling.max_tokens=4", "--json")
    done = opdctl(*command, "--plot", tmp_path / "d.html")
    assert done.returncode == 0, done.stderr
    (stage,) = json.loads(done.stdout)["stages"]
    found = stage["teachers"]["teacher"]
    said = found["recommendation"]
    assert said["verdict"] in ("go", "unclear") and said["do"]
    for line in said["do"]:
        assert f"{folder}/p.jsonl" in line and "sampling.max_tokens=4" in line
        assert "opdctl diagnose" in line or dry(line)
    assert {"gain", "step0", "profile", "alignment", "reach"} <= found.keys()
    page = (tmp_path / "d.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    assert "of 256 continuations" in done.stderr and "Traceback" not in done.stderr


def test_what_data_means(folder, tmp_path):  # noqa: F811
    files = {"p": {"kind": "jsonl", "path": f"{folder}/p.jsonl"}}
    assert data_entries(f"{folder}/p.jsonl", {}) == files
    assert data_entries("gcd", {}) == {"gcd": {"kind": "reasoning_gym", "task": "gcd"}}
    assert data_entries("math", {"math": {"kind": "x"}}) == {"math": {"kind": "x"}}
    assert "math" in data_entries("mimo", {})
    with pytest.raises(UsageError, match="maths") as caught:
        data_entries("maths", {"math": {}})
    assert "'math'" in caught.value.hint


def test_what_a_stage_waits_for_is_what_to_run(folder, tmp_path):  # noqa: F811
    """Of a run that is to be continued, carried out; of a recipe, planned."""
    one = {"student": "stage:copy", "steps": 1, "prompts": {"per_step": 2}}
    stages = {
        "copy": one | {"kind": "sft", "student": f"{folder}/student"},
        "taught": one | {"kind": "sft"},
        "opd": one | {"kind": "opd", "teachers": {"sums": "stage:taught"}, "signals": {}},
    }
    stages["opd"] |= {"objectives": {"divergence": {}}, "sampling": {"max_tokens": 2}}
    data = {"sums": {"kind": "jsonl", "path": f"{folder}/p.jsonl"}}
    recipe = resolve({"name": "w", "data": data, "stages": stages}, "w")
    run = new_run(recipe, "", tmp_path / "a run").path
    needs = pytest.raises(UsageError, match="opd: stage copy is not done")
    with needs as of_run:
        from_recipe(str(run), "opd", ())
    start, line = of_run.value.hint.split(": ")
    assert start == "run what it needs first" and line == f"opdctl resume '{run}'"
    with needs as planned:
        from_recipe(f"{run}/resolved.yaml", "", ("seed=3",))
    line, _ = planned.value.hint.split(": ")[1].split("; ")
    assert line.endswith("--only copy --only taught seed=3")
    assert "taught  sft" in dry(line) and "opd     opd" not in dry(line)
    words = shlex.split(of_run.value.hint.split(": ")[1])
    done = inside(*words[1:])
    assert done.returncode == 0, done.stderr
    assert from_recipe(str(run), "opd", ())[1] == ["opd"]
    only = resolve({"name": "o", "data": data, "stages": {"copy": stages["copy"]}}, "o")
    with pytest.raises(UsageError, match=r"no stage of .* has teachers") as caught:
        from_recipe(str(new_run(only, "", tmp_path / "o").path), "", ())
    assert "--only" not in caught.value.hint


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "one recipe or run directory, or a student and a teacher"),
        (("--student", "X"), "--student and --teacher are both needed"),
        (("mimo", "--student", "X"), "one recipe or run directory"),
        (("mimo", "--stage", "mopdd"), "did you mean 'mopd'"),
        (("mimo", "--stage", "sft"), "stage sft has no teachers"),
        (("mimo",), "can be diagnosed yet"),
    ],
)
def test_what_is_asked_wrongly(given, said):
    done = inside("diagnose", *given)
    assert done.returncode == 2 and said in done.stderr and not done.stdout
