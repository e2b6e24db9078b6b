"""The one loop: draw, reward, score, advantage, update; a line of metrics; a checkpoint.

Every stage that trains is a declaration of what goes into it. It knows no member by name and
never pads, shifts, masks or normalises: tokens.py and update.py do. Within a step the weights
change only in the update, so a stop before it commits the state of the step's start.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdctl.core import checkpoint, draws, tokens, update
from opdctl.core.context import Clock, Context
from opdctl.core.metrics import Metrics, by_domain, mean
from opdctl.core.models import Model
from opdctl.core.scoring import logprobs
from opdctl.core.taught import Held, Taught
from opdctl.errors import Interrupted, StageFailed
from opdctl.types import Compute, Rollout, ScoreRequest


@dataclass
class Parts:
    """What a stage puts into the loop.

    Attributes:
        source: ``draw(step) -> [Rollout]``; for the ledger ``sampled`` (tokens of the last draw),
            ``parameters`` of the sampler and ``samples_from`` (student, teacher, dataset).
        terms: the objectives.
        signals: ``{name: (coef, member)}``; their weighted sum is the advantage.
        rewards: called on all rollouts of a step.
        teachers: ``{name: (member, weight)}``; scores come back as the column ``teacher``.
        route: domain -> teacher name.
        teacher_wants: what is asked of them: logprobs, hidden, lse, topk, entropy.
        teacher_top: k of topk.
        policy_logprobs: a no-grad pass of the student before the update.
        temperature: the one sampled with.
        updates: passes over the step's rollouts.
        minibatches: optimizer steps in each.
    """

    source: Any
    terms: list[update.Term]
    signals: dict[str, tuple[float, Any]] = field(default_factory=dict)
    rewards: list[Any] = field(default_factory=list)
    teachers: dict[str, tuple[Any, float]] = field(default_factory=dict)
    route: dict[str, str] = field(default_factory=dict)
    teacher_wants: tuple[str, ...] = ("logprobs",)
    teacher_top: int = 16
    policy_logprobs: bool = False
    temperature: float = 1.0
    updates: int = 1
    minibatches: int = 1


@dataclass
class Step:
    """All rollouts of one step and their per-token columns, flat and in their order.

    ``taught`` holds a head and hidden rows of each teacher asked; the columns ``teacher_index`` and
    ``teacher_row`` say which row of which teacher belongs to a token.
    """

    rollouts: list[Rollout]
    columns: dict[str, Tensor]
    sequence_N: Tensor
    taught: Taught | None = None

    def spread(self, value_B: list[float]) -> Tensor:
        """One number per rollout -> one per token. Shape [N]."""
        like = torch.tensor(value_B, dtype=torch.get_default_dtype())
        return like.to(self.sequence_N.device)[self.sequence_N]


class Loop:
    """Runs ``config.steps`` steps of a stage, from its newest checkpoint."""

    def __init__(self, ctx: Context, model: Model, parts: Parts) -> None:
        self.ctx, self.model, self.parts = ctx, model, parts
        self.steps, self.optim = ctx.config.steps, ctx.config.optim
        self.optimizer = update.make_optimizer(model, self.optim)
        self.compute = Compute()
        self.checkpoints = ctx.folder / "checkpoints"

    def run(self) -> Compute:
        """Train to the end.

        Raises:
            Interrupted: a stop was asked for; a checkpoint is committed.
            StageFailed: something is not finite, or there is nothing to train on.
        """
        state = checkpoint.restore(self.checkpoints, self.model, self.optimizer)
        done = 0
        if state:
            done = state["step"]
            self.compute = Compute(**state["compute"])
        metrics = Metrics(self.ctx.folder, self.ctx.attempt)
        runtime = self.ctx.runtime
        try:
            while done < self.steps:
                self.ctx.check()
                clock = Clock()
                before = copy.deepcopy(self.compute)
                try:
                    values = self._step(done, clock)
                except Interrupted:
                    self.compute = before  # the step will be taken again
                    raise
                done += 1
                clock.lap("other")
                metrics.row(done, values, clock.seconds)  # before the checkpoint that covers it
                if done % runtime.checkpoint_every == 0 and done < self.steps:
                    self._save(done)
                    clock.lap("other")
                for phase, spent in clock.seconds.items():
                    self.compute.seconds[phase] += spent
                self.ctx.loop_seconds += clock.last - clock.start
        except Interrupted:
            if done:
                self._save(done)
            raise
        finally:
            metrics.close()
        if not self.compute.train_tokens:
            raise StageFailed(
                "no step had anything to train on", "the source refused all of its samples"
            )
        return self.compute

    def _save(self, done: int) -> None:
        checkpoint.save(
            self.checkpoints,
            done,
            self.model,
            self.optimizer,
            {"compute": asdict(self.compute)},
            self.ctx.runtime.keep_checkpoints,
        )

    def _step(self, done: int, clock: Clock) -> dict:
        rollouts = [r for r in self.parts.source.draw(done) if r.response_ids]
        for rollout in rollouts:
            assert 0 <= done - rollout.version <= 0, "rollouts are of the current weights"
        self._count_rollouts()
        clock.lap("rollout")
        if not rollouts:
            return {"rollouts": 0, "tokens": 0}  # the source refused all of its samples
        if self.parts.minibatches > 1:
            rollouts = self._shuffled(rollouts, done)
        for reward in self.parts.rewards:
            reward.score(rollouts)
            forwarded = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
            self.compute.flops["teacher"] += 2.0 * reward.parameters * forwarded
        step = self._columns(rollouts)
        values = self._advantage(step)
        clock.lap("score")
        values = {**self._train(step, done), **values}
        clock.lap("train")
        self._log_rollouts(done + 1, step)
        return values

    def _columns(self, rollouts: list[Rollout]) -> Step:
        lengths = torch.tensor([len(r.response_ids) for r in rollouts])
        device = self.model.device
        sequence_N = torch.repeat_interleave(torch.arange(len(rollouts)), lengths).to(device)
        step = Step(rollouts, {}, sequence_N)
        if all(r.behaviour_logprobs is not None for r in rollouts):
            flat = [v for r in rollouts for v in r.behaviour_logprobs]
            step.columns["behaviour"] = torch.tensor(
                flat, dtype=torch.get_default_dtype(), device=device
            )
        if all(r.reward is not None for r in rollouts):
            step.columns["reward"] = step.spread([r.reward for r in rollouts])
        requests = [
            ScoreRequest((*r.prompt_ids, *r.response_ids), len(r.prompt_ids)) for r in rollouts
        ]
        runtime = self.ctx.runtime
        if self.parts.policy_logprobs:
            step.columns["policy"] = logprobs(
                self.model,
                requests,
                temperature=self.parts.temperature,
                micro_batch=runtime.micro_batch,
                chunk_mib=runtime.chunk_mib,
                check=self.ctx.check,
            )
            forwarded = sum(len(q.ids) for q in requests)
            self.compute.flops["train"] += 2.0 * self.model.parameters * forwarded
        if self.parts.teachers:
            self._teach(step, requests)
        return step

    def _teach(self, step: Step, requests: list[ScoreRequest]) -> None:
        """Ask each rollout's teacher; put what it says in the rollouts' order, checked.

        Raises:
            StageFailed: a teacher answered short or with something that is not finite.
        """
        lengths = [len(q.ids) - q.start for q in requests]
        token_N = torch.arange(sum(lengths), device=self.model.device).split(lengths)
        columns, wants, runtime = step.columns, self.parts.teacher_wants, self.ctx.runtime
        held: list[Held] = []
        weights = [1.0] * len(requests)
        for name, (teacher, weight) in self.parts.teachers.items():
            mine = [
                i for i, r in enumerate(step.rollouts) if self.parts.route[r.prompt.domain] == name
            ]
            if not mine:
                continue
            at_N = torch.cat([token_N[i] for i in mine])
            found = teacher.score(
                [requests[i] for i in mine], self.parts.temperature, wants, self.parts.teacher_top
            )
            for value_N in (found.logprobs_N, found.hidden_ND):
                if value_N is None:
                    continue
                first = f"from prompt {step.rollouts[mine[0]].prompt.id} on"
                if len(value_N) != len(at_N):
                    count = f"{len(value_N)} of {len(at_N)}"
                    raise StageFailed(f"teacher {name} scored {count} tokens, {first}")
                if not torch.isfinite(value_N).all():
                    raise StageFailed(f"teacher {name} gave a score that is not finite, {first}")
            if found.logprobs_N is not None:
                self._column(columns, "teacher", found.logprobs_N, at_N, token_N)
            if found.hidden_ND is not None:
                index_N = torch.full_like(at_N, len(held))
                self._column(columns, "teacher_index", index_N, at_N, token_N)
                row_N = torch.arange(len(at_N), device=at_N.device)
                self._column(columns, "teacher_row", row_N, at_N, token_N)
                head = teacher.model.projection(self.parts.temperature, runtime.rounded_logits)
                head.valid_V = self.model.valid_V
                rows = (found.hidden_ND, found.lse_N, found.top_NK, found.entropy_N)
                held.append(Held(head, *rows))
            for i in mine:
                weights[i], step.rollouts[i].teacher = weight, name
            forwarded = sum(len(requests[i].ids) for i in mine)
            self.compute.teacher_tokens += forwarded
            self.compute.flops["teacher"] += 2.0 * teacher.parameters * forwarded
        columns["teacher_weight"] = step.spread(weights)
        step.taught = Taught(held, self.model.device) if held else None

    @staticmethod
    def _column(columns: dict, name: str, value_N: Tensor, at_N: Tensor, token_N) -> None:
        """Write one teacher's values into a column over all tokens of the step."""
        if name not in columns:
            columns[name] = value_N.new_zeros(sum(map(len, token_N)))
        columns[name][at_N] = value_N

    def _advantage(self, step: Step) -> dict:
        """Sum of coef x signal; logs each signal's mean, spread and share."""
        values: dict[str, Any] = {}
        credit = {n: (c, s.credit(step)) for n, (c, s) in self.parts.signals.items()}
        if not credit:
            return values
        step.columns["advantage"] = sum(c * v for c, v in credit.values())
        size = {n: float((c * v).abs().mean()) for n, (c, v) in credit.items()}
        whole = sum(size.values())
        for name, (_, vector_N) in credit.items():
            values[f"{name}_mean"] = float(vector_N.mean())
            values[f"{name}_std"] = float(vector_N.std(correction=0))
            values[f"{name}_share"] = size[name] / whole if whole else 0.0
        if {"teacher", "policy"} <= step.columns.keys():
            gap_N = step.columns["policy"] - step.columns["teacher"]
            sums_B = tokens.per_sequence(gap_N, step.sequence_N, len(step.rollouts)).tolist()
            each = [s / len(r.response_ids) for r, s in zip(step.rollouts, sums_B, strict=True)]
            values["kl"] = by_domain(step.rollouts, each)
        return values

    def _train(self, step: Step, done: int) -> dict:
        rollouts, model = step.rollouts, self.model
        spans = [((*r.prompt_ids, *r.response_ids), len(r.prompt_ids)) for r in rollouts]
        lengths = [len(r.response_ids) for r in rollouts]
        runtime = self.ctx.runtime
        lr = update.lr_at(done, self.steps, self.optim)
        losses, norms, logged = [], [], {}
        self.ctx.check()
        for _ in range(self.parts.updates):
            for sequences, part in tokens.parts(lengths, self.parts.minibatches):
                cut = {k: v[part] for k, v in step.columns.items()}
                loss, table, processed = update.accumulate(
                    model,
                    spans[sequences],
                    cut,
                    self.parts.terms,
                    temperature=self.parts.temperature,
                    micro_batch=runtime.micro_batch,
                    chunk_mib=runtime.chunk_mib,
                    kernel=runtime.kernel,
                    rounded=runtime.rounded_logits,
                    taught=step.taught,
                )
                norms.append(update.step(model, self.optimizer, lr, self.optim.clip_norm))
                losses.append(loss)
                for name, vector_N in table.items():
                    logged.setdefault(name, []).append(vector_N)
                self.compute.train_tokens += processed
                self.compute.flops["train"] += 6.0 * model.parameters * processed
        values = {
            "loss": mean(losses),
            "grad_norm": mean(norms),
            "lr": lr,
            "rollouts": len(rollouts),
            "tokens": sum(lengths),
            "length": mean(lengths),
            "truncated": mean(float(r.truncated) for r in rollouts),
        }
        if all(r.reward is not None for r in rollouts):
            values["reward"] = mean(r.reward for r in rollouts)
            values["reward_by_domain"] = by_domain(rollouts, [r.reward for r in rollouts])
        for name, parts in logged.items():
            values[name] = float(torch.cat(parts).mean())
        if "divergence" in logged and self.parts.updates == 1:
            vector_N = torch.cat(logged["divergence"])
            sums_B = tokens.per_sequence(vector_N, step.sequence_N, len(rollouts)).tolist()
            each = [s / n for s, n in zip(sums_B, lengths, strict=True)]
            values["divergence_by_domain"] = by_domain(rollouts, each)
        return values

    def _shuffled(self, rollouts: list[Rollout], done: int) -> list[Rollout]:
        """Groups in an order of the step's own, so that no minibatch is of one domain alone."""
        groups = list(dict.fromkeys(r.group for r in rollouts))
        order = draws.permutation(len(groups), self.ctx.seed, "minibatches", done)
        place = {groups[g]: i for i, g in enumerate(order)}
        return sorted(rollouts, key=lambda r: place[r.group])

    def _count_rollouts(self) -> None:
        """Everything the source sampled, what it then refused included."""
        source = self.parts.source
        flops = 2.0 * source.parameters * source.sampled
        if source.samples_from == "teacher":
            self.compute.teacher_sampled_tokens += source.sampled
            self.compute.flops["teacher_sampling"] += flops
        else:
            self.compute.rollout_tokens += source.sampled
            self.compute.flops["rollout"] += flops

    def _log_rollouts(self, done: int, step: Step) -> None:
        every = self.ctx.runtime.log_rollouts_every
        if not every or (done % every and done not in (1, self.steps)):
            return
        lengths = [len(r.response_ids) for r in step.rollouts]
        vectors = {k: tokens.split(v, lengths) for k, v in step.columns.items()}
        folder = self.ctx.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        with open(folder / f"step-{done:06d}.jsonl", "w", encoding="utf-8") as file:
            apart = -(-len(step.rollouts) // self.ctx.runtime.log_rollouts)
            for i, r in list(enumerate(step.rollouts))[::apart]:  # some of each domain
                row = {
                    "domain": r.prompt.domain,
                    "prompt": r.prompt.text,
                    "response": r.text,
                    "answer": r.prompt.answer,
                    "reward": r.reward,
                    "teacher": r.teacher,
                    "truncated": r.truncated,
                    "ids": r.response_ids,
                    **{k: v[i] for k, v in vectors.items()},
                }
                file.write(json.dumps(row) + "\n")
