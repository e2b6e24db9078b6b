"""Every random number of a run, as a pure function of what it is for.

There is no generator state, so there is none to save: draw t of a sample is a counter-based hash
of (stage seed, step, prompt, sample, t). SplitMix64 (Steele, Lea, Flood 2014) over a BLAKE2 key.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np  # imported late: reading a recipe needs no arrays

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key(*parts: object) -> int:
    """Return 64 bits that stand for ``parts``; equal parts give equal bits on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(keys_B: np.ndarray, t: int) -> np.ndarray:
    """Draw t of each key: float64 in [0, 1), with 53 random bits. Shape [B]."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = keys_B.astype(np.uint64) + np.uint64(((t + 1) * _GOLDEN) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def unit(*parts: object) -> float:
    """One draw in [0, 1) for ``parts``."""
    return (key(*parts) >> 11) * 2.0**-53


def permutation(n: int, *parts: object) -> np.ndarray:
    """An order of n items: sorted by their own draws. Shape [n]."""
    import numpy as np

    with np.errstate(over="ignore"):
        keys = np.uint64(key(*parts)) + np.arange(n, dtype=np.uint64) * np.uint64(_MIX1)
    return np.argsort(uniform(keys, 0), kind="stable")
