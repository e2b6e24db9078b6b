"""The claim of skeleton on scores written by hand."""

from pathlib import Path

import pytest

from opdctl.config.registry import member, use_members


def test_the_number_that_decides():
    use_members(Path(__file__).parents[1])
    cls = member("claims", "skeleton")
    roles = cls.Config(better="stage:opd", worse="stage:sft", domain="math")
    (condition,), _ = cls.conditions(roles, [])
    assert condition.value({("opd", "math"): 0.7, ("sft", "math"): 0.4}) == pytest.approx(0.3)
    assert condition.least == 0.0
