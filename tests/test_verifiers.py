"""Verifiers: what passes and what does not; what they raise is wrong, counted and said."""

import json
import os
import time

import pytest
from test_data import judged, table

from opdctl.errors import RecipeError, StageFailed, UsageError
from opdctl.rollout.data.jsonl import Jsonl
from opdctl.types import Prompt, Rollout
from running import carry_out, one_stage


def file_of(tmp_path, *rows):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"p{i}", **r}) + "\n" for i, r in enumerate(rows))
    )
    return str(path)


def one(tmp_path, verifier, answer="7", **keys):
    """(data, its only prompt)."""
    columns = {"answer_column": ""} if answer is None else {}
    row = {k: keys.pop(k) for k in ("schema", "tests", "grade") if k in keys}
    row |= {} if answer is None else {"answer": answer}
    data = table(Jsonl, verifier, path=file_of(tmp_path, row), eval_share=0.0, **columns, **keys)
    (prompt,) = data.prompts("train")
    return data, prompt


@pytest.mark.parametrize(
    ("keys", "reference", "right", "wrong"),
    [
        ({}, "7", [" 7\n"], ["7.", "07", ""]),
        ({"ignore_case": True}, "Yes", ["yes", "YES "], ["y e s"]),
        ({"ignore_space": True}, "a b", ["a  \n b"], ["ab", "A b"]),
        ({"nfkc": True}, "12", ["\uff11\uff12"], ["1 2"]),
        ({"trim": ".!"}, "42", ["42.", " 42!. ", ".42"], ["4.2"]),
    ],
)
def test_exact(tmp_path, keys, reference, right, wrong):
    data, prompt = one(tmp_path, {"exact": keys}, reference)
    assert [judged(data, prompt, t) for t in right] == [1.0] * len(right)
    assert [judged(data, prompt, t) for t in wrong] == [0.0] * len(wrong)
    if keys:
        plain, _ = one(tmp_path, "exact", reference)
        assert 0.0 in [judged(plain, prompt, t) for t in right]  # it is the key that passes them


def test_regex(tmp_path):
    pattern = r"answer: (?P<answer>\w+)"
    text = "answer: 3, no: answer: 7."
    last, prompt = one(tmp_path, {"regex": {"pattern": pattern}})
    first, _ = one(tmp_path, {"regex": {"pattern": pattern, "match": "first"}})
    assert judged(last, prompt, text) == 1.0 and judged(first, prompt, text) == 0.0
    assert judged(last, prompt, "7") == 0.0
    whole, _ = one(tmp_path, {"regex": {"pattern": r"(?P<answer>\d)!?", "match": "whole"}})
    assert judged(whole, prompt, "7!") == 1.0 and judged(whole, prompt, "7! 7!") == 0.0
    alone, _ = one(tmp_path, {"regex": {"pattern": "yes", "ignore_case": True}})
    assert judged(alone, prompt, "YES") == 1.0 and judged(alone, prompt, "no") == 0.0


def test_a_pattern_that_never_ends_is_cut_off(tmp_path):
    data, prompt = one(
        tmp_path, {"regex": {"pattern": r"(?:a|aa)+(?:a|aa)+(?:a|aa)+$", "timeout": 0.2}}
    )
    assert isinstance(judged(data, prompt, "a" * 400 + "b"), TimeoutError)


def test_json_schema(tmp_path):
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    data, prompt = one(tmp_path, {"json_schema": {"schema": schema}}, None)
    for text in ('{"n": 1}', 'Sure:\n```json\n{"n": 2, "m": 3}\n```\n'):
        assert judged(data, prompt, text) == 1.0
    for text in ("{}", '{"n": "1"}', "n: 1", "", "[" * 100_000, '```\n{"n": 1}\n```\n```\n{}\n```'):
        assert judged(data, prompt, text) == 0.0
    own, prompt = one(tmp_path, "json_schema", None, schema=json.dumps({"const": [1]}))
    assert judged(own, prompt, "[1]") == 1.0 and judged(own, prompt, "[2]") == 0.0
    with pytest.raises(UsageError, match=r"row 1: not a JSON schema"):
        one(tmp_path, "json_schema", None, schema={"type": "number of things"})
    remote, prompt = one(tmp_path, "json_schema", None, schema={"$ref": "http://x.invalid/s.json"})
    assert "Unresolvable" in type(judged(remote, prompt, "1")).__name__ + str(
        judged(remote, prompt, "1")
    )


def test_math(tmp_path):
    data, prompt = one(tmp_path, {"math": {"timeout": 5.0}}, "\\frac{1}{2}")
    ctx = type("C", (), {"check": lambda self: None})()
    verifier = data.verifier(data.keys, ctx, "d")
    verdicts = verifier.score([(prompt, t) for t in ("so it is $0.5$", "$2$", "", "\\boxed{1/2}")])
    assert verdicts == [1.0, 0.0, 0.0, 1.0]
    process = verifier.child.process
    bomb = Prompt("b", "d", "q", "$7$", {})
    start = time.monotonic()
    (late,) = verifier.score([(bomb, "$9^{9^{9^{9^{9}}}}$")])
    assert isinstance(late, TimeoutError | RuntimeError) and time.monotonic() - start < 60
    odd = Prompt("b", "d", "q", "", {})
    (unreadable, fine) = verifier.score([(odd, "$1$"), (prompt, "$0.5$")])
    assert "reads nothing" in str(unreadable) and fine == 1.0  # it goes on after what went before
    verifier.child.finalizer()
    assert process.poll() is not None and verifier.child.process.poll() is not None


