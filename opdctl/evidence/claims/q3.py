"""Q3, Qwen3 Table 21: domains that OPD does not train do not fall."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key
from opdctl.evidence.verdict import DELTA, Part, gain


class Q3:
    """Untrained domains do not fall under OPD."""

    revision = 1
    statement = "untrained domains do not fall under OPD"
    source = "Qwen3, arXiv 2505.09388, Table 21"
    reported = "MMLU-Redux +1.9, GPQA-D +7.7, of math and code prompts"
    threshold = "s >= S0 - .03 on each"

    @dataclass(kw_only=True)
    class Config:
        """Who plays."""

        opd: str = key(REQUIRED, "the student after OPD", ref=True)
        start: str = key(REQUIRED, "its start", ref=True)
        domains: dict[str, bool] = key(REQUIRED, "domains that OPD did not train", domains=True)

    @staticmethod
    def parts(roles, found) -> tuple[list[Part], str]:
        """The change of each."""
        return [
            Part(f"change of {d}", gain(roles.opd, roles.start, d), least=-DELTA)
            for d, on in roles.domains.items()
            if on
        ], ""
