"""The characters of a text that a tokenizer drops, after its own normaliser has read the text.

A normaliser may write a character in another way (NFC, as the Qwen family: e and its accent become
one; NFKC, lower case, a mark for a space). That is reading, not dropping: what is looked for is a
character that leaves no trace, in the normalised text or in the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def dropped_characters(tokenizer: Any, text: str) -> list[str]:
    """Return the characters of a text, white space aside, that leave no trace in its ids.

    Args:
        tokenizer: a fast one, which knows the places that each token covers.
    """
    normalise = _normaliser(tokenizer)
    if normalise is None:
        return _uncovered(tokenizer, text)
    read = normalise(text)
    gone = [
        c
        for c in dict.fromkeys(text)
        if c not in read and not c.isspace() and normalise(text.replace(c, "")) == read
    ]
    if gone or not _uncovered(tokenizer, text):
        return gone
    return _uncovered(tokenizer, read)  # the places of a joined character count as its first alone


def _normaliser(tokenizer: Any) -> Callable[[str], str] | None:
    normaliser = tokenizer.backend_tokenizer.normalizer
    return normaliser and normaliser.normalize_str


def _uncovered(tokenizer: Any, text: str) -> list[str]:
    """Return the characters that no token covers."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    covered = {i for start, stop in spans["offset_mapping"] for i in range(start, stop)}
    return [c for i, c in enumerate(text) if i not in covered and not c.isspace()]
