"""The log of rollouts and the rows of metrics: no name takes the place of another."""

import json

import pytest
from one_step import opd

from opdctl.config.registry import shipped
from opdctl.errors import StageFailed
from opdctl.scoring import columns
from opdctl.scoring.columns import column_of
from opdctl.scoring.quantities import QUANTITIES
from opdctl.train.metrics import OF_THE_ROW, joined
from opdctl.train.rollout_log import FIELDS, key_of
from running import carry_out


def every_column():
    """The constants, each number of each giver, the masks and factors of each weight."""
    named = {v for k, v in vars(columns).items() if k.isupper() and isinstance(v, str)}
    given = {column_of(g, q) for g in ("teacher", "policy", "reference") for q in QUANTITIES}
    parts = {f"{part}.o.{w}" for part in ("mask", "factor") for w in shipped("weights")}
    return sorted(named | given | parts)


def test_no_column_has_the_key_of_a_field_or_of_another_column():
    names = every_column()
    assert {"teacher", "reward", "right", "advantage", "policy_entropy"} <= set(names)
    names += [*FIELDS, "teacher_per_token", "ids_per_token"]  # a member of one's own may say so
    keys = {key_of(name) for name in {*names}}
    assert len(keys) == len({*names}) and not keys & set(FIELDS)
    assert key_of("teacher") == "teacher_per_token" and key_of("advantage") == "advantage"


def test_a_line_keeps_the_teachers_name_and_the_outcome(on_disk, tmp_path):
    signals = {"reverse_kl": {}, "outcome": {"baseline": "none"}}
    ctx = opd(on_disk, tmp_path, signals=signals, steps=1)
    carry_out(ctx)
    (path,) = (ctx.folder / "rollouts").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows and {r["teacher"] for r in rows} == {"teacher"}
    for row in rows:
        assert row["reward"] in (0.0, 1.0) and row["truncated"] in (True, False)
        assert row["reward_per_token"] == [row["reward"]] * len(row["ids"])
        of_tokens = row["teacher_per_token"], row["policy"], row["advantage"]
        assert {len(vector) for vector in of_tokens} == {len(row["ids"])}
        assert max(row["teacher_per_token"]) <= 0


def test_no_number_of_a_step_takes_the_place_of_another():
    assert joined({"loss": 1.0}, {}, {"kl": 2.0}) == {"loss": 1.0, "kl": 2.0}
    for name in ("loss", *OF_THE_ROW):
        with pytest.raises(StageFailed, match=f"two numbers of a step are called '{name}'"):
            joined({"loss": 1.0}, {name: 2.0})
