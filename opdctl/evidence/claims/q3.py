"""Q3, Qwen3 Table 21: domains that OPD does not train do not fall."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Condition, gain
from opdctl.protocols import Claim


class Q3(Claim):
    """Untrained domains do not fall under OPD."""

    revision = 1
    statement = "untrained domains do not fall under OPD"
    source = "Qwen3, arXiv 2505.09388, Table 21"
    reported = "MMLU-Redux +1.9, GPQA-D +7.7, of math and code prompts"
    threshold = "s >= S0 - .03 on each"

    @dataclass(kw_only=True)
    class Config:
        """The stages and domains of the claim."""

        opd: str = key(REQUIRED, "the student after OPD", ref=True)
        start: str = key(REQUIRED, "its start", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains that OPD did not train", domains=True)

    @staticmethod
    def conditions(roles, runs) -> tuple[list[Condition], str]:
        """Test the change of each domain."""
        return [
            Condition(f"change of {d}", gain(roles.opd, roles.start, d), least=-DELTA)
            for d, on in roles.domains.items()
            if on
        ], ""
