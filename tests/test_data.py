"""Data: the split never overlaps, verifiers score, columns are keys, order is a function."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from opdctl.config.registry import member
from opdctl.config.schema import build
from opdctl.config.shards import shards
from opdctl.errors import RecipeError, UsageError
from opdctl.models.model import load
from opdctl.recipe.recipe import lookup, resolve
from opdctl.rollout.data.hf import Hf
from opdctl.rollout.data.jsonl import Jsonl
from opdctl.rollout.data.reasoning_gym import ReasoningGym
from opdctl.rollout.prompts import PromptOrder, prompts_within_limit
from opdctl.rollout.split import canonical, split_of
from opdctl.run import provenance
from opdctl.types import Prompt
from running import carry_out, one_stage, plain


def gym(**keys):
    return ReasoningGym(ReasoningGym.Config(kind="reasoning_gym", **keys), "d", 5)


def table(cls, verifier="exact", **keys):
    """A tabular domain, its keys checked as those of a recipe are."""
    problems = []
    raw = {"kind": "it", "verifier": verifier, **keys}
    config = build(cls.Config, raw, "data.d", problems, lookup)
    assert not problems
    return cls(config, "d", 0)


def judged(data, prompt, text):
    """The verdict on one answer, by the verifier that the data names."""
    ((name, keys),) = data.config.verifier.items()
    ctx = SimpleNamespace(check=lambda: None)
    (verdict,) = member("verifiers", name)(keys, ctx, "d").score([(prompt, text)])
    return verdict


def test_split_is_a_function_of_the_question():
    data = gym(task="gcd", prompt="gcd {numbers}=", items=3000, config={"max_value": 60})
    train, held = data.prompts("train"), data.prompts("eval")
    ours, theirs = {canonical(p.text) for p in train}, {canonical(p.text) for p in held}
    assert not ours & theirs and len(ours) == len(train) and len(theirs) == len(held)
    assert 0.2 < len(held) / (len(train) + len(held)) < 0.3
    again = ReasoningGym(data.config, "d", 99)
    assert not {canonical(p.text) for p in again.prompts("train")} & theirs
    assert split_of("  A  b ", 0.5) == split_of("a B", 0.5)


def test_reasoning_gym_scores_its_own_answers_and_nothing_else():
    tasks = [
        {"task": "gcd", "prompt": "gcd {numbers}="},
        {"task": "spell_backward", "prompt": "{word}=", "lowercase": True},
        {
            "task": "number_sorting",
            "prompt": "{direction:.1}{original_numbers}=",
            "answer": "list",
            "separator": "",
            "config": {
                "min_numbers": 3,
                "max_numbers": 4,
                "min_value": 0,
                "max_value": 9,
                "min_decimals": 0,
                "max_decimals": 0,
            },
        },
    ]
    for task in tasks:
        data = gym(items=60, **task)
        for prompt in data.prompts("train"):
            assert data.score(prompt, prompt.answer) == 1.0
            assert data.score(prompt, f" {prompt.answer} ") == 1.0
            for wrong in ("", "x", prompt.answer + " 7 7", "[", "gcd"):
                assert data.score(prompt, wrong) == 0.0
    sort = data.prompts("train")[0]
    assert sort.text[0] in "ad" and sort.text[1:-1].isdigit() and sort.answer.isdigit()


def test_template_reads_fields_only():
    with pytest.raises(UsageError, match="no field"):
        gym(task="gcd", prompt="{numbrs}=").prompts("train")
    with pytest.raises(UsageError):
        gym(task="gcd", prompt="{numbers.__class__}").prompts("train")
    with pytest.raises(UsageError, match="refuses"):
        gym(task="gcdd")


def test_jsonl_parquet_and_hf(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"q": f"what is {i} + 1?", "a": str(i + 1)} for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hf"))
    keys = {"prompt_column": "q", "answer_column": "a", "eval_share": 0.3}
    tables = [
        table(Jsonl, path=str(tmp_path / "d.jsonl"), **keys),
        table(Jsonl, path=str(tmp_path / "d.parquet"), **keys),
        table(Hf, path=str(tmp_path / "hf"), **keys),
    ]
    prompts = [d.prompts("train") for d in tables]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[0]) + len(tables[0].prompts("eval")) == 200
    first = prompts[0][0]
    assert judged(tables[0], first, first.answer + " ") == 1.0
    assert judged(tables[0], first, "no") == 0.0


def test_shards_are_one_table_in_the_order_of_their_names(on_disk, tmp_path):
    """Whatever wrote them last; the same prompts, steps and rows as of one file; hashed by name."""
    whole = Path(sums(tmp_path))
    lines = whole.read_text().splitlines(keepends=True)
    parts = tmp_path / "parts"
    parts.mkdir()
    cuts = {"00002": lines[40:], "00000": lines[:17], "00001": lines[17:40]}
    for name, part in cuts.items():
        rows = [json.loads(line) for line in part]
        if name == "00001":
            datasets.Dataset.from_list(rows).to_parquet(parts / f"t-{name}.parquet")
        else:
            (parts / f"t-{name}.jsonl").write_text("".join(part))
    (parts / "other.txt").write_text("nothing to do with it")
    pattern = str(parts / "t-*")
    ours, one = (table(Jsonl, path=p, eval_share=0.3) for p in (pattern, str(whole)))
    assert [p.text for p in ours.prompts("train")] == [p.text for p in one.prompts("train")]
    assert list(ours.stored("train", tmp_path / "cache")) == ours.prompts("train")
    runs = [
        [plain(r) for r in carry_out(staged(on_disk, tmp_path, f"r{i}", path=path, stream=bool(i)))]
        for i, path in enumerate((str(whole), pattern))
    ]
    assert runs[0] == runs[1]
    before = provenance.data(Path(pattern))
    spool = len(list((tmp_path / "cache").iterdir()))
    (parts / "t-00003.jsonl").write_text(lines[0])
    assert provenance.data(Path(pattern)) != before
    ours.stored("train", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == spool + 1, "read again"
    (parts / "t-00003.jsonl").write_text("no json")
    with pytest.raises(UsageError, match=r"t-00003.jsonl:1: not JSON"):
        ours.prompts("train")
    for cls, path, hint in (
        (Jsonl, str(parts), "/*.jsonl"),
        (Jsonl, str(parts / "u-*"), "a .jsonl or"),
        (Hf, pattern, "kind: jsonl"),
    ):
        (problem,) = cls.problems(table(cls, path=path).config)
        assert hint in problem.hint
    named = tmp_path / "a[1].jsonl"
    named.write_text(lines[0])
    assert shards(str(named)) == [named], "a file of that very name is no pattern"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops\n", r"d.jsonl:1: not JSON"),
        ("[1]\n", "expected an object"),
        ('{"prompt": "x"}\n', "no column 'answer'"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    (tmp_path / "d.jsonl").write_text(text)
    data = table(Jsonl, path=str(tmp_path / "d.jsonl"))
    with pytest.raises(UsageError, match=message):
        data.prompts("train")
    missing = table(Jsonl, path=str(tmp_path / "no.jsonl"))
    with pytest.raises(UsageError, match="no file"):
        missing.prompts("train")
    (tmp_path / "d.parquet").write_text(text)
    bad = table(Jsonl, path=str(tmp_path / "d.parquet"))
    with pytest.raises(UsageError, match="not parquet"):
        bad.prompts("train")


class Fixed:
    """Just enough of a context for the prompt order."""

    def __init__(self, shares, per_step, count):
        from types import SimpleNamespace as Bag

        self.config = Bag(prompts=Bag(per_step=per_step, pool=0, samples=1, max_tokens=0))
        self.seed, self.name = 3, "s"
        self.recipe = Bag(domains=lambda _: shares)
        pool = [Bag(id=i) for i in range(count)]
        self.prompts = Bag(of=lambda domain, split: [(domain, p.id) for p in pool])


def test_order_is_exact_over_epochs_and_shares():
    order = PromptOrder(Fixed({"a": 0.5, "b": 0.3, "c": 0.2}, 7, 10), None)
    taken = [order.at(step) for step in range(100)]
    assert all(len(t) == 7 for t in taken)
    flat = [p for t in taken for p in t]
    counts = {d: sum(p[0] == d for p in flat) for d in "abc"}
    assert counts == {"a": 350, "b": 210, "c": 140}
    of_a = [p for p in flat if p[0] == "a"]
    for epoch in range(35):
        assert len(set(of_a[10 * epoch : 10 * epoch + 10])) == 10
    assert of_a[:10] != of_a[10:20]
    fresh = PromptOrder(Fixed({"a": 0.5, "b": 0.3, "c": 0.2}, 7, 10), None)
    assert fresh.at(57) == taken[57]  # no state: a step needs no step before it


def test_corruption_is_a_stated_share_and_always_wrong():
    from opdctl.rollout.sources.dataset import corrupt_answer

    pool = [Prompt("x", "d", "q", a, {}) for a in ("7", "42", "abc", "a", "10 2", "")]
    for prompt in pool:
        wrong = {corrupt_answer(prompt, pool, "t", i)[1] for i in range(50)}
        assert prompt.answer not in wrong and len(wrong) > 3
    alone = Prompt("x", "d", "q", "1", {})
    assert corrupt_answer(alone, [alone], "t")[1] != "1"


def sums(tmp_path, count=60, **more):
    """A file of questions, some of them empty or said twice."""
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), **more} for i in range(count)]
    rows += [{"prompt": f" {i}+{i}= ", "answer": "?"} for i in range(0, count, 6)]
    rows += [{"prompt": " ", "answer": "1"}] * 3
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_empty_and_repeated_prompts_are_left_out_and_counted(tmp_path):
    data = table(Jsonl, path=sums(tmp_path), eval_share=0.2)
    kept = {side: data.prompts(side) for side in ("train", "eval")}
    assert len(kept["train"]) + len(kept["eval"]) == 60
    counts = data.counts["train"] + data.counts["eval"]
    assert counts["repeated"] == 10 and counts["empty"] == 3 and counts["rows"] == 2 * 73
    assert data.counts["train"]["kept"] == len(kept["train"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_a_stream_is_the_list(tmp_path, kind):
    """The same prompts in the same places; slices and picks read nothing; a second opening none."""
    path, cls = sums(tmp_path), Jsonl
    rows = datasets.Dataset.from_list([json.loads(x) for x in Path(path).read_text().splitlines()])
    if kind == "parquet":
        path = str(tmp_path / "sums.parquet")
        rows.to_parquet(path)
    elif kind == "hf":
        path, cls = str(tmp_path / "saved"), Hf
        rows.save_to_disk(path)
    data = table(cls, path=path, eval_share=0.2, limit=30)
    listed, spooled = data.prompts("train"), data.stored("train", tmp_path / "cache")
    assert list(spooled) == listed and len(spooled) == 30
    assert [p.item for p in spooled] == [p.item for p in listed]
    assert spooled[7] == listed[7] and spooled[-1] == listed[-1]
    assert list(spooled[5:20:3]) == listed[5:20:3] and list(spooled[10:][:3]) == listed[10:13]
    assert list(spooled.select([4, 2])[1:]) == [listed[2]] and list(spooled[9:].select([1])) == [
        listed[10]
    ]
    again = table(cls, path=path, eval_share=0.2, limit=30)
    again.rows = None  # not to be read again
    assert list(again.stored("train", tmp_path / "cache")) == listed
    assert again.counts == {"train": data.counts["train"]}


def test_a_stream_is_written_again_for_other_rows(tmp_path):
    data = table(Jsonl, path=sums(tmp_path), eval_share=0.0)
    assert len(data.stored("train", tmp_path / "cache")) == 60
    sums(tmp_path, 50)
    assert len(data.stored("train", tmp_path / "cache")) == 50


def staged(on_disk, tmp_path, name, prompts=None, **data):
    path = data.pop("path", None) or sums(tmp_path)
    keys = {"kind": "jsonl", "path": path, "eval_share": 0.3, **data}
    prompt_keys = {"per_step": 7, "samples": 1, **(prompts or {})}
    return one_stage(
        tmp_path / name,
        {"s": keys},
        kind="sft",
        student=str(on_disk / "s"),
        steps=9,
        prompts=prompt_keys,
    )


def test_a_stage_on_a_stream_takes_the_same_steps(on_disk, tmp_path):
    """Over an epoch's end: the same rows in the same order, the same numbers."""
    rows = {}
    for stream in (False, True):
        ctx = staged(on_disk, tmp_path, f"run{stream}", stream=stream)
        rows[stream] = [plain(r) for r in carry_out(ctx)]
        assert ctx.prompts.counts["s"]["train"]["repeated"] > 0
    assert rows[True] == rows[False] and len(rows[True]) == 9
    order, other = (PromptOrder(ctx, None) for _ in range(2))
    assert [order.at(s) for s in (8, 3)] == [other.at(s) for s in (8, 3)]


