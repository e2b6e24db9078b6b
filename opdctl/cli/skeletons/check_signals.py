"""The credit of skeleton on numbers worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

from opdctl.config.registry import member, use_members


def test_no_credit_is_beyond_the_limit():
    import torch

    use_members(Path(__file__).parents[1])
    cls = member("signals", "skeleton")
    columns = {"teacher": torch.tensor([-1.0, -9.0]), "policy": torch.tensor([-2.0, -1.0])}
    credit_N = cls(cls.Config(limit=3.0), None).credit(SimpleNamespace(columns=columns))
    assert credit_N.tolist() == [1.0, -3.0]
