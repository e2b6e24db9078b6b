"""Every method of ``opdctl/methods`` in float64 against its formula, written out here anew.

Samples, scores, weights and the update are the stage's own. The student then moves a little, as it
has before the second minibatch of a step, so that what belongs to the old weights and what to the
new ones are different numbers. The formula is on transformers' own logits, differentiated by torch.
"""

import math
import types

import pytest
import torch
from one_step import First, apart, by_transformers, prompts, said

from conftest import make_model64
from opdctl.models.model import load, save
from opdctl.recipe.methods import method, methods
from running import one_stage

# the verdict of a response that ended: half of them are right
VERDICT = "def even(prompt, response, answer, row):\n    return len(response) % 2 == 0\n"


@pytest.fixture(scope="module")
def on_disk(on_disk):
    """With a teacher that is certain at some tokens: a cap of extrapolation acts there."""
    teacher = make_model64(5)
    with torch.no_grad():
        teacher.net.transformer.wte.weight *= 2.5
    save(teacher, on_disk / "sure64")
    return on_disk


def case(on_disk, folder, name):
    """The stage up to its gradient, moved, and what its formula reads of it."""
    keys = {k: v for k, v in method(name).items() if k != "about"}
    kind = keys.setdefault("kind", "opd")
    keys |= {"student": str(on_disk / "s64"), "steps": 2}
    keys["prompts"] = {**keys.get("prompts", {}), "per_step": 6}
    keys["sampling"] = {**keys.get("sampling", {}), "max_tokens": 20}
    if kind == "opd":
        keys["teachers"] = {"sums": str(on_disk / "sure64")}
    if "length" in keys.get("controllers", {}):  # of answers of thousands of tokens
        keys["controllers"]["length"] |= {"least": 20, "most": 40}
    if "extrapolate" in keys.get("controllers", {}):  # there are twelve prompts
        keys["controllers"]["extrapolate"]["size"] = 4
    folder.mkdir()
    (folder / "verdict.py").write_text(VERDICT)
    data = prompts(on_disk) | {"verifier": {"python": {"call": f"{folder / 'verdict.py'}:even"}}}
    ctx = one_stage(folder / "run", {"sums": data}, runtime={"dtype": "float64"}, **keys)
    first = First(ctx)
    rollouts, temperature = first.rollouts, first.setup.temperature
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        old_NV = by_transformers(first.model, rollouts, temperature)
        for p in first.model.net.parameters():
            p += 0.03 * p.std() * torch.randn(p.shape, generator=generator)
    if "behaviour" in first.columns:  # a sampler of another precision
        noise_N = torch.randn(len(first.columns["behaviour"]), generator=generator)
        first.columns["behaviour"] += 0.5 * noise_N
    logp_NV = by_transformers(first.model, rollouts, temperature)
    teacher = load(str(on_disk / "sure64"), dtype="float64")
    logq_NV = by_transformers(teacher, rollouts, temperature).detach()
    c = types.SimpleNamespace(
        p=logp_NV,
        q=logq_NV,
        old=old_NV,
        s=said(logp_NV, rollouts, detach=False),
        s_old=said(old_NV, rollouts),
        t=said(logq_NV, rollouts),
        mu=first.columns.get("behaviour"),
        lengths=[r.length for r in rollouts],
        owner=torch.tensor([i for i, r in enumerate(rollouts) for _ in range(r.length)]),
        right=torch.tensor([not r.truncated and len(r.text) % 2 == 0 for r in rollouts]),
        groups=[r.group for r in rollouts],
        ids=[r.response_ids for r in rollouts],
        end=first.model.tokenizer.eos_token_id,
    )
    for objective in (t.objective for t in first.setup.terms if hasattr(t.objective, "fit")):
        shapes = ((2, 8, 24), (2, 8, 24), (2, 24))  # how they are fitted: test_bridge.py
        c.maps = [torch.randn(shape, generator=generator) for shape in shapes]
        objective.maps["sums"] = tuple(c.maps)
    c.states = lambda: hidden_states(first.model, rollouts)
    c.theirs = lambda: hidden_states(teacher, rollouts).detach()
    c.live = c.s.detach()
    c.gap = c.t - c.s_old
    return first, c


