"""The weight of skeleton on numbers worked out by hand."""

from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest

from opdctl.config.registry import member, use_members


def test_a_token_the_teacher_doubts_counts_less():
    import torch

    use_members(Path(__file__).parents[1])
    cls = member("weights", "skeleton")
    columns = {"teacher": torch.tensor([log(0.1), -1.0]), "policy": torch.tensor([log(0.4), -2.0])}
    factor_N = cls(cls.Config()).factor(SimpleNamespace(columns=columns))
    assert factor_N.tolist() == pytest.approx([0.25, 1.0])
