"""The answer in a response or in a reference column: one mechanism for whatever verifies it."""

import json

import pytest
from test_data import gym, table

from opdctl.errors import RecipeError, UsageError
from opdctl.recipe.recipe import resolve
from opdctl.rollout.data.jsonl import Jsonl
from opdctl.rollout.extraction import Extract
from opdctl.rollout.verdicts import Verifiers
from opdctl.types import Rollout


def verdicts(data, prompt, *texts):
    """The verdicts on responses, as a stage asks for them."""

    class Context:
        name = "it"

        def check(self):
            pass

    Context.prompts = type("P", (), {"data": lambda self, domain: data})()
    return Verifiers(Context()).verify([Rollout(prompt, [1], [2], text=t) for t in texts])


NUMBERS = {
    "The answer is 3.": "3",
    "5-3=2": "2",
    "so 10-3": "3",
    "x = -4, or so": "-4",
    "\u22127": "-7",
    "total: $1,234.50!": "1234.50",
    "-$5": "-5",
    "1,2,3": "3",
    "it is 1 1/2 cups": "1 1/2",
    "a half: 1/2": "1/2",
    "$\\frac{3}{4}$": "3/4",
    "1{,}234": "1234",
    "**18** eggs": "18",
    "18kg of x2": "18",
    "0.00001.": "0.00001",
    "1e-5": "1e-5",
    "none": None,
    "H2O": None,
}


@pytest.mark.parametrize(("text", "answer"), NUMBERS.items())
def test_the_last_number(text, answer):
    assert Extract(take="last_number").find(text) == answer


@pytest.mark.parametrize(
    ("keys", "text", "answer"),
    [
        ({}, " all\n of it ", " all\n of it "),
        ({"take": "last_line"}, "so\n\n 3 \n \n", "3"),
        ({"take": "last_line"}, " \n", None),
        ({"take": "boxed"}, "\\boxed{1} or \\boxed{2}.", "2"),
        ({"take": "boxed"}, "\\boxed{\\frac{1}{\\{2\\}}}", "\\frac{1}{\\{2\\}}"),
        ({"take": "boxed"}, "\\boxed{\\boxed{3}} and $\\boxed 4$", "4"),
        ({"take": "boxed"}, "\\boxed{1} and then \\boxed{2", None),
        ({"take": "boxed"}, "\\boxed{}", None),
        ({"take": "boxed"}, "\\boxedup{1}", None),
        ({"tag": "answer"}, "<answer>1</answer> <answer> 2\n</answer>", "2"),
        ({"tag": "answer"}, "<answer>1</answer> <answer>2", None),
        ({"tag": "answer"}, "</answer> 2", None),
        ({"pattern": r"#### (.+)"}, "2+2=4\n#### 4 \n", "4"),
        ({"pattern": r"(a+)(?P<answer>b+)"}, "aab abb", "bb"),
        ({"pattern": r"\d+"}, "1 22", "22"),
        ({"pattern": r"\d+"}, "none", None),
    ],
)
def test_each_way_to_an_answer(keys, text, answer):
    """tinker-cookbook #895: an earlier box shadowed the last one."""
    assert Extract(**keys).find(text) == answer


SCHEMA = {"json_schema": {"schema": {"const": 3}}}
CODE = "def right(prompt, response, answer, row):\n    return response == answer == '3'\n"
SAYS = {
    "boxed": "It is \\boxed{4}, no: \\boxed{3}.",
    "last_line": "let me see 5\n3\n",
    "last_number": "There are 4 and then 3 of them",
}


@pytest.mark.parametrize("take", SAYS)
@pytest.mark.parametrize("verifier", ["exact", "regex", "math", "json_schema", "python"])
def test_every_verifier_is_given_the_answer_that_is_extracted(tmp_path, verifier, take):
    (tmp_path / "right.py").write_text(CODE)
    keys = {
        "regex": {"regex": {"pattern": "(?P<answer>.*)", "match": "whole"}},
        "json_schema": SCHEMA,
        "python": {"python": {"call": f"{tmp_path}/right.py:right"}},
    }.get(verifier, verifier)
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+2", "answer": "1+2 is 3\\n#### 3"}\n')
    ways = {"extract": take, "reference": {"pattern": "#### (.*)"}}
    data = table(Jsonl, keys, path=str(tmp_path / "d.jsonl"), eval_share=0.0, **ways)
    (prompt,) = data.prompts("train")
    assert prompt.answer == "1+2 is 3\n#### 3"  # what sft learns
    assert verdicts(data, prompt, SAYS[take], "no answer") == [1.0, 0.0]
    plain = table(Jsonl, keys, path=str(tmp_path / "d.jsonl"), eval_share=0.0)
    if verifier != "math":  # which finds boxes by itself
        assert verdicts(plain, prompt, SAYS[take]) == [0.0]