def hidden_states(model, rollouts):
    """transformers' own, of the layers and not the embedding, at the predicting rows: [N, L, D]."""
    rows = []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        layers = model.net(ids, output_hidden_states=True).hidden_states[1:]
        rows.append(torch.stack([h[0, len(r.prompt_ids) - 1 : -1] for h in layers], 1))
    return torch.cat(rows)


def token_mean(value_N, mask_N=None):
    """Sum over the masked tokens, by their count."""
    if mask_N is None:
        return value_N.mean()
    return (value_N * mask_N).sum() / mask_N.sum()


def seq_mean(c, value_N):
    """The mean over responses of each one's mean."""
    return torch.stack([v.mean() for v in value_N.split(c.lengths)]).mean()


def reverse(p, q):
    """KL(p || q) of rows of log-probs."""
    return (p.exp() * (p - q)).sum(-1)


def clipped(c, advantage_N, low, high):
    """PPO's loss."""
    ratio_N = (c.s - c.s_old).exp()
    bounded_N = ratio_N.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)


def entropy(rows):
    """In nats."""
    return -(rows.exp() * rows).sum(-1)


def inside(ratio_N, low, high):
    """A ratio, or 0 outside."""
    return torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0.0)


def mopd(c):
    gate_N = inside((c.live - c.mu).exp(), 0.5, 2.0)
    return seq_mean(c, -gate_N * c.gap.clamp(-5, 5) * c.s)


def glm5(c):
    gate_N = inside((c.s_old - c.mu).exp(), 0.5, 2.0)
    return seq_mean(c, gate_N * clipped(c, c.gap, 0.2, 0.28))


def thinking_machines(c):
    return token_mean(-(c.live - c.mu).exp() * c.gap * c.s)


def deepseek_v4(c):
    return token_mean(reverse(c.p, c.q))


def gkd(c):
    m = torch.log(0.5 * c.p.exp() + 0.5 * c.q.exp())
    return seq_mean(c, 0.5 * reverse(c.q, m) + 0.5 * reverse(c.p, m))


def dagger(c):
    return token_mean(reverse(c.q, c.p))


def seqkd(c):
    return token_mean(-c.s)


def minillm(c):
    """The return of what follows a token, by the number of its terms, one response at a time."""
    credit = []
    for gap in c.gap.split(c.lengths):
        for place in range(len(gap)):
            after = gap[place + 1 :]
            credit.append(after.sum() / len(after) if len(after) else torch.tensor(0.0))
    sampled_N = -(c.live - c.mu).exp() * torch.stack(credit) * c.s
    return token_mean(reverse(c.p, c.q)) + token_mean(sampled_N)


def vopd(c):
    advantage_N = c.gap + reverse(c.old, c.q)
    return token_mean(-advantage_N * c.s)


def exopd(c, lam=1.25):
    """The reference is the student's start, which at the first step is the old policy."""
    advantage_N = c.gap + (lam - 1) * c.gap
    weight_N = (c.s_old - c.mu).exp().clamp(max=5.0)
    return token_mean(-weight_N * advantage_N * c.s)


def cliff(c):
    """lambda at each token below the cliff. lambda* leaves at least (1 - p) / c to the rest: found
    by bisection, not by its formula."""
    caps = []
    for logq, logr in zip(c.q, c.old, strict=True):
        top = int(logq.argmax())
        p, b = float(logq[top].exp()), float(logr[top].exp())

        def rest(lam, p=p, b=b):
            odds = lam * math.log(p / (1 - p)) + (1 - lam) * math.log(b / (1 - b))
            return 1 / (1 + math.exp(min(700.0, odds)))

        low, high = 1.0, 50.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if rest(middle) > (1 - p) / 5.0 else (low, middle)
        capped = p > 0.9 and p > b
        caps.append(max(1.0, low - 0.05) if capped else math.inf)
    return torch.tensor(caps).clamp(max=1.25)