def test_prompts_that_are_too_long(on_disk, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"prompts.max_tokens is 6\n.*drop"):
        carry_out(staged(on_disk, tmp_path, "refused", {"max_tokens": 6}))
    lengths = {}
    for stream in (False, True):
        drop = {"max_tokens": 6, "too_long": "drop"}
        ctx = staged(on_disk, tmp_path, f"run{stream}", drop, stream=stream)
        model = load(ctx.models.path_of(ctx.config.student))
        pool = PromptOrder(ctx, model).pools["s"]
        assert isinstance(pool, list) == (not stream)  # what is on disk stays there
        lengths[stream] = [len(model.render(p.text)) for p in pool]
        left = len(ctx.prompts.of("s", "train")) - len(pool)
        assert ctx.prompts.counts["s"]["train"]["too long"] == left > 0
        assert f"{left} too long" in capsys.readouterr().out
        assert len(prompts_within_limit(ctx, model, "s", "train", 3)) == 3
    assert max(lengths[True]) == 6 and lengths[True] == lengths[False]


def test_a_saved_folder_with_several_splits(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "q", "answer": "a"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "d"))
    held = table(Hf, path=str(tmp_path / "d"), split="test", eval_share=0.0)
    assert len(held.prompts("train")) == 1
    with pytest.raises(UsageError, match=r"no split 'tset'.*\n.*'test'"):
        table(Hf, path=str(tmp_path / "d"), split="tset").prompts("train")
    for keys in ({"revision": "main"}, {"subset": "x"}):
        config = table(Hf, path=str(tmp_path / "d"), **keys).config
        assert next(iter(keys)) == Hf.problems(config)[0].path


