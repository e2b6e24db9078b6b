"""The longest sequence that a model reads, from its configuration. No torch here.

Learned positions end where their table does. Rotations (rope) go on, but beyond
``max_position_embeddings`` a model was not trained. Two kinds of rotation change with the longest
sequence of a batch, so a token's log-prob would depend on what stands beside it, and a sampler that
keeps rotated keys would part from a trainer that reads the whole: dynamic NTK beyond
``max_position_embeddings``, and longrope (Phi-3, arXiv 2402.13753) beyond
``original_max_position_embeddings``. No definition of either is right for a policy that is sampled
token by token, so they are used below their switch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAMES = ("max_position_embeddings", "n_positions")
STRETCHED = ("linear", "yarn")  # max_position_embeddings may be that of the unscaled model


@dataclass(frozen=True)
class Room:
    """The longest sequence of a model.

    Attributes:
        longest: in tokens, prompt and response together; 0 is no limit.
        why: the key of the configuration that says so.
        switches: beyond it, rotations depend on the longest sequence of a batch.
    """

    longest: int = 0
    why: str = ""
    switches: bool = False

    def complaint(self, model: str, tokens: int, of: str) -> tuple[str, str]:
        """Return ``(message, hint)`` for a sequence that is too long.

        Args:
            model: the model's name.
            tokens: the length of the sequence.
            of: the sequence's name, such as ``a prompt and its response``.
        """
        message = f"{of} may have {tokens} tokens, and {model} reads {self.longest} ({self.why})"
        if self.switches:
            message += ": beyond, its rotations depend on the longest sequence of a batch"
        hint = "a smaller sampling.max_tokens or prompts.max_tokens, shorter rows, or another model"
        if self.why == NAMES[0] and not self.switches:
            hint += f"; one that was trained for more says so by {self.why} in its config.json"
        return message, hint


def room_of(config: dict[str, Any]) -> Room:
    """Return the longest sequence of a model, from the content of its config.json."""
    text = config.get("text_config")
    config = config | text if isinstance(text, dict) else config
    name = next((n for n in NAMES if _count(config.get(n))), "")
    if config.get("alibi") or not name:  # a slope in place of positions, or a state
        trained, name = 0, ""
    else:
        trained = config[name]
    room = Room(_stretched(config, trained), name)
    for rope in _ropes(config):
        kind = str(rope.get("rope_type", rope.get("type", "")))
        if "dynamic" in kind:
            room = _nearer(room, Room(trained, f"{name}, {kind} rope", True))
        elif kind in ("longrope", "su") and _differs(rope):
            where = "original_max_position_embeddings"
            switch = rope.get(where) or config.get(where) or trained
            room = _nearer(room, Room(int(switch), f"{where}, {kind} rope", True))
    if config.get("use_dynamic_ntk"):  # Qwen's first models, in code of their own
        switch = config.get("seq_length") or trained
        room = _nearer(room, Room(int(switch), "seq_length, use_dynamic_ntk", True))
    return room


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _nearer(one: Room, other: Room) -> Room:
    return other if not one.longest or other.longest <= one.longest else one


def _ropes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of each kind of rotation: one, or one for each type of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if isinstance(value, dict):
            yield value
            yield from (v for v in value.values() if isinstance(v, dict))


def _differs(rope: dict[str, Any]) -> bool:
    """Return True where longrope computes long sequences in another way than short ones."""
    pairs = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))
    return any(rope.get(short) != rope.get(long) for short, long in pairs)


def _stretched(config: dict[str, Any], trained: int) -> int:
    """Return the positions of a model whose rotations are scaled to more than it was trained on."""
    most = trained
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict):
            continue
        kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
        if kind in STRETCHED and isinstance(factor, int | float) and factor > 1:
            original = rope.get("original_max_position_embeddings") or trained
            most = max(most, int(original * factor))
    return most