def test_a_chat_models_sentence_is_right_on_reasoning_gym():
    """Chat models answer in sentences, which its scorers give nothing for."""
    plain = gym(task="gcd", items=20)
    (prompt, *_) = plain.prompts("train")
    text = f"The answer is {prompt.answer}."
    assert verdicts(plain, prompt, text, prompt.answer) == [0.0, 1.0]
    data = gym(task="gcd", items=20, extract=Extract(take="last_number"))
    wrong = f"It is {prompt.answer} or {int(prompt.answer) + 1}"
    assert verdicts(data, prompt, text, prompt.answer, wrong, "no") == [1.0, 1.0, 0.0, 0.0]
    for keys, said in (
        ({"tag": "answer"}, "<answer>{}</answer>"),
        ({"take": "boxed"}, "\\boxed{{{}}}"),
    ):
        data = gym(task="gcd", items=20, extract=Extract(**keys))
        assert verdicts(data, prompt, said.format(prompt.answer), text) == [1.0, 0.0]


def test_thinking_is_left_out_before_the_answer_is_looked_for():
    from opdctl.models.chat.thinking import Thinking

    thinking = Thinking(mode="think")
    data = gym(task="gcd", items=20, extract=Extract(take="last_number"), thinking=thinking)
    (prompt, *_) = data.prompts("train")
    right = f"<think>3</think>It is {prompt.answer}."
    assert verdicts(data, prompt, right, f"<think>{prompt.answer}</think>it is") == [1.0, 0.0]


GSM8K = {
    "She sold 48/2 = <<48/2=24>>24 in May.\nSo 48+24 = <<48+24=72>>72.\n#### 72": "72",
    "It costs $<<1000*1.45=1450>>1,450.\n#### 1,450": "1450",
    "They lose 3-8 = <<3-8=-5>>-5.\n#### -5": "-5",
    "Half of it.\n#### 0.5": "0.5",
}


@pytest.mark.parametrize("take", ["last_number", "pattern"])
def test_references_of_gsm8k(tmp_path, take):
    """The reference is behind #### at the end of a solution, with commas between thousands."""
    rows = [{"question": f"q{i}", "answer": a} for i, a in enumerate(GSM8K)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    way = {"pattern": r"#### (.+)"} if take == "pattern" else take
    keys = {"prompt_column": "question", "eval_share": 0.0, "extract": "last_number"}
    data = table(Jsonl, "math", path=str(tmp_path / "d.jsonl"), reference=way, **keys)
    prompts = data.prompts("train")
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        said = [f"So it is {GSM8K[p.answer]}." for p in (prompt, other)]
        assert verdicts(data, prompt, prompt.answer, *said) == [1.0, 1.0, 0.0]


def test_a_row_without_the_part_that_is_compared_is_refused(tmp_path):
    rows = [{"prompt": "a", "answer": "#### 1"}, {"prompt": "b", "answer": "unsolved"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for way, name in (("last_number", "last number"), ({"pattern": "#### (.*)"}, "match of '####")):
        data = table(Jsonl, path=str(tmp_path / "d.jsonl"), eval_share=0.0, reference=way)
        with pytest.raises(UsageError, match=f"d.jsonl, row 2: column 'answer' .*no {name}"):
            data.prompts("train")


def test_a_pattern_that_never_ends_counts_as_an_error(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    way = {"pattern": r"(?:a|aa)+(?:a|aa)+(?:a|aa)+$", "timeout": 0.1}
    data = table(Jsonl, path=str(tmp_path / "d.jsonl"), eval_share=0.0, extract=way)
    (prompt,) = data.prompts("train")
    assert verdicts(data, prompt, "a" * 400 + "b") == [0.0]


def checked(**domain):
    """Resolve a recipe with one domain; return the problems' paths."""
    tree = {"data": {"d": {"eval_share": 0.0, **domain}}}
    try:
        resolve({**tree, "stages": {"it": {"kind": "evaluate", "student": "a/b"}}}, "x")
    except RecipeError as error:
        return [p.path for p in error.problems]
    return []


def test_wrong_ways_are_refused_by_name(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    file = {"kind": "jsonl", "path": str(tmp_path / "d.jsonl")}
    assert checked(**file, extract="boxed", reference={"tag": "final-answer"}) == []
    assert checked(**file, extract="box") == ["data.d.extract.take"]
    assert checked(**file, extract={"take": "boxed", "tag": "a"}) == ["data.d.extract.tag"]
    assert checked(**file, reference={"tag": "<a>"}) == ["data.d.reference.tag"]
    assert checked(**file, extract={"pattern": "("}) == ["data.d.extract.pattern"]
    lone = {**file, "answer_column": "", "verifier": {"regex": {"pattern": "."}}}
    assert checked(**lone) == []
    assert checked(**lone, reference="boxed") == ["data.d.reference"]
    wanted = {"regex": {"pattern": "(?P<answer>.)"}}
    assert checked(**{**lone, "verifier": wanted}) == ["data.d.answer_column"]
    gcd = {"kind": "reasoning_gym", "task": "gcd"}
    assert checked(**gcd, extract="last_number") == []
    assert checked(**gcd, reference="last_number") == ["data.d.reference"]


def test_a_pattern_without_a_group_needs_no_reference(tmp_path):
    """The pattern decides by itself, as its help says."""
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n')
    keys = {"path": str(tmp_path / "d.jsonl"), "answer_column": "", "eval_share": 0.0}
    data = table(Jsonl, {"regex": {"pattern": "."}}, **keys)
    (prompt,) = data.prompts("train")
    assert verdicts(data, prompt, "x", "", "a\nb") == [1.0, 0.0, 1.0]
