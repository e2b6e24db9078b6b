"""The layers that an objective compares, as a key and as a need."""

from __future__ import annotations

from opdctl.errors import Problem
from opdctl.protocols import Objective


def text_of(layers: str | list[int]) -> str:
    """Return how a need names layers: ``all``, or ``2,5``."""
    return layers if isinstance(layers, str) else ",".join(map(str, layers))


def both(layers: str | list[int]) -> tuple[str, ...]:
    """The needs of an objective that compares states on these layers."""
    return tuple(f"{side}.hidden{{{text_of(layers)}}}" for side in ("student", "teacher"))


def unnumbered(layers: str | list[int]) -> list[Problem]:
    """The problem with a list of layers, if it has one."""
    if isinstance(layers, str) or (layers and min(layers) > 0 and len(set(layers)) == len(layers)):
        return []
    message = f"{layers}: layers are numbered from 1, each once, and one at least is compared"
    return [Problem("layers", message, "layers: all, last, even, odd, or such as [2, 4]")]


class OnLayers(Objective):
    """The base of objectives that bring the student's states to the teacher's on some layers."""

    @staticmethod
    def needs_for(config) -> tuple[str, ...]:
        """The states of its layers, on both sides."""
        return both(config.layers)

    @staticmethod
    def kl_direction(config) -> str:
        """Return what of the teacher it brings the student to."""
        return "states"

    @staticmethod
    def problems(config, stage) -> list[Problem]:
        """Refuse numbers that no model has as layers."""
        return unnumbered(config.layers)
