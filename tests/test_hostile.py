"""Input of a stranger: recipes and overrides broken by hypothesis, and bombs.

Every one, of some hundreds, ends in exit code 2 with a message that says where, or is valid: never
a traceback, never another code, and nothing is created on disk.
"""

import copy
import os

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostile import SECRET, command, in_child
from opdctl.recipe.resolution import interpolate
from opdctl.recipe.source import shipped
from opdctl.recipe.yaml_lines import DUMPER, parse
from running import DEMO

DEMO_TEXT = DEMO.read_text()
TREES = [yaml.safe_load(DEMO_TEXT)] * 3 + [yaml.safe_load(shipped()["mimo"].read_text())]
MANY = settings(
    max_examples=190,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure is shown as it was found: shrinking a recipe takes minutes
    suppress_health_check=list(HealthCheck),
)


def refused(place, content, *overrides, names="r.yaml"):
    """Whether ``validate`` refuses a recipe; if so ``run`` does too and leaves nothing."""
    file = place / "r.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = command("validate", file, *overrides)
    assert code in (0, 2) and SECRET not in out + err
    if code == 0:
        assert command("plan", file, *overrides, "--json")[0] == 0
    else:
        assert names in err and len(err) > len(names) + 20 and not out
        assert err.isprintable() or all(c.isprintable() or c == "\n" for c in err)
        if len(content) % 4 == 0:  # of some, for time
            assert command("run", file, "--out", "made", *overrides)[0] == 2
    assert sorted(os.listdir(place)) == ["r.yaml"]
    return code == 2


# mutations ---------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
HOSTILE = st.sampled_from(
    [
        "../../x", "/etc/passwd", "a\nb", "a\x1b[31mb", "\x00", "", " ", "a" * 5000, "..", ".",
        "${oc.env:OPDCTL_SECRET}", "${OPDCTL_SECRET}", "$OPDCTL_SECRET", "${seed}", "${", "${}",
        "${${name}}", "${stages}", "{d}", "{", "{0.__class__}", "stage:", "stage:nowhere", "policy",
        "stage:mopd", "http://x", "file:///etc/passwd", "a/b", "a/b@c", "~", "~/x", "./",
        "__import__('os').system('touch canary')", "nan", "1e999", "-0", "0x10", "on", "=", "<<",
    ]
)  # fmt: skip
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, HOSTILE,
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, -(10**400), float("inf"), float("nan"), 1e308]),
)  # fmt: skip
JUNK = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | HOSTILE, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.one_of(
    TEXT, HOSTILE,
    st.sampled_from(
        ["kind", "matrix", "when", "steps", "teachers", "sizes", "watchdogs", "student"]
    ),
)  # fmt: skip


def places(tree, path=()):
    """Every path of a tree."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list):
        items = enumerate(tree)
    for key, below in items:
        yield from places(below, (*path, key))


@st.composite
def mutated(draw):
    """A recipe's tree with one to three edits that know its structure, as YAML."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(tree)) or [("name",)]
        path = draw(st.sampled_from(paths))
        node = tree
        for key in path[:-1]:
            node = node[key]
        edit = draw(st.integers(0, 7))
        if edit <= 2 or not isinstance(node, dict):
            node[path[-1]] = draw(JUNK)
        elif edit == 3:
            node[draw(NAMES)] = draw(JUNK)
        elif edit == 4:
            del node[path[-1]]
        elif edit == 5:
            node[draw(NAMES)] = node.pop(path[-1])
        elif edit == 6:
            for _ in range(draw(st.sampled_from([1, 2, 100]))):
                node[path[-1]] = [node[path[-1]]] if draw(st.booleans()) else {"a": node[path[-1]]}
        else:
            node[path[-1]] = f"stage:{draw(st.sampled_from(['base', 'sft', 'mopd', 't_math']))}"
    return yaml.dump(tree, Dumper=DUMPER, allow_unicode=draw(st.booleans()), sort_keys=False)


PIECES = st.sampled_from(
    [
        b"\t", b"\xff\xfe", b"\x00", b"\x07", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b": ",
        b"&a ", b"*a ", b"<<: *a\n", b"{", b"}", b"[", b"]", b"'", b'"', b"|", b">", b"---\n",
        b"!!python/object/apply:os.system [touch canary]\n", b"!!binary aGk= ", b"!!set {a} ",
        b"!!python/name:os.system ", b"%YAML 9.9\n", b"2020-01-01", b"!!float x ", b"&a [*a]",
        b"name: x\n", b"0x" + b"f" * 5000, b"? ", b"...\n", b"- ",
    ]
)  # fmt: skip


