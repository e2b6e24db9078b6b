"""The loss of skeleton on numbers worked out by hand."""

from pathlib import Path
from types import SimpleNamespace

from opdctl.config.registry import member, use_members


def test_the_loss_and_its_gradient():
    import torch

    use_members(Path(__file__).parents[1])
    cls = member("objectives", "skeleton")
    logprob_C = torch.tensor([-1.0, -3.0], requires_grad=True)
    view = SimpleNamespace(logprob_C=logprob_C, log=lambda name, value_C: None)
    loss_C = cls(cls.Config(power=2.0)).loss(view)
    assert loss_C.tolist() == [1.0, 9.0]
    (grad_C,) = torch.autograd.grad(loss_C.sum(), logprob_C)
    assert grad_C.tolist() == [-2.0, -6.0]
