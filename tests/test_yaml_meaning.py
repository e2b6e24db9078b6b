"""The meaning of a recipe's text to its writer: anything that reads in two ways is refused."""

import pytest
from test_recipe import GOOD, problems, read

from opdctl.errors import UsageError
from opdctl.recipe.yaml_lines import parse, parse_value


@pytest.mark.parametrize("text", ["010", "-012", "1:30", "1:30.5", "[no, de]", "[a, on]", "[017]"])
def test_a_value_of_two_readings_is_refused(text):
    _, _, problems = parse(f"key: {text}", "r.yaml")
    assert ["quote it" in p.hint and p.where == "r.yaml:1" for p in problems] == [True]
    with pytest.raises(UsageError, match="one version of YAML"):
        parse_value(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", 7),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        ("'010'", "010"),
        ("no", False),
        ("[true, False]", [True, False]),
        ("['no', de]", ["no", "de"]),
        ("-1.50", -1.5),
    ],
)
def test_a_value_of_one_reading_is_read(text, value):
    tree, _, problems = parse(f"key: {text}", "r.yaml")
    assert tree == {"key": value}
    assert not problems


def test_an_empty_value_of_a_matrix_is_refused():
    (problem,) = problems(GOOD.replace("[math, sort]}\n    kind: rl", "[math, ~]}\n    kind: rl"))
    assert problem.path == "stages.t_{d}.matrix.d"
    assert "empty" in problem.message


@pytest.mark.parametrize(
    "overrides",
    [
        ("stages.base.steps=1", "stages.base.steps=2"),
        ("stages.base.steps=1", "stages.base={kind: pretrain}"),
        ("options.more=true", "more=false"),
    ],
)
def test_an_override_that_undoes_another_is_refused(overrides):
    text = GOOD + "options: {more: false}\n"
    (problem,) = problems(text, *overrides)
    assert overrides[0] in problem.message
    assert overrides[1] in problem.where


def test_an_override_that_adds_to_another_is_taken():
    recipe = read(GOOD, "stages.base={kind: pretrain, steps: 3}", "stages.base.steps=4", "seed=1")
    assert recipe.stages["base"].steps == 4
    assert read(GOOD, "seed=1", "seed=1").seed == 1  # nothing is undone


@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "true", "1.5"])
def test_a_seed_is_a_whole_number_that_is_not_negative(seed):
    with pytest.raises(UsageError):
        read(GOOD, f"seed={seed}")


@pytest.mark.parametrize("name", ["Base", "b\u0430se", "base\u0301", "ba se"])
def test_names_that_look_alike_are_refused(name):
    (problem,) = problems(GOOD.replace("  mopd:", f"  {name}: {{kind: pretrain}}\n  mopd:"))
    assert problem.path == f"stages.{name}"


def test_domains_that_differ_by_case_are_refused():
    text = GOOD.replace("  sort: {kind", "  Math: {kind: reasoning_gym, task: lcm}\n  sort: {kind")
    (problem,) = problems(text)
    assert "data.math" in problem.message
