"""Rendered text -> ids, where text that spells a control token and is guarded stays text.

Without a guard this is the tokenizer's own encoding. With one the tokenizer has a twin, in which
every control token is spelled by characters of a private plane: the tokens that the template wrote
are put into that spelling, those of the content are not, and the twin reads the whole as one text,
with the merges and the word starts that the tokenizer gives to text.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import cached_property
from typing import Any

from opdctl.errors import UsageError
from opdctl.models.chat.control_tokens import GUARDS, ControlTokens, unguarded

PRIVATE, FILL = 0x100000, "\ufdd1"  # first character of a control token in the twin; the others


class TextEncoder:
    """Encodes guarded text by a tokenizer.

    Args:
        tokenizer: the tokenizer of a model.
        control: its control tokens.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens) -> None:
        self.tokenizer, self.control, self.name = tokenizer, control, control.name

    def ids(self, text: str) -> list[int]:
        """Return the ids of rendered text, without tokens that a post-processor adds.

        Raises:
            UsageError: content spells a control token, and the tokenizer cannot write it as text.
        """
        if GUARDS[0] in text or GUARDS[1] in text:
            return self.spans(text)[0]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids, and for each its place ``(from, to)`` in the text without guards.

        Raises:
            UsageError: as ``ids``; or the tokenizer is none of the tokenizers library.
        """
        if not self.tokenizer.is_fast:
            raise UsageError(
                f"{self.name}: its tokenizer ({type(self.tokenizer).__name__}) does not say where "
                f"its tokens stand in {unguarded(text)[:60]!r}",
                "a tokenizer of the tokenizers library (tokenizer.json): content that spells a "
                "control token and {% generation %} marks need it",
            )
        if unguarded(text) == text:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(encoded["input_ids"]), list(encoded["offset_mapping"])
        return self._as_text(text)

    def tail(self, text: str) -> str:
        """Return rendered text from its last control token on, which what follows depends on."""
        start = 0
        for match in self.control.pieces.finditer(text):
            start = match.start() if match[2] else start
        return text[start:]

    def _as_text(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        parts: list[str] = []  # the text in the twin's spelling, as long as the text itself
        own, spelled = [], []
        at = length = 0
        for match in [*self.control.pieces.finditer(text), None]:
            plain = text[at : match.start() if match else None]
            if any(ord(c) >= PRIVATE or c == FILL for c in plain):
                raise self._cannot(plain, "it has characters of Unicode's last plane")
            parts.append(plain)
            length += len(plain)
            if match is None:
                break
            token, at = match[1] or match[2] or "", match.end()
            parts.append(self.private[token] if match[2] else token)
            own += [self.control.ids[token]] if match[2] else []
            spelled += [(token, length)] if match[1] else []
            length += len(token)
        encoding = self.twin.encode("".join(parts), add_special_tokens=False)
        read: list[int] = encoding.ids
        ids = [self.real.get(i, i) for i in read]
        controls = set(self.control.ids.values()) - {self.tokenizer.unk_token_id}
        if [i for i in ids if i in controls] != [i for i in own if i in controls]:
            raise self._cannot(spelled[0][0] if spelled else text, "its vocabulary holds it")
        self._require_written(spelled, ids, encoding.offsets)
        return ids, encoding.offsets

    def _require_written(self, spelled: list, ids: list[int], offsets: list) -> None:
        """Check that the tokenizer has tokens for the characters of each spelled token."""
        unknown = self.tokenizer.unk_token_id
        starts = [start for start, _ in offsets]
        for token, start in spelled:
            if token == self.tokenizer.unk_token:
                continue  # of unknown characters it is what they are
            stop, covered = start + len(token), set()
            for place in range(max(0, bisect_right(starts, start) - 1), len(ids)):
                if offsets[place][0] >= stop:
                    break
                if ids[place] != unknown:
                    covered |= set(range(*offsets[place]))
            if not covered >= {i for i in range(start, stop) if not token[i - start].isspace()}:
                raise self._cannot(token, "it has no tokens for its characters")

    def _cannot(self, token: str, why: str) -> UsageError:
        return UsageError(
            f"{self.name}: content spells {token[:60]!r} and must stay text, which its tokenizer "
            f"cannot write: {why}",
            "leave such rows out, or use a model whose tokenizer can",
        )

    @cached_property
    def private(self) -> dict[str, str]:
        """The twin's spelling of each control token, of the same length."""
        return {
            token: chr(PRIVATE + n) + FILL * (len(token) - 1)
            for n, token in enumerate(self.control.ids)
        }

    @cached_property
    def twin(self) -> Any:
        """The tokenizer with its control tokens spelled in private characters."""
        from tokenizers import Tokenizer

        state = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for added in state["added_tokens"]:
            if added["content"] in self.private:
                added |= {"content": self.private[added["content"]], "normalized": False}
        _respell(state["model"], self.private)
        state |= {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def real(self) -> dict[int, int]:
        """The tokenizer's id for each id of the twin that differs."""
        theirs = self.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        ours = self.twin.get_vocab(with_added_tokens=True)
        pairs = ((ours.get(self.private.get(text, text)), i) for text, i in theirs.items())
        return {twin: i for twin, i in pairs if twin is not None and twin != i}


def _respell(model: dict, private: dict[str, str]) -> None:
    """Give the control tokens in a model's own vocabulary their private spelling.

    A merge that makes one is taken out: text does not become one.
    """
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {private.get(token, token): i for token, i in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[private.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in private:
        model["unk_token"] = private[model["unk_token"]]
    if model.get("merges"):
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        kept = [
            merge
            for merge, pair in zip(model["merges"], pairs, strict=True)
            if not {*pair, "".join(pair)} & private.keys()
        ]
        model["merges"] = kept