def test_conversations_of_one_text_with_other_calls_are_two(tmp_path):
    def row(name):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name}}]}
        turns = [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "7"}]
        return {"turns": [*turns, {"role": "user", "content": "and now?"}], "answer": "8"}

    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in ("add", "sub", "add")))
    config = Jsonl.Config(kind="jsonl", path=str(path), messages_column="turns", eval_share=0.0)
    data = Jsonl(config, "d", 0)
    assert len(data.prompts("train")) == 2 and data.counts["train"]["repeated"] == 1


def test_a_conversations_answer_is_in_the_column_that_is_named(tmp_path):
    """Check that only the default column may be absent: then the last turn is the answer."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "last"}]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"turns": turns, "gold": "8", "empty": None}) + "\n")
    keys = {"kind": "jsonl", "path": str(path), "messages_column": "turns", "eval_share": 0.0}

    def answer(**more):
        return Jsonl(Jsonl.Config(**keys, **more), "d", 0).prompts("train")[0].answer

    assert answer() == "last" and answer(answer_column="gold") == "8"
    for name in ("glod", "empty"):
        with pytest.raises(UsageError, match=f"row 1: no column '{name}'"):
            answer(answer_column=name)


def test_columns_that_nothing_reads_are_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text("{}")
    for keys, path in (
        ({"messages_column": "m", "thought_column": "t"}, "thought_column"),
        ({"tools_column": "t"}, "tools_column"),
    ):
        data = {"d": {"kind": "jsonl", "path": str(tmp_path / "c.jsonl"), **keys}}
        stage = {"kind": "sft", "student": "a/b"}
        with pytest.raises(RecipeError) as caught:
            resolve({"data": data, "stages": {"it": stage}}, "x")
        assert [p.path for p in caught.value.problems] == [f"data.d.{path}"]
