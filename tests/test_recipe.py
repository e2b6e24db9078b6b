"""Reading recipes: every kind of bad input is refused, all at once, with path, line and hint."""

import pytest

from opdctl.errors import RecipeError, UsageError
from opdctl.recipe.recipe import load, resolve
from opdctl.recipe.source import shipped
from opdctl.recipe.yaml_lines import dump, parse
from opdctl.run.launch import parse_seeds

GOOD = """
name: demo
models: {base: "stage:base"}
data:
  math: {kind: reasoning_gym, task: gcd}
  sort: {kind: reasoning_gym, task: number_sorting}
stages:
  base: {kind: pretrain, steps: 5}
  t_{d}:
    matrix: {d: [math, sort]}
    kind: rl
    student: base
    prompts: {domains: {"{d}": 1}}
  mopd:
    kind: opd
    student: stage:base
    teachers: {math: "stage:t_math", sort: "stage:t_sort"}
sizes:
  small: {models: {base: Qwen/Qwen3-0.6B-Base}, stages: {base: null, mopd: {student: base}}}
"""


def read(text, *overrides, size=""):
    tree, lines, problems = parse(text, "demo.yaml")
    return resolve(
        tree, "demo.yaml", size=size, overrides=overrides, lines=lines, problems=problems
    )


def problems(text, *overrides, size=""):
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides, size=size)
    return caught.value.problems


def test_matrix_alias_and_order():
    recipe = read(GOOD)
    assert list(recipe.stages) == ["base", "t_math", "t_sort", "mopd"]
    assert recipe.stages["t_math"].student == "stage:base"
    assert recipe.domains("t_math") == {"math": 1.0}
    assert recipe.domains("mopd") == {"math": 0.5, "sort": 0.5}
    assert recipe.upstream("mopd") == ["base", "t_math", "t_sort"]
    assert recipe.order()[-1] == "mopd"


def test_resolved_recipe_reads_back_the_same():
    recipe = read(GOOD)
    again = read(dump(recipe.to_dict()))
    assert again == recipe


def test_size_overlay_removes_and_replaces():
    recipe = read(GOOD, size="small")
    assert "base" not in recipe.stages
    assert recipe.stages["mopd"].student == "Qwen/Qwen3-0.6B-Base"


def test_overrides_before_and_after_the_matrix():
    recipe = read(
        GOOD,
        "stages.t_{d}.steps=7",
        "stages.t_sort.steps=9",
        "stages.mopd.optim.lr=3e-6",
        "stages.mopd.teachers.math.weight=2",
    )
    assert recipe.stages["t_math"].steps == 7 and recipe.stages["t_sort"].steps == 9
    assert recipe.stages["mopd"].optim.lr == 3e-6
    assert recipe.stages["mopd"].teachers["math"].weight == 2.0
    assert recipe.stages["mopd"].teachers["math"].model == "stage:t_math"


def test_a_partial_mapping_keeps_the_other_defaults():
    recipe = read(GOOD, "stages.mopd.objectives.policy_gradient.coef=2")
    assert recipe.stages["mopd"].objectives["policy_gradient"].weights.keys() == {"is_gate"}
    assert recipe.stages["t_math"].prompts.samples == 8  # the rl default, not the general one
    assert recipe.stages["t_math"].objectives["policy_gradient"].clip_high == 0.28