@st.composite
def spoiled(draw):
    """A recipe's text with one to three pieces put in, lines repeated, or its end cut off."""
    text = DEMO_TEXT.encode()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        edit = draw(st.integers(0, 3))
        if edit <= 1:
            text = text[:at] + draw(PIECES) + text[at:]
        elif edit == 2:
            lines = text.split(b"\n")
            line = draw(st.integers(0, len(lines) - 1))
            text = b"\n".join([*lines[:line], lines[line], *lines[line:]])
        else:
            text = text[:at] or b"{"
    return text


KEYS = [
    "seed", "size", "name", "stages.mopd.optim.lr", "stages.sft.steps", "data.math.kind",
    "stages.eval_sft.student", "stages.mopd.teachers.math", "claims.M1", "runtime.threads",
    "stages.mopd.signals.outcome.coef", "stages.sft", "data", "sizes.tiny", "models.x.y",
]  # fmt: skip
VALUES = [
    "[[[[", "{a: b", "&a [*a]", "!!python/name:os.system", "[" * 3000, "{a: {b: {c: 1}}}",
    "{matrix: {m: [1, 2]}}", "stage:mopd", "null", "[1, 2]", "{math: stage:mopd}", "\udc80x",
]  # fmt: skip


@st.composite
def overrides(draw):
    """One or two ``key=value``, or nearly so."""
    made = []
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.one_of(st.sampled_from(KEYS), NAMES))
        if draw(st.integers(0, 3)) == 0:
            key += "." + draw(NAMES)
        value = draw(st.one_of(HOSTILE, TEXT, SCALAR.map(str), st.sampled_from(VALUES)))
        sign = draw(st.sampled_from(["=", "=", "=", "=", "==", "", ":"]))
        made.append(f"{key}{sign}{value}".replace("\0", "").lstrip("-") or "x")
    return made


def test_mutated_recipes(place):
    count = []

    @MANY
    @given(mutated())
    def check(text):
        count.append(refused(place, text))

    check()
    assert sum(count) >= 150


def test_spoiled_texts(place):
    count = []

    @settings(MANY, max_examples=60)
    @given(spoiled())
    def check(text):
        count.append(refused(place, text))

    check()
    assert sum(count) >= 40


def test_mutated_overrides(place):
    count = []

    @settings(MANY, max_examples=110)
    @given(overrides())
    def check(made):
        count.append(refused(place, DEMO_TEXT, *made, names=""))

    check()
    assert sum(count) >= 80


# bombs -------------------------------------------------------------------------------------------


def deep(letter, levels):
    return f"name: x\nabout: {letter * levels}"


def doubling(first, each, levels=60):
    lines = (each.replace("#", str(i)).replace("@", str(i - 1)) for i in range(1, levels))
    return first + "".join(lines)


def with_models(entries):
    return f"{DEMO_TEXT}\nmodels: {{{', '.join(entries)}}}"


