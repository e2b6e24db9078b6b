"""The hooks of a family are declared in its base class, which every member has."""

import pytest

from opdctl.config.registry import member, members
from opdctl.rollout.data._domain_data import DomainData
from opdctl.rollout.engines._engine import Engine
from opdctl.rollout.sources._source import Source
from opdctl.rollout.verifiers._verifier import Verifier
from opdctl.stages._stage import Stage

BASES = {
    "data": DomainData,
    "engines": Engine,
    "sources": Source,
    "stages": Stage,
    "verifiers": Verifier,
}
EACH = [(family, name) for family in BASES for name in members(family)]


@pytest.mark.parametrize(("family", "name"), EACH)
def test_every_member_has_its_family_s_hooks(family, name):
    cls = member(family, name)
    assert issubclass(cls, BASES[family]) and not cls.__abstractmethods__
    assert isinstance(cls.revision, int)


def test_which_members_differ_from_the_defaults():
    """Name the members for which a probe of the class used to be true."""

    def with_flag(family, flag):
        return {n for n in members(family) if getattr(member(family, n), flag)}

    assert with_flag("sources", "has_logprobs") == {"student", "teacher_mixed"}
    assert with_flag("sources", "in_opd") == {"student", "mixture", "teacher_mixed"}
    assert with_flag("sources", "engines") == {"teacher_mixed"}
    assert with_flag("engines", "has_own_weights") == {"vllm", "vllm_server"}
    assert with_flag("data", "procedural") == {"reasoning_gym"}
    assert with_flag("verifiers", "asks_server") == {"judge_server"}
