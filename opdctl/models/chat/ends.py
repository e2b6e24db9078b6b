"""The tokens that end a response: what a generation config names, and two models' compared."""

from __future__ import annotations

from typing import Any

from opdctl.errors import UsageError


def end_ids(generation: Any) -> list[int]:
    """Return the end tokens of a generation config, which names none, one or several.

    Raises:
        UsageError: it names something else.
    """
    named = getattr(generation, "eos_token_id", None)
    ids = [] if named is None else [named] if isinstance(named, int) else named
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) for i in ids):
        raise UsageError(
            f"eos_token_id of the generation config is {named!r:.60}", "one id, or a list of ids"
        )
    return list(ids)


def different_ends(student: Any, teacher: Any) -> tuple[str, str] | None:
    """Return ``(problem, hint)`` if the teacher has an end token that the student has not.

    The student would learn to write that token and to go on after it.
    """
    foreign = [i for i in teacher.ends if i not in student.ends]
    if student.end_of_turn in teacher.ends and not foreign:
        return None
    ends = [
        " or ".join(repr(chat.tokenizer.convert_ids_to_tokens(i)) for i in chat.ends)
        for chat in (student, teacher)
    ]
    return (
        f"the student ends a response by {ends[0]}, {teacher.name} by {ends[1]}",
        "give both the same eos_token_id in generation_config.json and the same eos_token in "
        "tokenizer_config.json: the student would unlearn its own",
    )
