"""The scores of skeleton on numbers worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from opdctl.config.registry import member, use_members


def test_no_score_is_below_the_floor():
    import torch

    use_members(Path(__file__).parents[1])
    cls = member("teachers", "skeleton")
    ctx = SimpleNamespace(name="opd", folder=Path())
    teacher = cls(cls.Config(share=0.1), ctx, None, "math", "stage:math")
    mixed_N = teacher.mixed(torch.tensor([0.5, 0.0]).log(), size=4).exp()
    assert mixed_N.tolist() == pytest.approx([0.9 * 0.5 + 0.025, 0.025])