CHECKS = """
def close(prompt, response, answer, row):
    if response == "oops":
        raise LookupError("nothing like that")
    return {"half": 0.5, "two": 2}.get(response, response == row["grade"])
"""


def test_python(tmp_path):
    (tmp_path / "checks.py").write_text(CHECKS)
    call = {"call": f"{tmp_path}/checks.py:close", "columns": ["grade"]}
    data, prompt = one(tmp_path, {"python": call}, grade="a")
    assert [judged(data, prompt, t) for t in ("a", "b", "half")] == [1.0, 0.0, 0.5]
    assert "no number from 0 to 1" in str(judged(data, prompt, "two"))
    assert isinstance(judged(data, prompt, "oops"), LookupError)
    with pytest.raises(UsageError, match=r"row 1: no column 'grade'\n.*columns: prompt, answer"):
        one(tmp_path, {"python": call})
    for path, message in (("opdctl.nowhere:f", "No module"), ("math:pi", "no function")):
        data, prompt = one(tmp_path, {"python": {"call": path}})
        with pytest.raises(UsageError, match=message):
            judged(data, prompt, "a")


def prepared(on_disk, tmp_path, verifier, kind="rl", **keys):
    data = {"kind": "jsonl", "path": str(on_disk / "sums.jsonl"), "eval_share": 0}
    data |= {"verifier": verifier}
    stage = {"kind": kind, "student": str(on_disk / "s"), "steps": 2}
    stage |= {"prompts": {"per_step": 4, "samples": 2}, "sampling": {"max_tokens": 4}}
    return one_stage(tmp_path / "run", {"sums": data}, **stage | keys)


ODD = "def odd(prompt, response, answer, row):\n    return 1 / (len(response) % 2)\n"
NEVER = "def odd(prompt, response, answer, row):\n    raise KeyError('grade')\n"


def answers(ctx, *texts):
    (prompt, *_) = ctx.prompts.of("sums", "train")
    return [Rollout(prompt, [1], [2], text=t) for t in texts]


def test_what_a_verifier_raises_is_wrong_counted_and_said_once(on_disk, tmp_path, capsys):
    (tmp_path / "checks.py").write_text(ODD)
    ctx = prepared(on_disk, tmp_path, {"python": {"call": f"{tmp_path}/checks.py:odd"}})
    rollouts = answers(ctx, "a", "aa", "b", "bb")
    for _ in range(2):  # each is asked once
        assert ctx.verdicts.verify(rollouts) == [1.0, 0.0, 1.0, 0.0]
        assert ctx.verdicts.failed == {"sums": 2}
    said = capsys.readouterr().out
    assert said.count("ZeroDivisionError") == 1 and "data.sums" in said


def test_a_verifier_that_always_raises_fails_the_stage(on_disk, tmp_path):
    (tmp_path / "checks.py").write_text(NEVER)
    ctx = prepared(on_disk, tmp_path, {"python": {"call": f"{tmp_path}/checks.py:odd"}})
    assert ctx.verdicts.verify(answers(ctx, *"abcdefgh")) == [0.0] * 8
    with pytest.raises(StageFailed, match="each of 32 answers, lastly: KeyError: 'grade'"):
        ctx.verdicts.verify(answers(ctx, *("x" * 24)))


def test_metrics_count_what_a_verifier_raised(on_disk, tmp_path):
    text = (
        "def odd(prompt, response, answer, row):\n    assert 'e' not in response\n    return 0.25\n"
    )
    (tmp_path / "checks.py").write_text(text)
    call = {"call": f"{tmp_path}/checks.py:odd"}
    objective = {"objectives": {"policy_gradient": {}}, "minibatches": 1}
    ctx = prepared(on_disk, tmp_path, {"python": call}, **objective)
    rows = carry_out(ctx)
    assert sum(r.get("verifier_errors", 0) for r in rows) == ctx.verdicts.failed["sums"]
    assert {r["step"] for r in rows} == {1, 2}


def test_a_recipe_with_a_wrong_verifier_is_refused(on_disk, tmp_path):
    wrong = {
        "verifier: expected a mapping": 3,
        r"verifier.regex.pattern: not a regular": {"regex": {"pattern": "("}},
        r"one: verifier: math": {"exact": {}, "math": {}},
        r"did you mean 'exact'": "exat",
        r"verifier.python.call: no file": {"python": {"call": "nothing.py:f"}},
        r"names no function": {"python": {"call": "os.path"}},
        r"schema: not a JSON schema": {"json_schema": {"schema": {"type": 7}}},
    }
    for message, verifier in wrong.items():
        with pytest.raises(RecipeError, match=message):
            prepared(on_disk, tmp_path / os.urandom(4).hex(), verifier)
