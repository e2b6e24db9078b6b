"""The surroundings of a running stage: its folder, its keys, its seed, its log, the stop flag."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opdctl import draws
from opdctl.config.settings import Runtime, Sampling
from opdctl.errors import Interrupted
from opdctl.models.chat.example import build_example, plain_text
from opdctl.models.model_store import ModelStore
from opdctl.recipe.recipe import Recipe
from opdctl.rollout.prompt_store import PromptStore
from opdctl.rollout.verdicts import Verifiers
from opdctl.run.rundir import RunDir, write_json
from opdctl.train.wal import Wal
from opdctl.types import Rollout


@dataclass
class Context:
    """An attempt at one stage. Its models, prompts and verdicts are objects of their own.

    Attributes:
        stop: set by a signal; looked at inside sampling, scoring and updates.
        longest: limit of a turn now, where a controller moves it; 0 is the keys'.
        loop_seconds: time spent in the stage's loop, for the record.
        inspect: called with the student before its teachers are first asked; may raise.
        log_folder: where ``wal`` is, what was sampled and scored since the last checkpoint; None is
            in the stage's own folder.
    """

    run: RunDir
    recipe: Recipe
    name: str
    attempt: int = 1
    device: str = "cpu"
    stop: bool = False
    longest: int = 0
    loop_seconds: float = 0.0
    inspect: Callable[[Any], None] = lambda student: None
    log_folder: Path | None = None

    def __post_init__(self) -> None:
        self.wal = Wal(self.log_folder or self.folder / "wal")
        self.models, self.prompts = ModelStore(self), PromptStore(self)
        self.verdicts = Verifiers(self)

    @property
    def config(self) -> Any:
        return self.recipe.stages[self.name]

    @property
    def sampling(self) -> Sampling:
        """The stage's keys of that name, with the limit as it is now."""
        keys = self.config.sampling
        return replace(keys, max_tokens=self.longest) if self.longest else keys

    @property
    def runtime(self) -> Runtime:
        return self.recipe.runtime

    @property
    def folder(self) -> Path:
        return self.run.stage(self.name)

    @property
    def seed(self) -> int:
        """The seed H(run seed, stage name), or the seed group's: paired arms share prompts and
        draws."""
        return draws.key(self.recipe.seed, self.config.seed_group or self.name)

    def check(self) -> None:
        """Raise Interrupted once a stop was asked for."""
        if self.stop:
            raise Interrupted("stopped as asked")

    def show_first(self, rollout: Rollout, tokenizer: Any, trained: bool = True) -> None:
        """Leave the stage's first prompt in ``example.json`` and, the loss in [[ ]], in the log."""
        first = build_example(rollout, tokenizer, trained)
        write_json(self.folder / "example.json", first)
        print(f"{self.name}: {plain_text(first)}", flush=True)


class Clock:
    """The seconds of each phase: rollout, score, train; what is left of the whole is other."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        phases: list[str] = ["rollout", "score", "train", "other"]
        self.seconds = dict.fromkeys(phases, 0.0)

    def lap(self, phase: str) -> None:
        """Give the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
