"""What a running stage knows of its surroundings: folders, seed, data, the stop flag."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opdctl import references
from opdctl.core import draws
from opdctl.core.wal import Wal
from opdctl.errors import Interrupted
from opdctl.recipe import Recipe
from opdctl.registry import member
from opdctl.rundir import RunDir, read_json, write_json
from opdctl.schema import to_dict
from opdctl.settings import Runtime
from opdctl.types import Prompt, Rollout


@dataclass
class Context:
    """One attempt at one stage.

    Attributes:
        stop: set by a signal; looked at inside sampling, scoring and updates.
        loop_seconds: time spent in the stage's loop, for the record.
        loads: frozen models loaded so far.
        wal: what was sampled and scored since the last checkpoint.
        inspect: called with the student before its teachers are first asked; may raise.
    """

    run: RunDir
    recipe: Recipe
    name: str
    attempt: int = 1
    device: str = "cpu"
    stop: bool = False
    loop_seconds: float = 0.0
    loads: int = 0
    inspect: Callable[[Any], None] = lambda student: None
    wal: Wal | None = None
    _data: dict[str, Any] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)
    _engine: Any = None

    @property
    def config(self) -> Any:
        return self.recipe.stages[self.name]

    @property
    def runtime(self) -> Runtime:
        return self.recipe.runtime

    @property
    def folder(self) -> Path:
        return self.run.stage(self.name)

    @property
    def seed(self) -> int:
        """H(run seed, stage name), or the seed group's: paired arms share prompts and draws."""
        return draws.key(self.recipe.seed, getattr(self.config, "seed_group", "") or self.name)

    def __post_init__(self) -> None:
        self.wal = self.wal or Wal(self.folder / "wal")

    def check(self) -> None:
        """Raises Interrupted once a stop was asked for."""
        if self.stop:
            raise Interrupted("stopped as asked")

    def path_of(self, reference: str) -> str:
        """Where transformers finds a referenced model."""
        parsed = references.parse(reference)
        if parsed.form == "policy":
            return self.path_of(self.config.student)
        return str(self.run.output(parsed.name)) if parsed.form == "stage" else parsed.name

    def load(self, reference: str, *, device: str = "", classifier: bool = False) -> Any:
        """A model, as the run's keys say.

        Raises:
            UsageError: it cannot be loaded, or is not whole.
        """
        from opdctl.core.models import load

        return load(
            self.path_of(reference),
            dtype=self.runtime.dtype,
            device=device or self.device,
            classifier=classifier,
            trust_remote_code=self.runtime.trust_remote_code,
        )

    def frozen(self, reference: str) -> Any:
        """A frozen model, loaded on demand; the ones that name the same place share their weights.

        With ``runtime.resident_teachers`` the one that was used longest ago makes room.
        """
        path, most = self.path_of(reference), self.runtime.resident_teachers
        if path not in self._models:
            while most and len(self._models) >= most:
                self._models.pop(next(iter(self._models)))
            model = self.load(reference)
            model.net.requires_grad_(False)
            self.loads += 1
            self._models[path] = model
        self._models[path] = self._models.pop(path)  # the newest stands last
        return self._models[path]

    def engine(self, model: Any) -> Any:
        """What samples from a model: one that holds weights is kept, until another model asks."""
        cls = member("engines", self.runtime.engine)
        given = (model, self.runtime.wave, self.check, self.wal)
        if not cls.holds:
            return cls(*given)
        if self._engine is None or self._engine.model is not model:
            if self._engine is not None:
                self._engine.close()
            code = {"trust_remote_code": self.runtime.trust_remote_code}
            self._engine = cls(*given, code | self.runtime.engine_args)
        return self._engine

    def data(self, domain: str) -> Any:
        """The data of a domain, built once."""
        if domain not in self._data:
            config = self.recipe.data[domain]
            self._data[domain] = member("data", config.kind)(config, domain, self.recipe.seed)
        return self._data[domain]

    def environment(self, domain: str) -> Any:
        """What answers the calls of a domain's responses; None without one."""
        for name, config in self.data(domain).config.environment.items():
            return member("environments", name)(config)
        return None

    def obeyed(self, rollout: Rollout) -> bool:
        """Whether the response thinks where its domain asks for it, and only there."""
        return self.data(rollout.prompt.domain).config.thinking.obeyed(rollout.text)

    def verify(self, rollout: Rollout) -> float:
        """1 if the verifier of its domain passes the answer.

        One cut at the limit is wrong, and so is one that disobeys its mode.
        """
        if rollout.right is None:
            data, rollout.right = self.data(rollout.prompt.domain), 0.0
            if not rollout.truncated and self.obeyed(rollout):
                rollout.right = data.score(rollout.prompt, rollout.text)
        return rollout.right

    def prompts(self, domain: str, split: str) -> list[Prompt]:
        """Prompts of a domain. Procedural ones are generated once a run and kept in ``cache/``."""
        data = self.data(domain)
        if not getattr(data, "procedural", False):
            return data.prompts(split)
        config = to_dict(data.config)
        name = f"{domain}-{split}-{draws.key(self.recipe.seed, config, data.revision):016x}.json"
        kept = read_json(self.run / "cache" / name, list)
        if kept is None:
            found = data.prompts(split)
            write_json(self.run / "cache" / name, [asdict(p) for p in found])
            return found
        return [Prompt(**{**p, "calls": tuple(p["calls"])}) for p in kept]


class Clock:
    """Seconds by phase: rollout, score, train; what is left of the whole is other."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.seconds = dict.fromkeys(("rollout", "score", "train", "other"), 0.0)

    def lap(self, phase: str) -> None:
        """Give the time since the last lap to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