@pytest.mark.parametrize(
    ("override", "path", "message", "hint"),
    [
        ("stages.mopd.stesp=3", "stages.mopd.stesp", "unknown key", "'steps'"),
        ("stages.mopd.optim.lrr=3", "stages.mopd.optim.lrr", "unknown key", "'lr'"),
        ("stages.mpod.steps=3", "stages.mpod.steps", "no stage 'mpod'", "'mopd'"),
        ("stages.mopd.steps=many", "stages.mopd.steps", "expected an integer", ""),
        ("stages.mopd.steps=0", "stages.mopd.steps", "0 is below 1", ""),
        ("stages.mopd.steps=true", "stages.mopd.steps", "expected an integer", ""),
        ("stages.mopd.optim.lr=.nan", "stages.mopd.optim.lr", "not a finite number", ""),
        ("stages.mopd.kind=opdd", "stages.mopd.kind", "no member 'opdd'", "'opd'"),
        ("stages.mopd.student=stage:bse", "stages.mopd.student", "no stage 'bse'", "'base'"),
        ("stages.mopd.student=mopd", "stages.mopd.student", "not a model reference", "stage:mopd"),
        ("stages.mopd.student=./nowhere", "stages.mopd.student", "no folder", "config.json"),
        ("stages.mopd.student=policy", "stages.mopd.student", "a teacher's reference", "stage:"),
        (
            "stages.mopd.student=http://h:1",
            "stages.mopd.student",
            "cannot be loaded",
            "folder",
        ),
        (
            "stages.mopd.teachers={math: 'stage:t_math'}",
            "stages.mopd.teachers",
            "no teacher",
            "policy",
        ),
        (
            "stages.mopd.teachers.code=stage:t_math",
            "stages.mopd.teachers.code",
            "no prompt",
            "serves",
        ),
        (
            "stages.mopd.teachers.x={model: policy, serves: {math: true}}",
            "stages.mopd.teachers",
            "both serve",
            "one teacher",
        ),
        ("stages.mopd.signals={outcome: {}}", "stages.mopd.prompts.samples", "group of one", "=4"),
        (
            "stages.t_math.prompts.samples=1",
            "stages.t_math.prompts.samples",
            "group of one",
            "none",
        ),
        (
            "stages.t_math.signals={reverse_kl: {}}",
            "stages.t_math.signals.reverse_kl",
            "needs teacher.logprobs",
            "remove it",
        ),
        (
            "stages.mopd.signals={}",
            "stages.mopd.objectives.policy_gradient",
            "needs advantage",
            "coef",
        ),
        (
            "stages.mopd.signals={revers_kl: {}}",
            "stages.mopd.signals.revers_kl",
            "no member",
            "'reve",
        ),
        (
            "stages.mopd.prompts.domains={maths: 1}",
            "stages.mopd.prompts.domains.maths",
            "no data",
            "'math'",
        ),
        (
            "stages.mopd.prompts.per_step=1",
            "stages.mopd.prompts.per_step",
            "less than one",
            "raise",
        ),
        ("stages.base=null", "stages.mopd.student", "no stage 'base'", ""),
        ("data.math.task=null", "data.math.task", "expected text", ""),
        ("dta.math.task=gcd", "dta.math.task", "unknown key", "'data'"),
        ("seed=x", "seed", "expected int", ""),
        (
            "stages.mopd.signals={outcome: {reward: 'stage:base'}}",
            "stages.mopd.signals.outcome.reward",
            "writes model",
            "orm",
        ),
        (
            "stages.mopd.prompts.domains={math: 2, sort: -1}",
            "stages.mopd.prompts.domains.sort",
            "0 or more",
            "",
        ),
        (
            "stages.mopd.teachers.math={model: policy, serves: {math: false}}",
            "stages.mopd.teachers.math.serves",
            "serves no domain",
            "DOMAIN",
        ),
        (
            "stages.mopd.objectives.policy_gradient.clip_high=0.2",
            "stages.mopd.objectives.policy_gradient.weights.is_gate",
            "twice",
            "pop",
        ),
        ("stages.base.model.heads=3", "stages.base.model.heads", "multiple", ""),
        ("sizes.small.seed=3", "sizes.small.seed", "unknown key", ""),
        ("data.math={kind: jsonl, path: nowhere.jsonl}", "data.math.path", "no file", "jsonl"),
        ("models.other=stage:nothing", "models.other", "no stage", ""),
        ("runtime.device=gpu", "runtime.device", "not allowed", "cpu"),
    ],
)
def test_bad_overrides(override, path, message, hint):
    complaints = [p for p in problems(GOOD, override) if p.path == path]
    assert complaints, [str(p) for p in problems(GOOD, override)]
    assert message in complaints[0].message and hint in complaints[0].hint


def test_a_gate_and_a_clip_do_not_share_a_ratio():
    gated = "stages.mopd.objectives={policy_gradient: {clip_high: 0.2, weights: {is_gate: {}}}}"
    assert any("twice" in p.message for p in problems(GOOD, gated))
    wrong = "stages.mopd.objectives={policy_gradient: {weights: {is_gate: {low: 3.0}}}}"
    assert any("above high" in p.message for p in problems(GOOD, wrong))


def test_an_advantage_that_nothing_uses_is_refused():
    complaints = problems(GOOD, "stages.mopd.objectives={divergence: {}}")
    assert any("no objective uses the advantage of reverse_kl" in p.message for p in complaints)
    both = read(GOOD, "stages.mopd.objectives={divergence: {}}", "stages.mopd.signals={}")
    assert both.stages["mopd"].objectives["divergence"].direction == "reverse"
    alone = problems(GOOD, "stages.t_math.objectives={divergence: {}}")
    assert any("needs teacher.hidden" in p.message for p in alone)


