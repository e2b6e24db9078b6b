"""The source of a chat template, changed so that it renders the same bytes on every day.

A template may print the date (``strftime_now``, as Llama 3.2 and SmolLM3 do): the prompts of a
stage that is resumed tomorrow would be others. The date is a key of the run instead
(``runtime.template_date``), put into the source in place of the call. A template that draws at
random has no such key and is refused.
"""

from __future__ import annotations

import datetime
import json
import re

UNDATED = "opdctl-undated"  # in the error of a template that prints the date where there is none
OPENED, CLOSED = "\ufdd2", "\ufdd3"  # around what {% generation %} marks, in the rendering
CALL = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(\"[^\"\\]*\"|'[^'\\]*')\s*\)")
OTHER_USE = re.compile(r"strftime_now\b(?!\s+is\s+(?:not\s+)?defined)")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def with_date(source: str, date: str) -> str:
    """Return the source with the date in place of each call that prints it.

    Args:
        date: in ISO's form; "" makes the template raise an error with UNDATED in it, where it
            comes to the call.
    """

    def printed(match: re.Match[str]) -> str:
        if not date:
            return f"raise_exception({json.dumps(UNDATED)})"
        return json.dumps(datetime.datetime.fromisoformat(date).strftime(match[1][1:-1]))

    return CALL.sub(printed, source)


def with_marks(source: str) -> str:
    """Return the source with OPENED and CLOSED in place of its {% generation %} marks."""
    return GENERATION.sub(
        lambda m: f"{{%{m[1]} if true %}}{CLOSED if m[2] else OPENED}{{% endif {m[3]}%}}", source
    )


def unrepeatable(source: str) -> str:
    """Return what makes two renderings of one conversation differ; "" if nothing does.

    Args:
        source: after ``with_date``.
    """
    import jinja2
    from jinja2 import nodes

    if OTHER_USE.search(COMMENT.sub("", source)):
        return "asks for the date by strftime_now in another way than strftime_now('FORMAT')"
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(with_marks(source))
    except jinja2.TemplateError:
        return ""  # rendering says what is wrong with it
    drawn = {f.name for f in tree.find_all(nodes.Filter)} & {"random"}
    drawn |= {n.name for n in tree.find_all(nodes.Name)} & {"lipsum"}
    return f"draws at random ({', '.join(sorted(drawn))})" if drawn else ""
