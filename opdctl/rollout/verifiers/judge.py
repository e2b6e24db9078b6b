"""A model on this machine judges: ``verifier: {judge: {model: ./judge}}``, or ``stage:NAME``.

Its text is sampled from the whole distribution, at a temperature near 0, with draws named by the
question alone: the same answer of one step gets the same verdict after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.config.settings import Sampling
from opdctl.rollout.verifiers._judge import JudgeKeys, JudgeVerifier


class Judge(JudgeVerifier):
    """A language model, loaded here, says whether an answer is right."""

    revision = 1

    @dataclass(kw_only=True)
    class Config(JudgeKeys):
        """The keys of a judge on this machine."""

        model: str = key(REQUIRED, "stage:NAME, a folder or a public name", ref=True)
        sampling: Sampling = key(Sampling(temperature=0.01, max_tokens=256), "how it writes")

    def replies(self, questions):
        """Return the judge's texts, sampled in batches as rollouts are.

        Raises:
            UsageError: the model cannot be loaded.
            Interrupted: a stop was asked for.
        """
        from opdctl import draws
        from opdctl.config.registry import member

        model, sampling = self.ctx.models.frozen(self.config.model), self.config.sampling
        engine = member("engines", "transformers")(model, self.ctx.runtime.wave, self.ctx.check)
        drawn = engine.generate(
            [model.render(question) for _, question in questions],
            [draws.key(self.ctx.seed, "judge", prompt.id, text) for prompt, text in questions],
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
        )
        return [model.decode(sample.ids) for sample in drawn]
