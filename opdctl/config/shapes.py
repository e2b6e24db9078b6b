"""The size of a public model, as a recipe states it: no network is needed to plan with it."""

from __future__ import annotations

from dataclasses import dataclass

from opdctl.config.schema import REQUIRED, key


@dataclass(kw_only=True)
class Shape:
    """Size of a public model or of one in a folder, for ``opdctl plan``."""

    parameters: float = key(REQUIRED, "all of them, embedding included, as 1.7206e9", least=1)
    active: float = key(0.0, "those a token goes through, of a mixture of experts; 0 is all")
    layers: int = key(0, "transformer layers; 0 is not known", least=0)
    hidden: int = key(0, "width; 0 is not known", least=0)
    intermediate: int = key(0, "width of the feed-forward part; 0 is not known", least=0)
    kv_heads: int = key(0, "key-value heads; 0 is not known", least=0)
    head_dim: int = key(0, "width of a head; 0 is not known", least=0)
    kept: int = key(
        0,
        "numbers a cache keeps of a token in a layer; 0 is 2 x kv_heads x head_dim; with latent "
        "attention (MLA) kv_lora_rank + qk_rope_head_dim",
        least=0,
    )
    vocabulary: int = key(0, "rows of the head; 0 is not known", least=0)

    @property
    def per_token(self) -> float:
        """The parameters that a token goes through."""
        return self.active or self.parameters

    @property
    def cached(self) -> int:
        """The numbers that a cache keeps of one token: keys and values of every layer."""
        return self.layers * (self.kept or 2 * self.kv_heads * self.head_dim)

    def activated(self, again: bool = False) -> int:
        """Return the numbers that a training pass keeps of one token: about ten widths of each
        attention block and four of its feed-forward part.

        Args:
            again: they are kept of one layer at a time, and of the others what goes in.
        """
        layer = 10 * self.hidden + 4 * self.intermediate
        return layer + self.layers * self.hidden if again else self.layers * layer

    def adapter(self, rank: int) -> float:
        """Return the parameters of a low-rank adapter: rank times the two widths of each linear
        layer, four in an attention block and three in its feed-forward part."""
        return rank * self.layers * (8.0 * self.hidden + 3 * (self.hidden + self.intermediate))
