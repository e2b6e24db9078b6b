"""A recipe on a base, and a size with keys of whole kinds: what wins, and where errors point."""

import json
import os

import pytest

from opdctl.errors import RecipeError, UsageError
from opdctl.recipe.recipe import load, resolve
from opdctl.recipe.source import MOST_FILES, read_source, shipped
from opdctl.recipe.yaml_lines import parse
from opdctl.run.launch import new_run, read_recipe
from opdctl.run.rundir import RunDir
from running import inside

BASE = """\
name: below
about: what others build on
options: {more: false}
data:
  math: {kind: reasoning_gym, task: gcd, items: 500}
  sort: {kind: reasoning_gym, task: number_sorting}
stages:
  base: {kind: pretrain, steps: 5}
  t_{d}:
    matrix: {d: [math, sort]}
    kind: rl
    student: stage:base
    steps: 7
    prompts: {domains: {"{d}": 1}, per_step: 8}
    optim: {lr: 1.0e-3, warmup: 2}
  again: {when: more, kind: rl, student: stage:t_math}
  mopd:
    kind: opd
    student: stage:base
    teachers: {math: "stage:t_math", sort: "stage:t_sort"}
sizes:
  small:
    data:
      math: {kind: reasoning_gym, task: chain_sum}
    kinds:
      rl: {steps: 20, prompts: {per_step: 16}, optim: {lr: 1.0e-5}}
      opd: {steps: 30}
    stages:
      t_{d}: {optim: {lr: 1.0e-6}}
      again: {kind: rl, student: stage:t_sort}
"""
OVER = """\
base: below.yaml
name: above
stages:
  mopd: {steps: 9}
  t_{d}: {prompts: {per_step: 4}}
  base: {kind: pretrain, corrupt: 0.3}
  last: {kind: sft, student: stage:mopd}
sizes:
  small: {kinds: {rl: {steps: 21}}, stages: {last: {steps: 3}}}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "below.yaml").write_text(BASE)
    (tmp_path / "above.yaml").write_text(OVER)
    return tmp_path


def complaints(path, **options):
    with pytest.raises(RecipeError) as caught:
        load(str(path), **options)
    return caught.value.problems


# kinds of a size ---------------------------------------------------------------------------------


def test_a_size_sets_keys_of_a_kind_below_those_of_a_stage(folder):
    recipe = load(str(folder / "below.yaml"), size="small", overrides=("more=true",))
    for stage in ("t_math", "t_sort"):
        config = recipe.stages[stage]
        assert config.steps == 20 and config.prompts.per_step == 16  # the kind, over the recipe
        assert config.optim.lr == 1e-6 and config.optim.warmup == 2  # the stage, over the kind
    again = recipe.stages["again"]  # replaced, as it has a kind; that kind's keys hold for it too
    assert again.student == "stage:t_sort" and again.steps == 20 and again.optim.lr == 1e-5
    assert recipe.stages["mopd"].steps == 30 and recipe.stages["base"].steps == 5
    assert recipe.data["math"].items == 4000  # replaced: nothing of the old entry is left
    over = load(str(folder / "below.yaml"), size="small", overrides=("stages.t_math.steps=3",))
    assert [over.stages[s].steps for s in ("t_math", "t_sort")] == [3, 20]
    plain = load(str(folder / "below.yaml"))
    assert plain.stages["t_math"].steps == 7 and plain.stages["mopd"].steps == 100


def test_stages_of_a_kind_share_nothing(folder):
    """An override of one does not reach the keys that the other has from the same line."""
    overrides = ("stages.mopd.optim.lr=0.5", "stages.twin.optim.lr=0.25")
    text = BASE.replace("opd: {steps: 30}", "opd: {optim: {warmup: 9}}")
    text = text.replace("  mopd:\n", "  mopd: &opd\n")
    text = text.replace("sizes:", "  twin: {<<: *opd, seed_group: twin}\nsizes:")
    (folder / "below.yaml").write_text(text)
    recipe = load(str(folder / "below.yaml"), size="small", overrides=overrides)
    rates = [(recipe.stages[s].optim.lr, recipe.stages[s].optim.warmup) for s in ("mopd", "twin")]
    assert rates == [(0.5, 9), (0.25, 9)]


@pytest.mark.parametrize(
    ("old", "new", "path", "says", "hint"),
    [
        ("opd: {steps", "odp: {steps", "sizes.small.kinds.odp", "no stage of kind 'odp'", "'opd'"),
        ("opd: {steps: 30}", "opd: 3", "sizes.small.kinds.opd", "expected a mapping", ""),
        ("opd: {steps: 30}", "opd: {stepz: 30}", "stages.mopd.stepz", "unknown key", "'steps'"),
    ],
)
def test_errors_in_a_kind_point_at_its_line(folder, old, new, path, says, hint):
    (folder / "below.yaml").write_text(BASE.replace(old, new))
    (problem,) = complaints(folder / "below.yaml", size="small")
    assert problem.path == path and says in problem.message and hint in problem.hint
    line = 1 + BASE[: BASE.index("opd: {steps: 30}")].count("\n")
    assert problem.where == f"{folder / 'below.yaml'}:{line}"
    load(str(folder / "below.yaml"))  # the recipe's own size has no such line


def test_kinds_that_are_no_mapping(folder):
    text = BASE[: BASE.index("    kinds:")] + "    kinds: [rl]\n"
    (folder / "below.yaml").write_text(text)
    (problem,) = complaints(folder / "below.yaml", size="small")
    assert problem.path == "sizes.small.kinds" and "expected a mapping" in problem.message


# a recipe on another -----------------------------------------------------------------------------


def test_later_keys_win_and_nothing_else_changes(folder):
    recipe = load(str(folder / "above.yaml"))
    assert (recipe.name, recipe.about) == ("above", "what others build on")
    assert list(recipe.stages) == ["t_math", "t_sort", "mopd", "base", "last"]
    assert recipe.stages["mopd"].steps == 9 and recipe.stages["t_math"].prompts.per_step == 4
    assert recipe.stages["t_math"].steps == 7 and recipe.stages["t_sort"].optim.warmup == 2
    base = recipe.stages["base"]
    assert base.corrupt == 0.3 and base.steps != 5  # it has a kind: nothing of the old one is left
    small = load(str(folder / "above.yaml"), size="small", overrides=("more=true",))
    assert small.stages["t_math"].steps == 21 and small.stages["t_math"].prompts.per_step == 16
    assert small.stages["last"].steps == 3 and small.stages["again"].student == "stage:t_sort"


def test_null_removes_an_entry_and_what_sizes_say_of_it(folder):
    (folder / "above.yaml").write_text("base: below.yaml\nstages: {mopd: null, again: null}\n")
    text = BASE.replace("      again:", "      mopd: {steps: 4}\n      again:")
    (folder / "below.yaml").write_text(text)
    assert "mopd" not in load(str(folder / "above.yaml")).stages
    problems = complaints(folder / "above.yaml", size="small")
    assert [p.path for p in problems] == ["sizes.small.kinds.opd"]  # no stage of it is left
    (folder / "below.yaml").write_text(text.replace("      opd: {steps: 30}\n", ""))
    small = load(str(folder / "above.yaml"), size="small")
    assert "mopd" not in small.stages and small.stages["again"].steps == 20  # a new one


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_file_that_says_nothing_is_its_base(name, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: {name}\n")
    (tmp_path / "merged.yaml").write_text(read_source(str(tmp_path / "mine.yaml")).text)
    for size in ("tiny", "small", "lab"):
        for options in ((), tuple(f"{o}=true" for o in load(name).options)):
            whole = json.dumps(load(name, size=size, overrides=options).to_dict())
            for file in ("mine.yaml", "merged.yaml"):
                recipe = load(str(tmp_path / file), size=size, overrides=options)
                assert json.dumps(recipe.to_dict()) == whole


def test_errors_name_the_file_that_has_the_line(folder):
    (folder / "below.yaml").write_text(BASE.replace("steps: 7", "stepz: 7"))
    (folder / "above.yaml").write_text(OVER.replace("{steps: 9}", "{stesp: 9}"))
    where = {p.path: p.where for p in complaints(folder / "above.yaml")}
    assert where["stages.t_math.stepz"] == f"{folder / 'below.yaml'}:13"
    assert where["stages.mopd.stesp"] == f"{folder / 'above.yaml'}:4"
    (folder / "below.yaml").write_text(BASE + "name: twice\n")
    (folder / "above.yaml").write_text(OVER)
    (problem,) = complaints(folder / "above.yaml")
    assert problem.where == f"{folder / 'below.yaml'}:{BASE.count(chr(10)) + 1}"
    (folder / "below.yaml").write_text(BASE.replace("kind: pretrain, steps: 5", "kind: pretrain"))
    (folder / "above.yaml").write_text(OVER + "  lab: {stages: {mopd: {student: 3}}}\n")
    (problem,) = complaints(folder / "above.yaml", size="lab")
    assert problem.where == f"{folder / 'above.yaml'}:{OVER.count(chr(10)) + 1}"
    # the line of a key that is gone is not shown for what took its place
    (folder / "above.yaml").write_text("base: below.yaml\nstages:\n  mopd: {kind: opd}\n")
    where = {p.message: p.where for p in complaints(folder / "above.yaml")}
    assert where["missing key 'student'"] == f"{folder / 'above.yaml'}:3"


def test_a_base_is_beside_the_file_or_shipped_and_may_have_one(folder, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "top.yaml").write_text("base: ../above.yaml\nname: top\n")
    monkeypatch.chdir("/")
    assert load(str(folder / "sub" / "top.yaml")).stages == load(str(folder / "above.yaml")).stages
    assert len(read_source(str(folder / "sub" / "top.yaml")).files) == 3
    (folder / "mine.yaml").write_text("base: glm5\n")
    assert load(str(folder / "mine.yaml")).name == "glm5"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: nowhere.yaml\n", "no recipe nowhere.yaml"),
        ("base: mino\n", "did you mean 'mimo'?"),
        ("base: 3\n", "expected a file"),
        ("base: [below.yaml]\n", "expected a file"),
        ("base: mine.yaml\n", "a circle of bases"),
        ("base: other.yaml\n", "a circle of bases"),
        ("base: /dev/zero\n", "no recipe /dev/zero"),
    ],
)
def test_bases_that_cannot_be(folder, text, says):
    (folder / "mine.yaml").write_text(f"name: mine\n{text}")
    (folder / "other.yaml").write_text("base: ./mine.yaml\n")
    (problem,) = complaints(folder / "mine.yaml")
    assert problem.path == "base" and says in str(problem)
    assert problem.where.endswith((".yaml:1", ".yaml:2"))


def test_a_chain_of_bases_is_bounded(folder):
    for n in range(MOST_FILES):
        (folder / f"{n}.yaml").write_text(f"base: {n + 1}.yaml\n")
    (folder / f"{MOST_FILES}.yaml").write_text(BASE)
    assert load(str(folder / "1.yaml")).name == "below"
    (problem,) = complaints(folder / "0.yaml")
    assert f"more than {MOST_FILES} files" in problem.message
    (folder / "1.yaml").write_text("- no mapping\n")
    with pytest.raises(UsageError, match=r"1\.yaml: a recipe is a mapping"):
        load(str(folder / "0.yaml"))


def test_a_run_keeps_one_text_and_the_hash_of_each_file(folder):
    source = read_source(str(folder / "above.yaml"))
    recipe = load(str(folder / "above.yaml"))
    run = RunDir(folder / "run")
    new_run(recipe, source, run.path)
    files = run.manifest()["files"]
    assert list(files) == [str(folder / "above.yaml"), str(folder / "below.yaml")]
    assert len(set(files.values())) == 2
    (folder / "below.yaml").write_text(BASE.replace("items: 500", "items: 600"))
    changed = read_source(str(folder / "above.yaml")).digests
    assert [files[f] == changed[f] for f in files] == [True, False]
    (folder / "below.yaml").unlink()
    again = load(str(run / "recipe.yaml"))  # what the run keeps needs no other file
    assert again == recipe == read_recipe(run)


def test_commands_know_bases(folder, monkeypatch):
    shown = inside("show", folder / "above.yaml")
    assert shown.returncode == 0 and OVER in shown.stdout and BASE in shown.stdout
    assert inside("cp", folder / "above.yaml", folder / "copied.yaml").returncode == 0
    (folder / "below.yaml").rename(folder / "moved.yaml")
    assert load(str(folder / "copied.yaml")).stages["mopd"].steps == 9
    refused = inside("validate", folder / "above.yaml")
    assert refused.returncode == 2 and "above.yaml:1" in refused.stderr
    monkeypatch.setattr("opdctl.recipe.source.shipped", lambda: {"x": folder / "x.yaml"})
    monkeypatch.setattr("opdctl.cli.catalogue.shipped", lambda: {"x": folder / "x.yaml"})
    (folder / "x.yaml").write_text("base: moved.yaml\nname: x\n")
    assert "what others build on" in inside("ls", "recipes").stdout


def test_a_base_is_no_override_and_no_key_of_a_resolved_recipe(folder):
    problems = complaints(folder / "below.yaml", overrides=("base=above.yaml",))
    assert any(p.path == "base" and p.message == "unknown key" for p in problems)
    tree, lines, _ = parse(OVER, "above.yaml")
    with pytest.raises(RecipeError, match="base: unknown key"):
        resolve(tree, "above.yaml", lines=lines)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_can_be_read_in_one_sitting(name):
    assert read_source(name).text.count("\n") <= 250


def test_members_of_a_base_are_looked_for_beside_it(folder):
    (folder / "sub").mkdir()
    (folder / "below.yaml").write_text(BASE + "members: ./mine\n")
    (folder / "sub" / "top.yaml").write_text("base: ../below.yaml\n")
    tree = read_source(str(folder / "sub" / "top.yaml")).layer.tree
    assert os.path.normpath(tree["members"]) == str(folder / "mine")
    (folder / "sub" / "top.yaml").write_text("base: ../below.yaml\nmembers: ./other\n")
    tree = read_source(str(folder / "sub" / "top.yaml")).layer.tree
    assert tree["members"] == str(folder / "sub" / "other")