def exopd_guarded(c):
    return exopd(c, cliff(c))


def effopd(c):
    weight_N = (c.s_old - c.mu).exp().clamp(max=5.0)
    return token_mean(-weight_N * c.gap * c.s)


def eopd(c):
    top = c.q.topk(16).indices
    logq = c.q.gather(-1, top).log_softmax(-1)
    forward_N = (logq.exp() * (logq - c.p.gather(-1, top))).sum(-1)
    uncertain_N = (entropy(c.q) > 0.8).double()
    return token_mean(clipped(c, c.gap, 0.2, 0.2)) + token_mean(uncertain_N * forward_N)


def gui_sd(c):
    return token_mean((1 - entropy(c.q) / math.log(c.q.shape[-1])) * reverse(c.p, c.q))


def reopold(c):
    """The first of two steps is the first phase."""
    floor, gap_N = math.log(0.1) / 0.9, c.gap
    return token_mean(-gap_N.clamp(min=floor) * c.s, (gap_N >= floor).double())


def revisiting(c):
    top = c.q.topk(32).indices
    p, q = (rows.gather(-1, top).log_softmax(-1) for rows in (c.p, c.q))
    mask_N = torch.tensor([0.0 if i == c.end else 1.0 for ids in c.ids for i in ids])
    return token_mean(reverse(p, q), mask_N)


def scope(c):
    losses = []
    for right, sign in ((True, 1.0), (False, -1.0)):
        rows = c.s_old if right else c.t
        nll = torch.stack([-v.mean() for v in rows.split(c.lengths)])
        weight_B = torch.zeros(len(nll))
        for group in set(c.groups):
            mine = [b for b, g in enumerate(c.groups) if g == group and bool(c.right[b]) == right]
            if mine:
                perplexity = (sign * nll[mine]).exp()
                weight_B[mine] = perplexity / perplexity.sum() * len(mine)
        on_N = (c.right == right)[c.owner].double()
        top = c.q.topk(16).indices
        p, q = (r.gather(-1, top).log_softmax(-1) for r in (c.p, c.q))
        value_N = -c.s if right else reverse(p, q)
        losses.append(token_mean(weight_B[c.owner] * value_N, on_N))
    return sum(losses)


def tip(c):
    h_N, d_N = entropy(c.old), reverse(c.old, c.q)
    h_N = h_N.clamp(max=float(h_N.sort().values[round(0.98 * (len(h_N) - 1))]))
    h_N, d_N = ((v - v.min()) / (v.max() - v.min()) for v in (h_N, d_N))
    mask_N = torch.zeros(len(h_N))
    mask_N[(h_N + d_N - h_N * d_N).topk(round(len(h_N) / 2)).indices] = 1.0
    return token_mean(reverse(c.p, c.q), mask_N)


def unmasking(c):
    wrong_N = (~c.right)[c.owner].double()
    return token_mean(-c.gap * c.s, wrong_N)


def oprd(c):
    """All layers, the mean over them and over the width; no response has more than 2000 tokens."""
    distance_N = (c.states() - c.theirs()).square().mean((-1, -2))
    return seq_mean(c, distance_N)


def oprd_bridge(c):
    """Ten times the distance of both sides, seen through their maps to 8 numbers of length 1."""
    ours_LRD, theirs_LRE, mean_LE = c.maps
    a = torch.einsum("nld,lrd->nlr", c.states(), ours_LRD)
    b = torch.einsum("nle,lre->nlr", c.theirs() - mean_LE, theirs_LRE)
    a, b = (h / h.norm(dim=-1, keepdim=True) for h in (a, b))
    return 10 * seq_mean(c, (a - b).square().mean((-1, -2)))