AXES = [f"x{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for i in range(12)]
NINE_HUNDRED = [f"[{', '.join(f'{c}{i}' for i in range(900))}]" for c in "abc"]
NESTED = '{{"{{a}}": {{matrix: {{a: {}}}, "{{b}}": {{matrix: {{b: {}}}, "{{c}}": {{matrix: {{c: {}}}, value: 1}}}}}}}}'  # noqa: E501
BOMBS = {
    "brackets": (deep("[", 100_000), "nested deeper"),
    "maps": (deep("{a: ", 50_000), "nested deeper"),
    "lines": ("".join(" " * i + "a:\n" for i in range(1000)), "nested deeper"),
    "laughs": (doubling("a0: &a0 [x, x]\n", "a#: &a# [*a@, *a@]\n"), "unfold to too much"),
    "merges": (doubling("a0: &a0 {k: v}\n", "a#: &a# {<<: [*a@, *a@]}\n"), "unfold to too much"),
    "text": (f'about: &s "{"x" * 500_000}"\ndata: [{"*s, " * 40_000}]', "unfold to too much"),
    "file": ("about: " + "x" * 3_000_000, "longer than"),
    "keys": ("\n".join(f"{'k' * 99}{i}: 1" for i in range(15_000)), "a key is up to"),
    "references": (
        with_models(
            [f'a{i}: "${{models.a{i + 1}}}${{models.a{i + 1}}}"' for i in range(28)] + ["a28: xx"]
        ),
        "references unfold to too much",
    ),
    "chain": (with_models(f'a{i}: "${{models.a{i + 1}}}"' for i in range(900)), "too long a chain"),
    "circle": (with_models(['a: "${models.b}"', 'b: "${models.a}"']), "a cycle of references"),
    "matrix": (
        DEMO_TEXT.replace("{m: [sft, t_math, mopd]}", f"{{{', '.join(AXES)}}}").replace(
            "eval_{m}", "e" + "".join(f"{{x{i}}}" for i in range(12))
        ),
        "expands to more than 1000",
    ),
    "matrices": (
        DEMO_TEXT.replace("{math: 1}", NESTED.format(*NINE_HUNDRED)),
        "matrices unfold to too much",
    ),
    "number": (f"{DEMO_TEXT}\nseed: 0x{'f' * 5000}", "a whole number too large"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_bounded_time_and_memory(place, name):
    text, says = BOMBS[name]
    (place / "r.yaml").write_text(text)
    found = in_child(lambda: command("validate", place / "r.yaml"))
    assert found.startswith("(2, ''") and says in found and "r.yaml" in found


STRANGE = [
    ("about: ${oc.env:OPDCTL_SECRET}", "the environment is not read"),
    ("about: ${oc.decode:1}", "names no key of the recipe"),
    ("about: ${x:${name}}", "is not a reference"),
    ("about: ${${name}:OPDCTL_SECRET}", "is not a reference"),
    ("about: ${.name}", "names no key"),
    ("models: !!python/object/apply:os.system [touch canary]", "python/object/apply:os.system"),
    ("about: !!python/name:os.system", "not text, a number or a truth"),
    ("about: !!binary aGk=", "tagged 'binary'"),
    ("seed: 2020-01-01", "tagged 'timestamp'"),
    ("models: !!set {a}", "tagged 'set'"),
    ("models: &a {b: *a}", "refers to itself"),
    ('models: {"a\\nb": stage:sft}', "printable characters"),
    ('models: {"a\\e[31mb": stage:sft}', "printable characters"),
    ("seed: 1\nseed: 2", "given twice"),
    ("name: ..", "letters, digits"),
    ("name: /tmp/x", "letters, digits"),
    ("stages: {../../x: {kind: sft}}", "it is the name of a folder"),
    ("stages: {/etc/x: {kind: sft}}", "it is the name of a folder"),
    (f"stages: {{{'a' * 99}\u00e4\u00e4: {{kind: sft}}}}", "up to 100"),
    ("stages: {a: {kind: sft, student: stage:b}, b: {kind: sft, student: stage:a}}", "a cycle of"),
    ("stages: {a: {kind: ../cli}}", "no member '../cli'"),
    ("stages: {a: {kind: __init__}}", "no member '__init__'"),
    (f"stages: {{a: {{kind: sft, student: {'a' * 3000}}}}}", "not a model reference"),
    (f"stages: {{a: {{kind: sft, student: ./{'a' * 900}}}}}", "no folder"),
    ("stages: {a: {kind: sft, student: ~nobody/x}}", "no folder"),
    ('stages: {a: {kind: sft, student: "./a\\0b"}}', "not a model reference"),
]


@pytest.mark.parametrize(("lines", "says"), STRANGE)
def test_strange_recipes_are_named(place, lines, says):
    keys = {line.split(":")[0] for line in lines.splitlines()}
    kept = {k: v for k, v in yaml.safe_load(DEMO_TEXT).items() if k not in keys and k != "claims"}
    text = f"{yaml.safe_dump(kept, sort_keys=False)}{lines}\n"
    assert refused(place, text)
    assert says in command("validate", place / "r.yaml")[2]


def test_references_inside_the_recipe_work(place):
    tree, _, problems = parse(DEMO_TEXT, "r.yaml")
    tree |= {"seed": 3, "about": "seed ${seed} of ${name}", "runtime": {"threads": "${seed}"}}
    tree["models"] = {"start": "stage:${stages.mopd.teachers.spell}"}
    tree["stages"]["mopd"]["teachers"]["spell"] = "sft"
    assert interpolate(tree, problems)["about"] == "seed 3 of demo" and not problems
    assert interpolate(tree, problems)["runtime"]["threads"] == 3
    assert interpolate(tree, problems)["models"]["start"] == "stage:sft"
