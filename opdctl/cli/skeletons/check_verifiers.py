"""The verdicts of skeleton on answers written by hand."""

from pathlib import Path

from opdctl.config.registry import member, use_members
from opdctl.types import Prompt


def test_verdicts():
    use_members(Path(__file__).parents[1])
    cls = member("verifiers", "skeleton")
    prompt = Prompt("0", "mine", "capital of France?", "Paris", {})
    answers = [(prompt, "It is Paris"), (prompt, "paris"), (prompt, "Rome")]
    assert cls(cls.Config(), None, "mine").score(answers) == [1.0, 0.0, 0.0]
    assert cls(cls.Config(ignore_case=True), None, "mine").score(answers) == [1.0, 1.0, 0.0]
