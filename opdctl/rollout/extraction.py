"""The part of a text that is its answer: its last line, box, number or tag, or a pattern's match.

A domain says so once, for whatever verifies its answers: ``extract`` of a response, ``reference``
of the answer column. A text without such a part has no answer: a response is wrong, and a row is
refused. Always the last one counts, so that a response cannot collect answers: a box or a tag that
is opened last and not closed is no answer, whatever stands before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from opdctl.config.schema import key
from opdctl.errors import Problem

BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")
FRACTION = re.compile(r"\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!,\\!)(?=\d{3}(?!\d))")
NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-\u2212])?[$\u20ac\u00a3\u00a5]?(?<![\w])(?<!\d\.)"
    r"(?P<number>\d+ \d+/\d+|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\d])|\.\d+)"
    r"(?P<over> ?/ ?\d+(?:\.\d+)?)?"
)


@dataclass(kw_only=True)
class Extract:
    """The way to the answer in a text; ``extract: boxed`` is short for ``{take: boxed}``."""

    short: ClassVar[str] = "take"

    take: Literal["all", "last_line", "boxed", "last_number"] = key(
        "all", "all of it, its last line, its last \\boxed{...}, or its last number"
    )
    tag: str = key("", "the last <TAG>...</TAG>, as in answer; empty: none")
    pattern: str = key(
        "", "regular expression: the last match, or its group (the one called answer, or the first)"
    )
    timeout: float = key(1.0, "seconds of one search for the pattern", least=0.01)

    @property
    def chosen(self) -> bool:
        """A flag: something other than the whole text is the answer."""
        return bool(self.take != "all" or self.tag or self.pattern)

    def problems(self, name: str) -> list[Problem]:
        """Return what the schema cannot check of the keys, which stand under ``name``."""
        import regex

        problems = []
        ways = [k for k, on in zip(("take", "tag", "pattern"), self._ways(), strict=True) if on]
        if len(ways) > 1:
            message = f"{' and '.join(ways)} are given, and one of them says what the answer is"
            problems.append(Problem(f"{name}.{ways[-1]}", message, "leave the others out"))
        if self.tag and not re.fullmatch(r"[\w-]+", self.tag):
            message = f"{self.tag!r:.60} is no name of a tag"
            problems.append(Problem(f"{name}.tag", message, "the name alone, as in tag: answer"))
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            message = f"not a regular expression: {error}"
            problems.append(Problem(f"{name}.pattern", message, "quote it in YAML"))
        return problems

    def _ways(self) -> tuple[bool, bool, bool]:
        return self.take != "all", bool(self.tag), bool(self.pattern)

    def __str__(self) -> str:
        if self.tag:
            return f"<{self.tag}>...</{self.tag}>"
        return f"match of {self.pattern!r}" if self.pattern else self.take.replace("_", " ")

    def find(self, text: str) -> str | None:
        """Return the answer in a text, or None if it has none.

        Raises:
            TimeoutError: the search for the pattern took too long.
        """
        if not self.chosen:
            return text
        if self.tag:
            answer = last_tag(text, self.tag)
        elif self.pattern:
            answer = last_match(text, self.pattern, self.timeout)
        elif self.take == "boxed":
            answer = last_box(text)
        elif self.take == "last_number":
            answer = last_number(text)
        else:
            answer = next((line for line in reversed(text.splitlines()) if line.strip()), None)
        return (answer or "").strip() or None


def last_box(text: str) -> str | None:
    r"""Return what the last ``\boxed`` or ``\fbox`` holds; None if there is none or it is open."""
    start = None
    for box in BOX.finditer(text):
        start = box.end()
    if start is None:
        return None
    rest = text[start:].lstrip()
    if not rest.startswith("{"):  # \boxed 3
        return re.split(r"[\s$]", rest, maxsplit=1)[0] or None
    depth = 0
    for place, mark in _braces(rest):
        depth += mark
        if depth == 0:
            return rest[1:place]
    return None


def _braces(text: str) -> list[tuple[int, int]]:
    r"""Return the place of each brace, and 1 or -1; an escaped one (``\{``) is none."""
    marks = re.finditer(r"\\.|[{}]", text, re.DOTALL)
    return [(m.start(), 1 if m[0] == "{" else -1) for m in marks if m[0] in "{}"]


def last_tag(text: str, tag: str) -> str | None:
    """Return what stands in the last tag of a name; None if there is none or it is open."""
    _, opening, rest = text.rpartition(f"<{tag}>")
    inner, closing, _ = rest.partition(f"</{tag}>")
    return inner if opening and closing else None


def last_number(text: str) -> str | None:
    """Return the last number, without a currency sign, a plus or commas between thousands.

    A fraction (``3/4``, ``1 1/2``, LaTeX's of two whole numbers) is one number. Digits in a word
    or an index are none (``x2``). A minus that follows an operand is no sign: 5-3 ends in 3.
    """
    text = LATEX_COMMA.sub(",", FRACTION.sub(r" \1/\2", text))
    last = None
    for last in NUMBER.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    sign = "-" if last["sign"] else ""
    return sign + last["number"].replace(",", "") + (last["over"] or "").replace(" ", "")


def last_match(text: str, pattern: str, timeout: float) -> str | None:
    """Return the last match of a pattern, or its group ``answer``, or its first group.

    Raises:
        TimeoutError: the search took too long.
    """
    import regex

    compiled, last = regex.compile(pattern), None
    for last in compiled.finditer(text, timeout=timeout):  # noqa: B007
        pass
    if last is None:
        return None
    if "answer" in compiled.groupindex:
        return last["answer"]
    return last[1] if compiled.groups else last[0]
