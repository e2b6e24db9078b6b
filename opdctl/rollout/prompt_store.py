"""The prompts of a stage: the data of its domains, what answers their calls, what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from opdctl import draws
from opdctl.config.registry import member
from opdctl.config.schema import to_dict
from opdctl.run import provenance
from opdctl.run.rundir import read_json, write_json
from opdctl.types import Prompt


class PromptStore:
    """Builds the data of each domain once and gives its prompts.

    Attributes:
        counts: what became of the rows of tables, by domain and side of the split.
    """

    def __init__(self, ctx: Any) -> None:
        """Hold a stage's context: its recipe names the data, its run keeps what was generated."""
        self.ctx = ctx
        self.counts: dict[str, dict[str, dict[str, int | str]]] = {}
        self._data: dict[str, Any] = {}
        self._prompts: dict[tuple[str, str], Sequence[Prompt]] = {}

    def data(self, domain: str) -> Any:
        """Return the data of a domain, built once."""
        if domain not in self._data:
            config = self.ctx.recipe.data[domain]
            self._data[domain] = member("data", config.kind)(config, domain, self.ctx.recipe.seed)
        return self._data[domain]

    def environment(self, domain: str) -> Any:
        """Return what answers the calls of a domain's responses; None without one."""
        for name, config in self.data(domain).config.environment.items():
            return member("environments", name)(config)
        return None

    def counted(self, domain: str, split: str, counts: dict[str, int]) -> None:
        """Keep for the record what became of a domain's rows; say what was left out."""
        place = self.counts.setdefault(domain, {}).setdefault(split, {})
        place |= {name: n for name, n in counts.items() if n}
        out = [f"{n} {name}" for name, n in counts.items() if n and name not in ("rows", "kept")]
        if out:
            print(
                f"[{self.ctx.name}] data.{domain}, {split}: left out {', '.join(out)}", flush=True
            )

    def of(self, domain: str, split: str) -> Sequence[Prompt]:
        """Return the prompts of a domain. Procedural ones are generated once a run and kept in
        ``cache/``; those of tables are, where the data says so, on disk and not in memory.
        """
        data = self.data(domain)
        if data.procedural:
            return self._generated(data, domain, split)
        if (domain, split) not in self._prompts:
            stream, cache = data.config.stream, self.ctx.run / "cache"
            rows = data.stored(split, cache) if stream else data.prompts(split)
            self._prompts[domain, split] = rows
            self.counted(domain, split, data.counts[split])
            if data.public and not stream:  # a spool is the run's own copy
                names = (self.ctx.run, self.ctx.recipe, rows, domain, split)
                self.counts[domain][split]["digest"] = provenance.require_same_rows(*names)
        return self._prompts[domain, split]

    def _generated(self, data: Any, domain: str, split: str) -> list[Prompt]:
        config = to_dict(data.config)
        key = draws.key(self.ctx.recipe.seed, config, data.revision)
        path = self.ctx.run / "cache" / f"{domain}-{split}-{key:016x}.json"
        kept = read_json(path, list)
        if kept is None:
            made = data.prompts(split)
            write_json(path, [asdict(p) for p in made])
            return made
        lists = ("calls", "messages", "tools")
        return [Prompt(**{**p, **{k: tuple(p.get(k, ())) for k in lists}}) for p in kept]
