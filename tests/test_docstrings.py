"""The rule for docstrings and names, read from the syntax trees.

A docstring opens with a verb in the imperative ("Return the mean") or with a noun and its article
("The mean"). Ruff's pydocstyle rules check the form of sections and quotes (pyproject.toml). Its
rule for the mood, D401, is not used: it refuses "The ..." and "A ..." and lets "Whether ...",
"Who ...", "Of ..." and bare nouns pass. Here a function's first word must be an article or stand in
VERBS, since a syntax tree does not tell a verb from a noun: a new verb is added to the list.
Modules and classes are titles, which may do without an article ("Teachers behind a server"), so of
them only openings that make a reader guess are refused.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = {
    **{f.name: files for f in (ROOT / "opdctl").iterdir() if (files := sorted(f.glob("**/*.py")))},
    "opdctl": sorted((ROOT / "opdctl").glob("*.py")),
    "benchmarks": sorted((ROOT / "benchmarks").glob("*.py")),
    "docs": sorted((ROOT / "docs").glob("*.py")),
}
PENDING: set[str] = set()  # wings that do not follow the rule yet; none may be added
CHECKED = sorted(WINGS.keys() - PENDING)

ARTICLES = frozenset("a an the all any both each every no one two three".split())  # noqa: SIM905
# openings after which the reader has to guess what the sentence is about
VAGUE = """
what whether who whom whose which where when why how of it its they their those these this
that as by in at from with without for to on over under around against after before until
beside because if so see is are was were does has have had will would not such same else other
others another more most least less only here there args raises
"""
VERBS = """
accept accumulate act add adjust adopt advance align allocate answer append apply arrange ask
assert assign attach average balance begin bind bound broadcast build call carry cast catch
change check choose claim clamp clean clear clip close collect combine commit compare compile
complete compute configure confirm connect consume continue convert copy count cover create
cut decay decide declare decode delete derive describe detach detect discard divide do
download draw drop dump emit empty encode end ensure enter escape estimate evaluate exchange
exclude execute exit expand explain export extend extract fail fetch fill filter find finish
fit flatten fold follow forbid force fork format free freeze gather generate get give go group
grow guard handle hash hold ignore import include index infer initialise insert install
interpolate join judge keep kill lay leave let limit link list load locate lock log look lower
make map mark match measure merge mix move multiply name normalise note open order override pack
pad parse pass pause perform permute pick plan pool pop prepare prevent print probe process
project propagate publish put quote raise rank read rebuild receive recompute record redirect
reduce refuse register reject release reload remember remove rename render repeat replace
report request require rescale reserve reset resolve restore resume retry return reuse reverse
rewrite round run sample save say scale scan scatter score search seed select send separate
serve set shift show shrink shut sign skip smooth solve sort speak split spread start step
stop store strip subtract sum summarize swap switch take tell terminate test tokenize touch
trace track train transform translate trim truncate try turn undo unfreeze unite unpack unwrap
update use validate verify visit wait wake walk warn watch weigh wrap write yield
"""
VAGUE, VERBS = frozenset(VAGUE.split()), frozenset(VERBS.split())
BANNED = {"found", "what", "given", "asked"}


def documented(tree):
    """Yield (line, whether a function is called by its name, docstring) of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                decorators = {ast.unparse(d) for d in getattr(node, "decorator_list", [])}
                title = isinstance(node, ast.Module | ast.ClassDef)
                title |= any("property" in d for d in decorators)
                yield getattr(node, "lineno", 1), not title, text


def wrong_opening(text, called):
    """Return the fault in a docstring's opening; empty where there is none."""
    if not text[:1].strip():
        return "does not begin on the line of its quotes"
    first = text.split()[0]
    word = first.strip(",.:;\"'").lower()
    if word in VAGUE or (word == "one" and text.split()[1] == "of"):
        return f"opens with {first!r}"
    if called and word not in ARTICLES | VERBS:
        return f"opens with {first!r}: no article, and no verb of VERBS"
    summary = text.split("\n\n")[0].rstrip()
    return "" if summary[-1] in ".?!:`" else "its first sentence does not end"


def bound_names(tree):
    """Yield (line, name) of every argument and variable, except the attributes of a class."""
    attributes = {
        target
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        for target in getattr(item, "targets", [getattr(item, "target", None)])
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if node not in attributes:
                yield node.lineno, node.id
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def test_every_wing_is_listed():
    assert len(WINGS) > 15 and set(PENDING) < WINGS.keys()


@pytest.mark.parametrize("wing", CHECKED)
def test_docstrings_open_with_a_verb_or_an_article(wing):
    offenders = [
        f"{path.relative_to(ROOT)}:{line} {why}: {text.splitlines()[0][:60]}"
        for path in WINGS[wing]
        for line, called, text in documented(ast.parse(path.read_text()))
        if (why := wrong_opening(text, called))
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("wing", CHECKED)
def test_names_say_what_they_hold(wing):
    offenders = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in WINGS[wing]
        for line, name in bound_names(ast.parse(path.read_text()))
        if name in BANNED
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    ("text", "called", "passes"),
    [
        ("Return the mean.", True, True),
        ("The mean over tokens.", True, True),
        ("Each finding on a stage.", True, True),
        ("Teachers behind a server.", False, True),
        ("Mean over tokens.", True, False),
        ("Returns the mean.", True, False),
        ("``mean``: the mean.", True, False),
        ("Whether it answers.", True, False),
        ("What a stage does.", False, False),
        ("One of the teachers.", False, False),
        ("\n    Return the mean.", True, False),
        ("Return the mean", True, False),
    ],
)
def test_the_rule_itself(text, called, passes):
    assert (not wrong_opening(text, called)) == passes


def test_attributes_of_a_class_may_keep_their_names():
    code = "class F:\n    what: str\n    found = 1\n"
    code += "def f(given):\n    asked = [what for what in given]"
    assert sorted({n for _, n in bound_names(ast.parse(code))}) == ["asked", "given", "what"]