def test_all_problems_at_once_with_lines():
    text = GOOD.replace("steps: 5", "stepz: 5").replace("kind: rl", "kind: rll")
    complaints = problems(text, "stages.mopd.optim.lr=fast")
    assert {p.path for p in complaints} >= {
        "stages.base.stepz",
        "stages.t_math.kind",
        "stages.t_sort.kind",
        "stages.mopd.optim.lr",
    }
    where = {p.path: p.where for p in complaints}
    assert where["stages.base.stepz"] == "demo.yaml:8"
    assert where["stages.t_math.kind"] == "demo.yaml:11"
    assert where["stages.mopd.optim.lr"] == "override 'stages.mopd.optim.lr=fast'"
    text = "stages.mopd.optim={lr: fast}"  # and not the line of the file that has this key
    lines = GOOD.replace("kind: opd", "kind: opd\n    optim: {lr: 0.1}")
    where = {p.path: p.where for p in problems(lines, text)}
    assert where["stages.mopd.optim.lr"] == f"override {text!r}"


def test_nothing_where_a_text_is_wanted_says_how_to_write_none():
    (complaint,) = problems(GOOD, "data.math.prompt=")
    assert complaint.path == "data.math.prompt" and "'\"\"'" in complaint.hint


def test_duplicate_keys_cycles_and_size():
    complaints = problems(GOOD + "\nname: again\n")
    assert complaints[0].path == "name" and "twice" in complaints[0].message
    complaints = problems(GOOD, "stages.base={kind: sft, student: 'stage:mopd'}")
    assert any("a cycle of stages" in p.message for p in complaints)
    complaints = problems(GOOD, size="smal")
    assert "no size 'smal'" in complaints[0].message and "small" in complaints[0].hint


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "just words", "a: !!python/object:os.x {}"])
def test_not_a_recipe(text):
    with pytest.raises(UsageError):
        read(text)


def test_missing_file_and_bad_override_form():
    with pytest.raises(UsageError, match="no recipe"):
        load("recipes/nimo.yaml")
    with pytest.raises(UsageError, match="not an override"):
        read(GOOD, "stages.mopd.steps")


def test_seeds():
    assert parse_seeds("0..2") == [0, 1, 2] and parse_seeds("3,1") == [3, 1]
    for bad in ("", "a", "2..0", "1,1", "-1"):
        with pytest.raises(UsageError):
            parse_seeds(bad)


def test_tokenizers_of_folders_are_compared(tmp_path):
    from conftest import make_model
    from opdctl.models.model import save

    save(make_model(), tmp_path / "ours")
    save(make_model(alphabet="0123456789abc"), tmp_path / "theirs")
    complaints = problems(
        GOOD, f"stages.mopd.student={tmp_path}/ours", f"stages.mopd.teachers.math={tmp_path}/theirs"
    )
    assert complaints[0].path == "stages.mopd.teachers.math"
    assert "another tokenizer" in complaints[0].message and "id " in complaints[0].message


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.parametrize("size", ["tiny", "small", "lab"])
def test_shipped_recipes_resolve(name, size):
    recipe = load(name, size=size)
    assert recipe.stages and recipe.size == size
    tree, _, _ = parse(dump(recipe.to_dict()), "resolved.yaml")
    assert resolve(tree, "resolved.yaml", written=True) == recipe


MERGED = """
name: merged
options: {more: false}
data: {a: {kind: reasoning_gym, task: gcd}}
stages:
  base: &base {kind: pretrain, steps: 3, prompts: {per_step: 4}}
  other:
    <<: *base
    steps: 7
  extra: {when: more, kind: sft, student: stage:base}
claims:
  M5: {when: more, student: stage:extra, start: stage:base, domains: {a: true}}
"""


def test_merge_keys_and_options(tmp_path):
    """<<: *anchor gives what is not given, one level deep; when: names an option."""
    path = tmp_path / "merged.yaml"
    path.write_text(MERGED)
    plain = load(str(path))
    assert list(plain.stages) == ["base", "other"] and not plain.claims
    assert plain.stages["other"].steps == 7 and plain.stages["other"].kind == "pretrain"
    assert plain.stages["other"].prompts.per_step == 4 and plain.stages["base"].steps == 3
    more = load(str(path), overrides=("more=true",))
    assert list(more.stages) == ["base", "other", "extra"] and list(more.claims) == ["M5"]
    assert load(str(path), overrides=("options.more=true",)).stages.keys() == more.stages.keys()
    again = resolve(more.to_dict(), "again", written=True)
    assert again.stages == more.stages and again.options == {"more": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("when: more, kind", "when: mor, kind"), "no option 'mor'"),
        (("{more: false}", "{more: 3}"), "expected true or false"),
        (("<<: *base", "<<: 3"), "<<: takes a mapping"),
    ],
)
def test_wrong_merge_keys_and_options(tmp_path, change, says):
    path = tmp_path / "merged.yaml"
    path.write_text(MERGED.replace(*change))
    with pytest.raises(RecipeError) as caught:
        load(str(path))
    assert says in str(caught.value)
    path.write_text(MERGED)
    with pytest.raises(RecipeError, match="more"):
        load(str(path), overrides=("mor=true",))


