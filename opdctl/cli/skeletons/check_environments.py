"""The answers of skeleton to turns written by hand."""

from pathlib import Path

from opdctl.config.registry import member, use_members


def test_replies():
    use_members(Path(__file__).parents[1])
    cls = member("environments", "skeleton")
    environment = cls(cls.Config())
    assert environment.reply("how long is <abc>") == "3"
    assert environment.reply("and <>") == environment.refusal
    assert environment.reply("it is 3") is None
