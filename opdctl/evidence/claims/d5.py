"""D5, DeepSeek-V4: the merged model keeps every specialist and the order of the efforts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import (
    DELTA_RECOVERY,
    Condition,
    gain,
    mean_gain,
    mean_score,
    stage_name,
)
from opdctl.protocols import Claim


class D5(Claim):
    """The merge keeps every specialist and the efforts' order, and beats the average."""

    revision = 1
    statement = "the merge keeps every specialist and the efforts' order"
    source = "DeepSeek-V4, arXiv 2606.19348, Table 7"
    reported = "GPQA-D of V4-Pro 72.9 / 89.1 / 90.1 by effort; specialists not shown"
    threshold = (
        "each domain >= specialist - .05; tokens rise with the effort; "
        "better than the parameter average"
    )

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        average: str = key(REQUIRED, "the parameter average of the specialists", ref=True)
        specialists: dict[str, str] = key(
            REQUIRED, "domain: its specialist", ref=True, domains=True
        )
        efforts: dict[str, dict[str, bool]] = key(
            REQUIRED, "effort: {domain: true}, from the least to the most", domains=True
        )

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test each domain against its specialist, tokens by effort, the mean over the average."""
        student, every = stage_name(roles.student), dict.fromkeys(roles.specialists, True)
        conditions = [
            Condition(f"{d} to its specialist", gain(student, t, d), least=-DELTA_RECOVERY)
            for d, t in roles.specialists.items()
        ]
        efforts = list(roles.efforts.items())
        for (less, few), (more, many) in itertools.pairwise(efforts):
            value = longer(student, many, few)
            conditions.append(
                Condition(f"tokens, {more} minus {less}", value, least=1e-6, delta=0.0)
            )
        ahead = mean_gain(student, roles.average, every)
        return [*conditions, Condition("ahead of the average", ahead, least=0.0)], ""


def longer(model: str, many: dict[str, bool], few: dict[str, bool]):
    """Return the function for the tokens a model writes on some domains beyond those on others."""
    high, low = (mean_score(model, d, "tokens") for d in (many, few))
    return lambda scores: high(scores) - low(scores)
