"""An opd stage up to its first gradient, in this process: models, sampler, teachers and update as
in a run; and what transformers says of the same tokens."""

import json

import pytest
import torch

from opdctl.errors import RecipeError
from opdctl.models.model import save
from opdctl.scoring.asks import Pass
from opdctl.train import update
from opdctl.train.assemble import on_policy
from opdctl.train.score_step import score_step, set_advantage, set_weights
from opdctl.types import Compute
from running import one_stage

OFF = {"signals": {}}
WITH_TEACHER = {
    "credit": {"signals": {"reverse_kl": {}}},
    "baseline": {"signals": {"reverse_kl": {}, "kl_baseline": {}}},
    "reverse": {**OFF, "objectives": {"divergence": {}}},
    "forward": {**OFF, "objectives": {"divergence": {"direction": "forward"}}},
    "jsd": {**OFF, "objectives": {"divergence": {"direction": "jsd"}}},
    "top": {**OFF, "objectives": {"divergence": {"support": "topk_teacher", "k": 4}}},
    "topk_tail": {**OFF, "objectives": {"topk_tail": {"k": 4}}},
    "topk_pg": {**OFF, "objectives": {"topk_pg": {"k": 4}}},
    "k2": {**OFF, "objectives": {"sampled_kl": {"estimator": "k2"}}},
    "k3": {**OFF, "objectives": {"sampled_kl": {"estimator": "k3", "direction": "forward"}}},
    "hidden": {**OFF, "objectives": {"hidden": {}}},
}


def write(folder, models):
    """Models by name, and prompts with a short and a long answer."""
    for name, model in models.items():
        save(model, folder / name)
    rows = [{"prompt": f"{i}+{i * i}=", "answer": str(i), "long": f"{i} " * 9} for i in range(12)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))


def prompts(on_disk, column="answer"):
    """The data entry of those prompts."""
    path = str(on_disk / "sums.jsonl")
    return {"kind": "jsonl", "path": path, "answer_column": column, "eval_share": 0}


def opd(on_disk, folder, *overrides, student="s", teacher="t", data=None, **keys):
    """Context of an opd stage in a new run under ``folder``.

    Args:
        student, teacher: models of ``on_disk``, or folders.
        data: of the recipe; the prompts of ``on_disk`` if not given.
        keys: of the stage; ``runtime`` and ``context`` as in ``one_stage``.
    """
    given = {"kind": "opd", "student": str(on_disk / student), "steps": 2}
    given |= {"prompts": {"per_step": 6}, "sampling": {"max_tokens": 6}}
    given["teachers"] = {"teacher": teacher if teacher == "policy" else str(on_disk / teacher)}
    place = folder / f"run-{len(list(folder.glob('run-*')))}"
    return one_stage(place, data or {"sums": prompts(on_disk)}, *overrides, **given | keys)


class First:
    """A stage up to its first gradient: rollouts, their scores, the advantage."""

    def __init__(self, ctx, rollouts=None):
        store, trains = ctx.models, hasattr(ctx.config, "lora")
        self.model = store.student() if trains else store.load(ctx.config.student)
        self.optim = getattr(ctx.config, "optim", None)  # none in a gradients stage
        self.setup = on_policy(ctx, self.model, getattr(ctx.config, "teachers", {}))
        self.rollouts = rollouts(self.model) if rollouts else self.setup.source.draw(0)
        ctx.wal.at(0)
        self.step = score_step(self.rollouts, self.model, self.setup, ctx, Compute())
        self.columns = self.step.columns
        self.logged = set_advantage(self.step, self.setup.signals)
        self.logged |= set_weights(self.step, self.setup.terms)
        self.spans = [r.request for r in self.rollouts]

    def gradient(self, some=None, micro_batch=0):
        """Loss, gradient and what was logged per token, of all rollouts or some."""
        some = range(len(self.spans)) if some is None else some
        lengths = [len(s) for s in self.spans]
        cut = {k: v.split(lengths) for k, v in self.columns.items()}
        self.model.net.zero_grad(set_to_none=True)
        batch = self.setup.batch(
            [self.spans[i] for i in some],
            {k: torch.cat([v[i] for i in some]) for k, v in cut.items()},
            self.step.teacher_cache,
        )
        run = Pass(temperature=self.setup.temperature, micro_batch=micro_batch)
        result = update.accumulate(self.model, batch, run)
        loss, table = result.loss, result.table
        grads = [p.grad.flatten() for p in self.model.net.parameters() if p.grad is not None]
        return loss, torch.cat(grads), table


def by_transformers(model, rollouts, temperature=1.0, valid_V=None):
    """log-softmax of transformers' own forward, one response at a time: [N, V]."""
    rows = []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        logits = model.net(ids).logits[0, len(r.prompt_ids) - 1 : -1]
        rows.append((logits[:, :valid_V] / temperature).log_softmax(-1))
    return torch.cat(rows)


def said(rows_NV, rollouts, detach=True):
    """Log-probs of the tokens of the responses. Shape [N]."""
    target_N = torch.tensor([i for r in rollouts for i in r.response_ids])
    return (rows_NV.detach() if detach else rows_NV).gather(-1, target_N[:, None])[:, 0]


def apart(a, b):
    """Their distance, relative to the second."""
    return float((a - b).norm() / b.norm())


def refused(stage, **keys):
    """The problem for which an opd stage of these keys is refused."""
    with pytest.raises(RecipeError) as caught:
        stage(**keys)
    (problem,) = caught.value.problems
    return problem
