"""Recipes broken at random: an error of ours or a recipe, never a traceback."""

import copy
import random

import pytest
import yaml

from opdctl.errors import OpdctlError
from opdctl.recipe.recipe import resolve
from opdctl.recipe.source import shipped
from opdctl.recipe.yaml_lines import parse
from running import DEMO

JUNK = [
    None,
    0,
    -1,
    1e9,
    True,
    "x",
    "",
    [],
    [1],
    {},
    {"a": 1},
    {"kind": "opd"},
    "stage:sft",
    "stage:",
    "policy",
    "http://x",
    "${oops}",
    "${seed}",
    "{d}",
    float("nan"),
    [[]],
    {1: 2},
    "../..",
    ["a", "b"],
    {"kind": None},
    {"model": {}},
]


def places(tree, path=()):
    if path:
        yield path
    children = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, below in children:
        yield from places(below, (*path, key))


def broken(tree, rng):
    """The tree with one to three random edits."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(list(places(tree)) or [("name",)])
        node = tree
        for key in path[:-1]:
            node = node[key]
        edit = rng.random()
        if edit < 0.7:
            node[path[-1]] = copy.deepcopy(rng.choice(JUNK))
        elif edit < 0.85 and isinstance(node, dict):
            node[rng.choice(["kind", "zzz", "steps", "matrix", "model", 5])] = rng.choice(JUNK)
        else:
            del node[path[-1]]
    return tree


@pytest.mark.parametrize("block", range(4))
def test_random_edits_never_give_a_traceback(block):
    good = [yaml.safe_load(path.read_text()) for path in (DEMO, DEMO, shipped()["mimo"])]
    refused = 0
    for seed in range(100 * block, 100 * block + 100):
        rng = random.Random(seed)
        text = yaml.safe_dump(broken(copy.deepcopy(rng.choice(good)), rng))
        try:
            tree, lines, problems = parse(text, "fuzz.yaml")
            resolve(
                tree,
                "fuzz.yaml",
                size=rng.choice(["", "tiny", "small"]),
                lines=lines,
                problems=problems,
            )
        except OpdctlError as error:
            refused += 1
            assert error.exit_code == 2 and error.message
    assert refused > 50
