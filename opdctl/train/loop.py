"""The one loop: draw, reward, score, advantage, update; a line of metrics; a checkpoint.

Every stage that trains is a declaration of what goes into it. The loop knows no member by name and
never pads, shifts, masks or normalises: packing.py and update.py do. Within a step the weights
change only in the update, so a stop before it commits the state of the step's start. A controller
that changes weights after the update must restore them if interrupted; the step is then
checkpointed without its change, with its row of metrics, and the controllers act when the stage
goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from opdctl import draws
from opdctl.errors import Interrupted, StageFailed
from opdctl.kernels.select import rows_class
from opdctl.models import packing
from opdctl.models.master_weights import MasterWeights
from opdctl.models.model import Model
from opdctl.protocols import Acts, Reads, Remembers, Starts
from opdctl.scoring import overlap
from opdctl.scoring.asks import Pass
from opdctl.scoring.columns import TEACHER_INDEX
from opdctl.train import checkpoint, update
from opdctl.train.context import Clock, Context
from opdctl.train.fit import states_for_fit
from opdctl.train.metrics import Metrics, Watch, joined
from opdctl.train.rollout_log import log_rollouts
from opdctl.train.score_step import score_step, set_advantage, set_weights
from opdctl.train.step import Step, TrainSetup
from opdctl.train.step_metrics import step_metrics
from opdctl.train.update import Batch, UpdateResult
from opdctl.types import FORWARD, Compute, Rollout


def train(ctx: Context, model: Model, setup_of: Callable[[Context, Model], TrainSetup]) -> Compute:
    """Run the loop to its end and commit the stage's ``output/``.

    Args:
        model: the weights to start from; a checkpoint of this stage replaces them.
        setup_of: builds the loop's setup around the model.

    Raises:
        Interrupted: a stop was asked for; a checkpoint is committed.
    """
    compute = Loop(ctx, model, setup_of(ctx, model)).run()
    checkpoint.commit(ctx.folder, model)
    return compute


def count_rollouts(source: Any, compute: Compute) -> None:
    """Add to the ledger everything a source sampled last, what it then refused included."""
    for part in source.sources:
        flops = FORWARD * part.parameters * part.sampled
        if part.samples_from == "teacher":
            compute.teacher_sampled_tokens += part.sampled
            compute.flops["teacher_sampling"] += flops
        else:
            compute.rollout_tokens += part.sampled
            compute.flops["rollout"] += flops


class Loop:
    """The loop over ``config.steps`` steps of a stage, from its newest checkpoint."""

    def __init__(self, ctx: Context, model: Model, setup: TrainSetup) -> None:
        self.ctx, self.model, self.setup = ctx, model, setup
        self.pass_ = Pass.of(ctx, setup.temperature)
        self.steps, self.optim = ctx.config.steps, ctx.config.optim
        narrow = any(
            p.dtype.itemsize < 4 for p in model.trainable_parameters().values()
        )  # no adapter is
        if narrow and ctx.runtime.masters_of(self.optim.lr):
            model.masters = MasterWeights(model.net)
            print(f"{ctx.name}: the optimizer moves float32 copies of the parameters", flush=True)
        self.optimizer = update.make_optimizer(model, self.optim)
        self.compute, self.watch = Compute(), Watch(ctx.config.watchdogs, ctx.name)
        self.checkpoints = ctx.folder / "checkpoints"
        self.row: dict = {}  # of a step whose controllers have not acted yet
        self.overlap_k = overlap.top_of(model.lm_head()) if setup.teachers else 0
        held = max((t.objective.compares for t in setup.terms), default=0)
        self.apart = held < self.overlap_k  # nothing in the update logs the overlap

    def run(self) -> Compute:
        """Train to the end.

        Raises:
            Interrupted: a stop was asked for; a checkpoint is committed.
            StageFailed: a watchdog stops it, or there is nothing to train on.
        """
        state = checkpoint.restore(self.checkpoints, self.model, self.optimizer)
        done = 0
        if state:
            self.row = state.get("row", {})
            done = state["step"] - bool(self.row)
            self.compute = Compute(**state["compute"])
            self.watch.state = state.get("watch", self.watch.state)
            self._take_up(state.get("members", {}))
        else:
            for controller in self.setup.controllers.values():
                if isinstance(controller, Starts):
                    controller.start()
        metrics = Metrics(self.ctx.folder, self.ctx.attempt)
        runtime = self.ctx.runtime
        self.kernel = rows_class(runtime.kernel, self.model.device, self.model.logits_dtype).name
        print(f"{self.ctx.name}: row pass {self.kernel} on {self.model.device}", flush=True)
        try:
            while done < self.steps:
                self.ctx.check()
                clock = Clock()
                self.row = self.row or self._whole(self._step, done, clock)
                values = joined(self.row, self._whole(self._act, done, clock))
                done, self.row = done + 1, {}
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
            if done or self.row:
                self._save(done)
            raise
        finally:
            metrics.close()
        if not self.compute.train_tokens:
            raise StageFailed(
                "no step had anything to train on",
                "the source refused all of its samples, or masks left none of their tokens",
            )
        return self.compute

    def _whole(self, part: Callable[[int, Clock], dict], done: int, clock: Clock) -> dict:
        """Run a part of a step. Cut, it is taken again: ledger and members go back."""
        before, members = copy.deepcopy(self.compute), self._states()
        try:
            return part(done, clock)
        except Interrupted:
            self.compute = before
            self._take_up(members)
            raise

    def _members(self) -> dict[str, Any]:
        """Return signals, controllers and objectives that remember something between steps."""
        named = {n: s for n, (_, s) in self.setup.signals.items()}
        named |= {f"controllers.{n}": c for n, c in self.setup.controllers.items()}
        own = (term.objective for term in self.setup.terms)
        named |= {f"objectives.{type(o).__name__}": o for o in own}
        return {n: m for n, m in named.items() if isinstance(m, Remembers)}

    def _states(self) -> dict[str, dict]:
        return {name: member.state() for name, member in self._members().items()}

    def _take_up(self, states: dict[str, dict]) -> None:
        members = self._members()
        for name, state in states.items():
            members[name].load(state)

    def _save(self, done: int) -> None:
        """Commit the state after ``done`` steps, and after the one whose row is still held."""
        state = {"compute": asdict(self.compute), "watch": self.watch.state, "row": self.row}
        checkpoint.save(
            self.checkpoints,
            done + bool(self.row),
            self.model,
            self.optimizer,
            state,
            self.ctx.runtime.keep_checkpoints,
            self._states(),
        )
        self.ctx.wal.drop(done)

    def _act(self, done: int, clock: Clock) -> dict:
        """Let the controllers act on the weights of this step's end; return what to log of it."""
        values = {}
        for name, controller in self.setup.controllers.items():
            if isinstance(controller, Acts):
                values |= {f"{name}_{k}": v for k, v in controller.act(done + 1).items()}
                sampled = controller.sampled
                self.compute.rollout_tokens += sampled
                self.compute.flops["rollout"] += FORWARD * self.model.parameters * sampled
                clock.lap("rollout")
        return values

    def _step(self, done: int, clock: Clock) -> dict:
        values = {} if done else self._fit()
        self.ctx.wal.at(done)
        failed = self.ctx.verdicts.failed.total()
        rollouts = [r for r in self.setup.source.draw(done) if r.response_ids]
        for rollout in rollouts:
            assert 0 <= done - rollout.version <= 0, "rollouts are of the current weights"
        count_rollouts(self.setup.source, self.compute)
        clock.lap("rollout")
        if not rollouts:
            return {"rollouts": 0, "tokens": 0}  # the source refused all of its samples
        if not done:
            self.ctx.show_first(rollouts[0], self.model.tokenizer)
        if self.setup.minibatches > 1:
            rollouts = self._shuffled(rollouts, done)
        before = self.ctx.models.loads
        step = score_step(rollouts, self.model, self.setup, self.ctx, self.compute)
        values = joined(
            values, set_advantage(step, self.setup.signals), set_weights(step, self.setup.terms)
        )
        for name, controller in self.setup.controllers.items():
            if isinstance(controller, Reads):
                read = {f"{name}_{k}": v for k, v in controller.read(step).items()}
                values = joined(values, read)
        seen = self._overlap(step, done)
        clock.lap("score")
        if step.teacher_cache is not None:
            step.teacher_cache.loads = 0  # those of the update alone
        updates = self._update(step, done)
        verdicts = None
        if self.setup.source.samples_from == "student" and self.ctx.runtime.log_accuracy:
            verdicts = self.ctx.verdicts.verify(rollouts)
        of_step = step_metrics(step, updates, self.setup, self.kernel, verdicts)
        values = seen | joined(of_step, values)
        more = {"overlap_k": self.overlap_k} if "overlap" in values else {}
        if step.teacher_cache is not None:
            more |= {
                "head_loads": step.teacher_cache.loads,
                "heads": step.teacher_cache.most,
                "teacher_loads": self.ctx.models.loads - before,
            }
        if self.ctx.verdicts.failed.total() > failed:
            more["verifier_errors"] = self.ctx.verdicts.failed.total() - failed
        values = joined(values, more)
        clock.lap("train")
        if self._due(done + 1, self.ctx.runtime.log_rollouts_every):
            log_rollouts(self.ctx.folder, done + 1, step, self.ctx.runtime.log_rollouts)
        return values

    def _overlap(self, step: Step, done: int) -> dict[str, float]:
        """Return how student and teachers overlap, where a pass of its own is due to measure it."""
        due = self._due(done + 1, self.ctx.runtime.log_overlap_every)
        if not (self.apart and due):
            return {}
        most = self.ctx.runtime.log_rollouts
        pairs = (step.teacher_requests, step.rollouts)
        return overlap.logged(self.model, self.setup.teachers, *pairs, self.pass_, most)

    def _fit(self) -> dict[str, float]:
        """Fit the objectives that are fitted before the first step; return what to log of it."""
        values = {}
        for objective in (t.objective for t in self.setup.terms if t.objective.fitted):
            values |= objective.fit(self._pairs(objective.which))
        return values

    def _pairs(self, which: str) -> Iterator[list]:
        """Yield hidden states of both sides, a step's rollouts of the start at a time. Such steps
        have numbers below 0, so that no draw of theirs is one of training."""
        step = 0
        while True:
            step -= 1
            self.ctx.check()
            self.ctx.wal.at(step)
            rollouts = [r for r in self.setup.source.draw(step) if r.response_ids]
            count_rollouts(self.setup.source, self.compute)
            if not rollouts:
                raise StageFailed("nothing to fit on", "the source refused all of its samples")
            yield states_for_fit(rollouts, self.model, self.setup, self.ctx, self.compute, which)

    def _update(self, step: Step, done: int) -> list[UpdateResult]:
        """Move the weights: one result for each optimizer step, or for what had no token for it."""
        spans, lengths = [r.request for r in step.rollouts], [r.length for r in step.rollouts]
        results = []
        lr = update.lr_at(done, self.steps, self.optim)
        self.ctx.check()
        for _ in range(self.setup.updates):
            for sequences, tokens in packing.minibatch_slices(lengths, self.setup.minibatches):
                columns = {k: v[tokens] for k, v in step.columns.items()}
                batch = self.setup.batch(spans[sequences], columns, step.teacher_cache)
                result = self._moved(batch, lr)
                result.lr = lr
                results.append(result)
                self.compute.train_tokens += result.processed
                self.compute.flops["train"] += self.model.flops * result.processed
        return results

    def _moved(self, batch: Batch, lr: float) -> UpdateResult:
        """Take one optimizer step, unless there is nothing to learn from: AdamW would move the
        weights by its momentum and its decay alone."""
        device = self.model.device
        if batch.is_empty(device):
            return UpdateResult.of_nothing(int(batch.lengths.sum()), device)
        result = update.accumulate(self.model, batch, self.pass_)
        if batch.teacher_cache is not None:
            result.teachers = len(batch.columns[TEACHER_INDEX].unique())
        clip, shut = self.optim.clip_norm, result.shut
        moved = update.step(self.model, self.optimizer, lr, clip, result.loss, shut)
        result.norm, result.taken = moved
        result.empty = shut and result.norm == 0.0
        return result

    def _shuffled(self, rollouts: list[Rollout], done: int) -> list[Rollout]:
        """Return the groups in an order of the step's own, so that minibatches mix domains."""
        groups = list(dict.fromkeys(r.group for r in rollouts))
        order = draws.permutation(len(groups), self.ctx.seed, "minibatches", done)
        place = {groups[g]: i for i, g in enumerate(order)}
        return sorted(rollouts, key=lambda r: place[r.group])

    def _due(self, done: int, every: int) -> bool:
        """Return True where a step is logged: each so many, the first and the last."""
        return bool(every) and (done % every == 0 or done in (1, self.steps))
