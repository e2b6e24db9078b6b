"""What a running stage knows of its surroundings: folders, seed, data, the stop flag."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from opdctl import draws
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.config.schema import to_dict
from opdctl.config.settings import Runtime, Sampling
from opdctl.errors import Interrupted, StageFailed
from opdctl.models.chat.example import build_example, plain_text
from opdctl.recipe.recipe import Recipe
from opdctl.run import provenance
from opdctl.run.rundir import RunDir, read_json, write_json
from opdctl.train.wal import Wal
from opdctl.types import Prompt, Rollout

HOPELESS = 32  # answers that a verifier may raise on before the stage fails, if it passed none


@dataclass
class Context:
    """One attempt at one stage.

    Attributes:
        stop: set by a signal; looked at inside sampling, scoring and updates.
        longest: limit of a turn now, where a controller moves it; 0 is the keys'.
        loop_seconds: time spent in the stage's loop, for the record.
        loads: frozen models loaded so far.
        wal: what was sampled and scored since the last checkpoint.
        failed: answers that a domain's verifier raised on.
        counts: what became of the rows of tables, by domain and side of the split.
        inspect: called with the student before its teachers are first asked; may raise.
    """

    run: RunDir
    recipe: Recipe
    name: str
    attempt: int = 1
    device: str = "cpu"
    stop: bool = False
    longest: int = 0
    loop_seconds: float = 0.0
    loads: int = 0
    inspect: Callable[[Any], None] = lambda student: None
    wal: Wal | None = None
    failed: Counter = field(default_factory=Counter)
    _asked: Counter = field(default_factory=Counter)
    _data: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    _prompts: dict[tuple[str, str], Sequence[Prompt]] = field(default_factory=dict)
    _verifiers: dict[str, Any] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)
    _engine: Any = None

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
        if parsed.form == "public":
            from opdctl.remote.hub import adapter_of

            return adapter_of(parsed.name) or parsed.name
        return str(self.run.output(parsed.name)) if parsed.form == "stage" else parsed.name

    def load(
        self, reference: str, *, device: str = "", classifier: bool = False, trained: bool = False
    ) -> Any:
        """A model, as the run's keys say; an adapter is merged into its base.

        Args:
            trained: gradients are taken of it.

        Raises:
            UsageError: it cannot be loaded, or is not whole.
        """
        path = self.path_of(reference)
        base = references.base_of(path)
        gradient_checkpointing = trained and self.runtime.gradient_checkpointing
        where = device or self.device
        model = self._load(
            base or path,
            device=where,
            classifier=classifier,
            gradient_checkpointing=gradient_checkpointing,
        )
        if base:
            from opdctl.models.lora import merged

            return merged(model, path)
        return model

    def _load(self, path: str, **options: Any) -> Any:
        from opdctl.models.model import load

        runtime = self.runtime
        options |= {"dtype": runtime.dtype, "attn": runtime.attn, "packing": runtime.packing}
        options["trust_remote_code"] = runtime.trust_remote_code
        return load(path, **options)

    def student(self, classifier: bool = False) -> Any:
        """The model that the stage trains, at its start, with an adapter if the keys say so; one
        that it starts from is trained further."""
        lora = getattr(self.config, "lora", None)
        if lora is None or not lora.rank:
            return self.load(self.config.student, classifier=classifier, trained=True)
        from opdctl.models.lora import attach, continue_adapter, unadapted_matrices

        path = self.path_of(self.config.student)
        base, gradient_checkpointing = references.base_of(path), self.runtime.gradient_checkpointing
        how = {
            "device": self.device,
            "classifier": classifier,
            "gradient_checkpointing": gradient_checkpointing,
        }
        model = self._load(base or path, **how)
        if base:
            continue_adapter(model, path, lora, base)
        else:
            attach(model, lora, path, draws.key(self.seed, "lora") % 2**63)
            if missed := unadapted_matrices(model, lora):
                print(f"[{self.name}] warning: peft adapts no {', '.join(missed)}", flush=True)
        return model

    def frozen(self, reference: str) -> Any:
        """A frozen model, loaded on demand; the ones that name the same place share their weights,
        and adapters share those of their base.

        With ``runtime.resident_teachers`` the one that was used longest ago makes room.
        """
        from opdctl.models.shared_base import SharedBase

        path, most = self.path_of(reference), self.runtime.resident_teachers
        base = references.base_of(path)
        place = base or path
        if place not in self._models:
            while most and len(self._models) >= most:
                self._models.pop(next(iter(self._models)))
            self._models[place] = SharedBase(self._load(place, device=self.device))
            self.loads += 1
        self._models[place] = self._models.pop(place)  # the newest stands last
        return self._models[place].view(path if base else "")

    def start(self) -> Any:
        """The stage's student at its start, frozen, prompted as it will be."""
        return self.aligned(self.frozen(self.config.student))

    def aligned(self, model: Any) -> Any:
        """The student, or its outline, with the chat template that the stage prompts it by.

        Raises:
            UsageError: the model that is to bring one has none.
        """
        reference = getattr(self.config, "template", None)
        if reference:
            from opdctl.models.model import template_of

            path = self.path_of(reference)
            place = references.base_of(path) or path
            model.take_template(template_of(place, self.runtime.trust_remote_code), reference)
        return model

    def show_first(self, rollout: Rollout, tokenizer: Any, trained: bool = True) -> None:
        """Leave the stage's first prompt in ``example.json`` and, the loss in [[ ]], in the log."""
        found = build_example(rollout, tokenizer, trained)
        write_json(self.folder / "example.json", found)
        print(f"{self.name}: {plain_text(found)}", flush=True)

    def engine(self, model: Any, blend: tuple[Any, float] | None = None) -> Any:
        """What samples from a model: one that holds weights is kept while it can take the model's.

        Args:
            blend: another model and its share in every token; by the transformers engine alone.
        """
        given = (model, self.runtime.wave, self.check, self.wal)
        if blend:
            return member("engines", "transformers")(*given, blend)
        cls = member("engines", self.runtime.engine)
        if not cls.has_own_weights:
            return cls(*given)
        ours = self._engine
        if ours is not None and not (ours.model is model or ours.switch_model(model)):
            ours.close()
            self._engine = None
        if self._engine is None:
            self._engine = cls(*given, cls.settings(self.runtime))
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
        return self.data(rollout.prompt.domain).config.thinking.follows_mode(rollout.text)

    def verify(self, rollouts: list[Rollout]) -> list[float]:
        """1 for each whose answer the verifier of its domain passes; also set as ``right``.

        One cut at the limit is wrong, and so is one that disobeys its mode. What a verifier raises
        on an answer counts as wrong, in ``failed``, and is said once for each domain.

        Raises:
            StageFailed: the verifier of a domain raised on every one of its first answers.
        """
        asked: dict[str, list[Rollout]] = {}
        verdicts = {id(r): r.right for r in rollouts}
        for rollout in (r for r in rollouts if r.right is None):
            verdicts[id(rollout)] = 0.0
            if not rollout.truncated and self.obeyed(rollout):
                asked.setdefault(rollout.prompt.domain, []).append(rollout)
        for domain, waiting in asked.items():
            for rollout, found in zip(waiting, self._verdicts(domain, waiting), strict=True):
                self._asked[domain] += 1
                if isinstance(found, Exception):
                    self._raised(domain, rollout, found)
                else:
                    verdicts[id(rollout)] = found
        for rollout in rollouts:
            rollout.right = verdicts[id(rollout)]
        return [r.right for r in rollouts]

    def _verdicts(self, domain: str, rollouts: list[Rollout]) -> list[float | Exception]:
        """Of the verifier that a domain names, made once; or of its data, which brings its own."""
        data = self.data(domain)
        if data.procedural:
            return [data.score(r.prompt, r.text) for r in rollouts]
        if domain not in self._verifiers:
            ((name, config),) = data.config.verifier.items()
            self._verifiers[domain] = member("verifiers", name)(config, self, domain)
        thinking = data.config.thinking
        return self._verifiers[domain].score(
            [(r.prompt, thinking.split(r.text)[1]) for r in rollouts]
        )

    def _raised(self, domain: str, rollout: Rollout, error: Exception) -> None:
        self.failed[domain] += 1
        count, what = self.failed[domain], f"{type(error).__name__}: {error!s:.300}"
        if count == 1:
            said = (
                f"the verifier of data.{domain} raised on an answer to prompt {rollout.prompt.id}"
            )
            print(f"[{self.name}] warning: {said}, which counts as wrong: {what}", flush=True)
        if count == self._asked[domain] == HOPELESS:
            raise StageFailed(
                f"the verifier of data.{domain} raised on each of {count} answers, lastly: {what}",
                f"data.{domain}.verifier: does it fit the data?",
            )

    def counted(self, domain: str, split: str, counts: dict[str, int]) -> None:
        """Keep for the record what became of a domain's rows; say what was left out."""
        place = self.counts.setdefault(domain, {}).setdefault(split, {})
        place |= {name: n for name, n in counts.items() if n}
        out = [f"{n} {name}" for name, n in counts.items() if n and name not in ("rows", "kept")]
        if out:
            print(f"[{self.name}] data.{domain}, {split}: left out {', '.join(out)}", flush=True)

    def prompts(self, domain: str, split: str) -> Sequence[Prompt]:
        """Prompts of a domain. Procedural ones are generated once a run and kept in ``cache/``;
        those of tables are, where the data says so, on disk and not in memory.
        """
        data = self.data(domain)
        if not data.procedural:
            if (domain, split) not in self._prompts:
                stream = data.config.stream
                found = data.stored(split, self.run / "cache") if stream else data.prompts(split)
                self._prompts[domain, split] = found
                self.counted(domain, split, data.counts[split])
                if data.public and not stream:  # a spool is the run's own copy
                    digest = provenance.require_same_rows(
                        self.run, self.recipe, found, domain, split
                    )
                    self.counts[domain][split]["digest"] = digest
            return self._prompts[domain, split]
        config = to_dict(data.config)
        name = f"{domain}-{split}-{draws.key(self.recipe.seed, config, data.revision):016x}.json"
        kept = read_json(self.run / "cache" / name, list)
        if kept is None:
            found = data.prompts(split)
            write_json(self.run / "cache" / name, [asdict(p) for p in found])
            return found
        lists = ("calls", "messages", "tools")
        return [Prompt(**{**p, **{k: tuple(p.get(k, ())) for k in lists}}) for p in kept]


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