EFFORTS = """
name: grid
data:
  math_{effort}:
    matrix: &efforts {effort: {low: {tag: "-", tokens: 4}, high: {tag: "+", tokens: 9}}}
    kind: reasoning_gym
    task: gcd
    thinking: {tag: "{effort.tag}"}
stages:
  base: {kind: pretrain, steps: 5}
  t_{effort}:
    matrix: *efforts
    kind: rl
    student: stage:base
    prompts: {domains: {"math_{effort}": 1}}
    sampling: {max_tokens: "{effort.tokens}"}
  merged:
    kind: opd
    student: stage:base
    teachers: {"math_{effort}": {matrix: *efforts, model: "stage:t_{effort}"}}
    prompts: {domains: {"math_{effort}": {matrix: *efforts, value: 2}}}
claims:
  M1:
    student: stage:merged
    start: stage:base
    teachers: {"math_{effort}": {matrix: *efforts, value: "stage:t_{effort}"}}
"""


def test_a_matrix_expands_anywhere_and_gives_values_keys():
    weight = "stages.merged.teachers.math_low.weight=2"
    recipe = read(EFFORTS, "data.math_high.items=77", "stages.t_low.steps=3", weight)
    assert [t.weight for t in recipe.stages["merged"].teachers.values()] == [2.0, 1.0]
    assert list(recipe.data) == ["math_low", "math_high"]
    assert [d.thinking.tag for d in recipe.data.values()] == ["-", "+"]
    assert [d.items for d in recipe.data.values()] == [4000, 77]
    assert [recipe.stages[f"t_{e}"].sampling.max_tokens for e in ("low", "high")] == [4, 9]
    merged = recipe.stages["merged"]
    assert {n: t.model for n, t in merged.teachers.items()} == {
        "math_low": "stage:t_low",
        "math_high": "stage:t_high",
    }
    assert merged.prompts.domains == {"math_low": 2.0, "math_high": 2.0}
    assert recipe.claims["M1"].teachers["math_low"] == "stage:t_low"
    assert recipe.stages["t_low"].steps == 3
    assert read(dump(recipe.to_dict())) == recipe


def test_bad_matrices_are_named():
    def first(old, new):
        assert old in EFFORTS
        return problems(EFFORTS.replace(old, new, 1))[0]

    axis = '{low: {tag: "-", tokens: 4}, high: {tag: "+", tokens: 9}}'
    complaint = first(axis, "{low: 1, high: 2}")
    assert complaint.path == "data.math_{effort}.matrix"
    assert "axis: {value: {key: ...}}" in complaint.message
    complaint = first("  math_{effort}:\n", "  math:\n")
    assert complaint.path == "data.math.matrix" and "lacks {effort}" in complaint.message
    (wrong,) = problems(EFFORTS, "data.math_hihg.items=7")
    assert wrong.path == "data.math_hihg.items" and "'math_high'" in wrong.hint
    (wrong,) = problems(EFFORTS, "claims.M1.teachers.maths=stage:t_low")
    assert "no domain 'maths'" in wrong.message


def test_a_placeholder_alone_keeps_its_type():
    text = GOOD.replace("d: [math, sort]", "d: [math, sort], n: [3, 4]").replace(
        "t_{d}", "t_{d}_{n}"
    )
    text = text.replace("kind: rl\n", 'kind: rl\n    steps: "{n}"\n    seed_group: "g{n}"\n')
    text = text.replace("stage:t_math", "stage:t_math_3").replace("stage:t_sort", "stage:t_sort_4")
    recipe = read(text)
    assert recipe.stages["t_math_3"].steps == 3 and recipe.stages["t_sort_4"].steps == 4
    assert recipe.stages["t_sort_4"].seed_group == "g4"


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ("Q4: {student: S, teacher: S, think: {math: false}, no_think: {sort: true}}", "nothing"),
        ("G1: {end: S, after: {}}", "nothing"),
        ("D5: {student: S, average: S, specialists: {math: S}, efforts: {}}", "nothing"),
        (
            "D5: {student: S, average: S, specialists: {math: S}, efforts: {a: {maths: true}}}",
            "maths",
        ),
        ("G4: {start: S, teachers: {math: S}, without: {sort: S}}", "not those of teachers"),
        ("T1: {opd: S, teacher: S, domain: maths}", "maths"),
    ],
)
def test_roles_that_name_nothing(claims, says):
    complaints = problems(
        GOOD + "claims:\n  " + claims.replace("S", "stage:base").replace("DOMAIN", "S")
    )
    assert any(says in p.message for p in complaints), complaints