def prune_opd(c):
    """The policy gradient on the student's 16, p renormalised there, by what is left of the trust
    after each token whose sets share less than .7; and .5 on top."""
    top = c.p.topk(16).indices
    p, q = (rows.gather(-1, top) for rows in (c.p, c.q))
    share = p.detach().log_softmax(-1).exp()
    pg_N = -(share * (q - p.detach()) * (p - p.detach()).exp()).sum(-1)
    both = [
        len(set(a.tolist()) & set(b.tolist())) / 16
        for a, b in zip(c.old.topk(16).indices, c.q.topk(16).indices, strict=True)
    ]
    decay = []
    for part in torch.tensor(both).split(c.lengths):
        bad = 0
        for ratio in part.tolist():
            bad += ratio < 0.7
            decay.append(max(0.0, 1 - 0.01 * bad) + 0.5)
    return token_mean(torch.tensor(decay) * pg_N)


def outcome(c, scaled):
    """The reward of a response, compared with its group."""
    reward_B, groups = c.right.double(), torch.tensor(c.groups)
    advantage_B = torch.zeros(len(reward_B))
    for group in set(c.groups):
        mine = groups == group
        advantage_B[mine] = reward_B[mine] - reward_B[mine].mean()
        spread = reward_B[mine].std(correction=0)
        if scaled and spread > 0:
            advantage_B[mine] /= spread
    return advantage_B[c.owner]


def rethinking(c):
    """The k most probable tokens of the student, weighted by it, against the teacher."""
    top = c.p.detach().topk(16).indices
    ours, theirs = (x.gather(-1, top) for x in (c.p, c.q))
    old = ours.detach()
    return token_mean(-(old.softmax(-1) * (theirs - old) * (ours - old).exp()).sum(-1))


def grpo(c):
    return seq_mean(c, clipped(c, outcome(c, True), 0.2, 0.28))


def dr_grpo(c):
    return token_mean(clipped(c, outcome(c, False), 0.2, 0.2))


@pytest.mark.parametrize("name", methods())
def test_gradient_of_a_method_is_that_of_its_formula(name, on_disk, tmp_path, float64):
    formula = globals().get(name)  # looked up now: one at the end of this file counts too
    assert formula, f"{name} has no formula: append `def {name}(c)` to this file"
    first, c = case(on_disk, tmp_path / name, name)
    loss, gradient, _ = first.gradient()
    first.model.net.zero_grad(set_to_none=True)
    expected = formula(c)
    expected.backward()
    parameters = [p.grad.flatten() for p in first.model.net.parameters() if p.grad is not None]
    assert apart(gradient, torch.cat(parameters)) < 1e-9
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9)


def test_what_the_formulas_need_to_tell_apart_is_there(on_disk, tmp_path, float64):
    """Right and wrong responses in one group, ends, ratios and clips that act."""
    _, c = case(on_disk, tmp_path / "grpo", "grpo")
    by_group = {g: {bool(c.right[b]) for b, x in enumerate(c.groups) if x == g} for g in c.groups}
    assert {True, False} in by_group.values()
    assert any(ids[-1] == c.end for ids in c.ids) and len(set(c.lengths)) > 3
    _, c = case(on_disk, tmp_path / "glm5", "glm5")
    moved_N = (c.live - c.s_old).exp()
    assert ((moved_N < 0.8) | (moved_N > 1.28)).any() and ((moved_N > 0.8) & (moved_N < 1.28)).any()
    off_N = (c.s_old - c.mu).exp()
    assert ((off_N < 0.5) | (off_N > 2)).any() and ((off_N > 0.5) & (off_N < 2)).any()
    lam_N = cliff(c)
    assert ((lam_N > 1) & (lam_N < 1.25)).any() and (lam_N == 1.25).any()
    assert (c.q.max(-1).values.exp() > 0.9).any() and (entropy(c.q) > 0.8).any()
