"""The prompts of skeleton: every sum once, on one side of the split."""

from pathlib import Path

from opdctl.config.registry import member, use_members


def test_prompts_and_verdicts():
    use_members(Path(__file__).parents[1])
    cls = member("data", "skeleton")
    sums = cls(cls.Config(kind="skeleton", largest=4), "sums", 0)
    train, held_out = sums.prompts("train"), sums.prompts("eval")
    assert len({p.text for p in (*train, *held_out)}) == len(train) + len(held_out) == 25
    assert all(sums.score(p, p.answer) == 1.0 for p in train)
    assert sums.score(train[0], "no number") == 0.0
