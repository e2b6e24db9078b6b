"""The one loop: draw, reward, score, advantage, update; a line of metrics; a checkpoint.

Every stage that trains is a declaration of what goes into it. It knows no member by name and
never pads, shifts, masks or normalises: tokens.py and update.py do. Within a step the weights
change only in the update, so a stop before it commits the state of the step's start.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict

import torch

from opdctl.core import checkpoint, draws, tokens, update
from opdctl.core.context import Clock, Context
from opdctl.core.metrics import Metrics, Watch, by_domain, mean
from opdctl.core.models import Model
from opdctl.core.scored import Parts, Step, advantage, scored, weigh
from opdctl.errors import Interrupted, StageFailed
from opdctl.kernels.select import rows_class
from opdctl.nets.masters import Masters
from opdctl.rundir import finite
from opdctl.types import FORWARD, Compute, Rollout


def train(ctx: Context, model: Model, parts_of: Callable[[Context, Model], Parts]) -> Compute:
    """Run the loop to its end and commit the stage's ``output/``.

    Args:
        model: the weights to start from; a checkpoint of this stage replaces them.
        parts_of: builds the loop's parts around the model.

    Raises:
        Interrupted: a stop was asked for; a checkpoint is committed.
    """
    compute = Loop(ctx, model, parts_of(ctx, model)).run()
    checkpoint.commit(ctx.folder, model)
    return compute


class Loop:
    """Runs ``config.steps`` steps of a stage, from its newest checkpoint."""

    def __init__(self, ctx: Context, model: Model, parts: Parts) -> None:
        self.ctx, self.model, self.parts = ctx, model, parts
        self.steps, self.optim = ctx.config.steps, ctx.config.optim
        if model.adapter is None and ctx.runtime.masters_of(self.optim.lr):
            model.masters = Masters(model.net)
            print(f"{ctx.name}: the optimizer moves float32 copies of the parameters", flush=True)
        self.optimizer = update.make_optimizer(model, self.optim)
        self.compute, self.watch = Compute(), Watch(ctx.config.watch, ctx.name)
        self.checkpoints = ctx.folder / "checkpoints"

    def run(self) -> Compute:
        """Train to the end.

        Raises:
            Interrupted: a stop was asked for; a checkpoint is committed.
            StageFailed: a watchdog stops it, or there is nothing to train on.
        """
        state = checkpoint.restore(self.checkpoints, self.model, self.optimizer)
        done = 0
        if state:
            done = state["step"]
            self.compute = Compute(**state["compute"])
            self.watch.state = state.get("watch", self.watch.state)
            self._take_up(state.get("members", {}))
        metrics = Metrics(self.ctx.folder, self.ctx.attempt)
        runtime = self.ctx.runtime
        self.kernel = rows_class(runtime.kernel, self.model.device, self.model.wide).name
        print(f"{self.ctx.name}: row pass {self.kernel} on {self.model.device}", flush=True)
        try:
            while done < self.steps:
                self.ctx.check()
                clock = Clock()
                before, members = copy.deepcopy(self.compute), self._states()
                try:
                    values = self._step(done, clock)
                except Interrupted:
                    self.compute = before  # the step will be taken again
                    self._take_up(members)
                    raise
                done += 1
                warnings, stop = self.watch.look(done, values)
                values |= {"warnings": warnings} if warnings else {}
                clock.lap("other")
                metrics.row(done, values, clock.seconds)  # before the checkpoint that covers it
                if stop:
                    raise stop
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

    def _states(self) -> dict[str, dict]:
        """Of the signals that remember something between steps."""
        named = {n: s for n, (_, s) in self.parts.signals.items()}
        return {n: s.state() for n, s in named.items() if hasattr(s, "state")}

    def _take_up(self, states: dict[str, dict]) -> None:
        for name, state in states.items():
            self.parts.signals[name][1].load(state)

    def _save(self, done: int) -> None:
        checkpoint.save(
            self.checkpoints,
            done,
            self.model,
            self.optimizer,
            {
                "compute": asdict(self.compute),
                "watch": self.watch.state,
                "members": self._states(),
            },
            self.ctx.runtime.keep_checkpoints,
        )
        self.ctx.wal.drop(done)

    def _step(self, done: int, clock: Clock) -> dict:
        self.ctx.wal.at(done)
        failed = self.ctx.failed.total()
        rollouts = [r for r in self.parts.source.draw(done) if r.response_ids]
        for rollout in rollouts:
            assert 0 <= done - rollout.version <= 0, "rollouts are of the current weights"
        self._count_rollouts()
        clock.lap("rollout")
        if not rollouts:
            return {"rollouts": 0, "tokens": 0}  # the source refused all of its samples
        if not done:
            self.ctx.show_first(rollouts[0], self.model.tokenizer)
        if self.parts.minibatches > 1:
            rollouts = self._shuffled(rollouts, done)
        before = self.ctx.loads
        step = scored(rollouts, self.model, self.parts, self.ctx, self.compute)
        values = advantage(step, self.parts.signals) | weigh(step, self.parts.terms)
        clock.lap("score")
        if step.taught is not None:
            step.taught.loads = 0  # those of the update alone
        values = {**self._train(step, done), **values}
        if step.taught is not None:
            values |= {
                "head_loads": step.taught.loads,
                "heads": step.taught.most,
                "teacher_loads": self.ctx.loads - before,
            }
        if self.ctx.failed.total() > failed:
            values["verifier_errors"] = self.ctx.failed.total() - failed
        clock.lap("train")
        self._log_rollouts(done + 1, step)
        return values

    def _train(self, step: Step, done: int) -> dict:
        rollouts, model = step.rollouts, self.model
        spans = [r.request for r in rollouts]
        lengths = [r.length for r in rollouts]
        runtime = self.ctx.runtime
        lr = update.lr_at(done, self.steps, self.optim)
        losses, norms, logged, asked, skipped = [], [], {}, 0, 0
        self.ctx.check()
        for _ in range(self.parts.updates):
            for sequences, part in tokens.parts(lengths, self.parts.minibatches):
                cut = {k: v[part] for k, v in step.columns.items()}
                if step.taught is not None:
                    asked += len(cut["teacher_index"].unique())
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
                    layers=self.parts.layers,
                )
                clip = self.optim.clip_norm
                norm, taken = update.step(model, self.optimizer, lr, clip, loss)
                norms.append(norm)
                losses.append(loss)
                skipped += not taken
                for name, vector_N in table.items():
                    logged.setdefault(name, []).append(vector_N)
                self.compute.train_tokens += processed
                self.compute.flops["train"] += model.flops * processed
        values = {
            "loss": mean(losses),
            "grad_norm": mean(norms),
            "lr": lr,
            "kernel": self.kernel,
            "rollouts": len(rollouts),
            "tokens": sum(lengths),
            "length": mean(lengths),
            "truncated": mean(float(r.truncated) for r in rollouts),
        }
        if skipped:
            values["skipped"] = skipped
        if step.taught is not None:
            values["teachers"] = asked  # of each mini-batch, together
        if self.parts.rewards:
            values["reward"] = mean(r.reward for r in rollouts)
            values["reward_by_domain"] = by_domain(rollouts, [r.reward for r in rollouts])
        if self.parts.source.samples_from == "student" and runtime.log_accuracy:
            values["accuracy"] = by_domain(rollouts, self.ctx.verify(rollouts))
        logged = {name: torch.cat(parts) for name, parts in logged.items()}
        values |= {name: float(vector_N.mean()) for name, vector_N in logged.items()}
        values |= self._sampler(step, logged)
        if "divergence" in logged and self.parts.updates == 1:
            sums_B = tokens.per_sequence(logged["divergence"], step.sequence_N, len(rollouts))
            each = [s / n for s, n in zip(sums_B.tolist(), lengths, strict=True)]
            values["divergence_by_domain"] = by_domain(rollouts, each)
        return values

    def _sampler(self, step: Step, logged: dict) -> dict[str, float]:
        """What the sampler's own log-probs say: ``surprise``, an unbiased estimate of the entropy
        of what was sampled from, and how far the trainer's are from them, on average."""
        if "behaviour" not in step.columns:
            return {}
        behaviour_N = step.columns["behaviour"]
        values = {"surprise": -float(behaviour_N.mean())}
        ours_N = step.columns.get("policy")
        mixed = self.parts.source.samples_from != "student"
        if mixed or self.parts.temperature != self.parts.sampled_at:
            return values  # the two sides are not the same distribution
        if ours_N is None and self.parts.updates * self.parts.minibatches == 1:
            ours_N = logged.get("student_logprob")  # the weights that sampled
        if ours_N is not None:
            gap_N = (ours_N - behaviour_N).abs()
            if "masked" in logged:
                gap_N = gap_N[logged["masked"] == 0]
            values["logprob_gap"] = float(gap_N.sum()) / max(1, len(gap_N))
        return values

    def _shuffled(self, rollouts: list[Rollout], done: int) -> list[Rollout]:
        """Groups in an order of the step's own, so that no minibatch is of one domain alone."""
        groups = list(dict.fromkeys(r.group for r in rollouts))
        order = draws.permutation(len(groups), self.ctx.seed, "minibatches", done)
        place = {groups[g]: i for i, g in enumerate(order)}
        return sorted(rollouts, key=lambda r: place[r.group])

    def _count_rollouts(self) -> None:
        """Everything the source sampled, what it then refused included."""
        whole = self.parts.source
        for source in getattr(whole, "sources", [whole]):
            flops = FORWARD * source.parameters * source.sampled
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
        lengths = [r.length for r in step.rollouts]
        flat = {k: v for k, v in step.columns.items() if v.ndim == 1 and k != "domain"}
        vectors = {k: tokens.split(v, lengths) for k, v in flat.items()}
        folder = self.ctx.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        with open(folder / f"step-{done:06d}.jsonl", "w", encoding="utf-8") as file:
            apart = -(-len(step.rollouts) // self.ctx.runtime.log_rollouts)
            for i, r in list(enumerate(step.rollouts))[::apart]:  # some of each domain
                row = {
                    "domain": r.prompt.domain,
                    "prompt": r.prompt.text,
                    "response": r.text,
                    **({"before": r.before} if r.before else {}),
                    "answer": r.prompt.answer,
                    "reward": r.reward,
                    "teacher": r.teacher,
                    "truncated": r.truncated,
                    "ids": r.response_ids,
                    **{k: v[i] for k, v in vectors.items()},
                }
                file.write(json.dumps(finite(row)) + "\n")
