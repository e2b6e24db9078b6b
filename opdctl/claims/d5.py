"""D5, DeepSeek-V4: the merged model keeps every specialist and the order of the efforts."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.schema import REQUIRED, key
from opdctl.verdict import DELTA_RECOVERY, Part, mean_score, name


class D5:
    """The merge keeps every specialist and the efforts' order, and beats the average."""

    revision = 1
    statement = "the merge keeps every specialist and the efforts' order"
    source = "DeepSeek-V4, arXiv 2606.19348, Table 7"
    threshold = (
        "each domain >= specialist - .05; tokens rise with the effort; "
        "better than the parameter average"
    )

    @dataclass(kw_only=True)
    class Config:
        """Who plays."""

        student: str = key(REQUIRED, "the distilled student", ref=True)
        average: str = key(REQUIRED, "the parameter average of the specialists", ref=True)
        specialists: dict[str, str] = key(REQUIRED, "domain: its specialist", ref=True)
        efforts: dict[str, dict[str, bool]] = key(
            REQUIRED, "effort: {domain: true}, from the least to the most"
        )

    @staticmethod
    def parts(roles, found) -> tuple[list[Part], str]:
        """The domain furthest below its specialist, tokens by effort, the mean over the average."""
        student, every = name(roles.student), dict.fromkeys(roles.specialists, True)
        behind = [
            Part(
                f"{d} to its specialist",
                lambda s, d=d, t=name(t): s[student, d] - s[t, d],
                least=-DELTA_RECOVERY,
            )
            for d, t in roles.specialists.items()
        ]
        worst = min(behind, key=lambda part: sum(part.value(m.scores()) for m in found))
        parts, efforts = [worst], list(roles.efforts.items())
        for (less, few), (more, many) in zip(efforts, efforts[1:], strict=False):
            low, high = (mean_score(student, d, "tokens") for d in (few, many))
            value = lambda s, a=low, b=high: b(s) - a(s)  # noqa: E731
            parts.append(Part(f"tokens, {more} minus {less}", value, least=1e-6, delta=0.0))
        ours, average = (mean_score(m, every) for m in (student, name(roles.average)))
        ahead = Part("ahead of the average", lambda s: ours(s) - average(s), least=0.0)
        return [*parts, ahead], ""
