"""Rows with nested objects: the same from JSON lines, parquet and a saved data set."""

import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from test_messages import ASK, HERMES, TOOLS, call, says, talker

from opdctl.errors import UsageError
from opdctl.models.chat.conversation import render_conversation
from opdctl.models.chat.messages import read_tools, without_nulls
from opdctl.rollout.data._nested import KeyOrder
from opdctl.rollout.data.hf import Hf
from opdctl.rollout.data.jsonl import Jsonl
from opdctl.rollout.verifiers.json_schema import JsonSchema


def tool(name, properties, **more):
    schema = {"type": "object", "properties": properties, **more}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def row(number, arguments, tools, *turns, **keys):
    ask = {"role": "user", "content": f"{number}?"}
    return {"turns": [ask, says("", call(arguments), **keys), *turns], "tools": tools}


# keys that other rows lack, in orders that contradict each other, and nothing at all
ROWS = [
    row(0, {"unit": "C", "where": {"city": "Rome", "at": [1, None]}},
        [tool("look", {"unit": {"type": "string", "enum": ["C", "F"]}}, required=[])]),
    row(1, {"deep": {"b": 1, "a": [{"y": 1}, {"x": 2, "y": 3}]}, "unit": "F"},
        [tool("look", {"deep": {"description": "far", "type": "object"}}, required=["deep"]),
         {"type": "function", "function": {"description": "why", "name": "ask"}}]),
    row(2, {"a": None, "deep": {"a": [{"x": 0}]}, "where": {}}, None,
        {"role": "tool", "name": "look", "content": "sun"}, says("fine")),
    row(3, {}, [], {"role": "tool", "content": "sun"}, says("fine", call({"unit": "C"}))),
]  # fmt: skip


def write(folder, rows):
    """Return the data of the same rows by kind."""
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return {"lines": (Jsonl, lines), "parquet": (Jsonl, folder / "rows.parquet"),
            "saved": (Hf, folder / "saved")}  # fmt: skip


def prompts(kind, path, spool=None, **keys):
    keys = {"messages_column": "turns", "tools_column": "tools", "eval_share": 0.0} | keys
    data = kind(kind.Config(kind=kind.__name__.lower(), path=str(path), **keys), "d", 0)
    return data.stored("train", spool) if spool else data.prompts("train")


def test_the_same_rows_give_the_same_ids(tmp_path):
    model, ids, names = talker(HERMES), {}, {}
    for name, (kind, path) in write(tmp_path, ROWS).items():
        model.rendered.clear()
        read = prompts(kind, path)
        names[name] = [p.id for p in read]
        spooled = prompts(kind, path, spool=tmp_path / name)
        assert [(p, p.messages, p.tools) for p in spooled] == [
            (p, p.messages, p.tools) for p in read
        ]
        ids[name] = [render_conversation(model, p, True).ids for p in read]
    assert ids["lines"] == ids["parquet"] == ids["saved"] and len(ids["lines"]) == 4
    assert names["lines"] == names["parquet"] == names["saved"]
    text = model.tokenizer.decode(ids["parquet"][1])
    assert (
        '"arguments": {"unit": "F", "deep": {"b": 1, "a": [{"y": 1}, {"y": 3, "x": 2}]}}}' in text
    )
    assert json.dumps(ROWS[1]["tools"][0]) in text
    assert '{"name": "ask", "description": "why"}' in text, "as row 0 has its name first"
    assert '{"where": {}, "deep": {"a": [{"x": 0}]}}' in model.tokenizer.decode(ids["saved"][2])
    assert all("null" not in model.tokenizer.decode(i) for i in ids["parquet"][1:])
    assert '"at": [1, null]' in model.tokenizer.decode(ids["parquet"][0]), "a null in a list stays"


def test_nulls_and_the_order_of_keys():
    value = {"a": None, "b": [None, {"c": None, "d": {}}], "e": 0, "f": "", "g": [], "h": False}
    assert without_nulls(value) == {"b": [None, {"d": {}}], "e": 0, "f": "", "g": [], "h": False}
    order = KeyOrder()
    assert list(order.sort({"b": 1, "a": 2})) == ["b", "a"]
    assert list(order.sort({"c": 0, "a": 1, "b": 2})) == ["b", "a", "c"]
    assert list(order.sort({"x": [{"q": 1}]})["x"][0]) == ["q"]
    assert list(order.sort({"x": [{"p": 1, "q": 2}]})["x"][0]) == ["q", "p"]


def test_columns_of_json_text(tmp_path):
    """Check tools and calls as text, each of them or all: where Arrow has no type for them."""
    model = talker(HERMES)
    plain = row(0, {"unit": "C"}, [tool("look", {"unit": {"type": "string"}})])
    asks, calls = plain["turns"]
    inner = {**plain["tools"][0]["function"]}
    inner["parameters"] = json.dumps(inner["parameters"])
    forms = [
        plain,
        {"turns": json.dumps(plain["turns"]), "tools": json.dumps(plain["tools"])},
        {**plain, "tools": [json.dumps(t) for t in plain["tools"]]},
        {**plain, "turns": [json.dumps(m) for m in plain["turns"]]},
        {**plain, "turns": [asks, {**calls, "tool_calls": json.dumps(calls["tool_calls"])}]},
        {**plain, "turns": [asks, says("", call('{"unit": "C"}'))]},
        {**plain, "tools": [{"type": "function", "function": inner}]},
    ]
    ids = set()
    for n, form in enumerate(forms):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps(form))
        (prompt,) = prompts(Jsonl, tmp_path / f"{n}.jsonl")
        model.rendered.clear()
        ids.add(tuple(render_conversation(model, prompt, True).ids))
    assert len(ids) == 1
    assert read_tools("") == read_tools(None) == read_tools("[]") == []
    for column, text, part in (
        ("tools", "look(city)", "no list of JSON schemas"),
        ("turns", "hello", "expected a list of messages, got str 'hello'"),
        ("turns", [ASK, {**says("4"), "tool_calls": "look()"}], "are no list of calls: 'look"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps({**plain, column: text}))
        with pytest.raises(UsageError, match=part):
            prompts(Jsonl, tmp_path / "bad.jsonl")


def test_a_schema_that_a_verifier_reads_has_no_nulls_of_other_rows(tmp_path):
    """Check that {"const": 1} beside {"type": "string"} is not read as {"const": null, ...}."""
    rows = [
        {"prompt": f"{n}?", "schema": schema}
        for n, schema in enumerate([{"const": 1}, {"type": "string"}, {"required": ["a"]}])
    ]
    keys = {
        "messages_column": "",
        "tools_column": "",
        "answer_column": "",
        "verifier": {"json_schema": JsonSchema.Config()},
    }
    for kind, path in write(tmp_path, rows).values():
        read = prompts(kind, path, **keys)
        assert [p.item["schema"] for p in read] == [r["schema"] for r in rows]


def test_a_map_is_an_object(tmp_path):
    """Check arguments in a column of maps, as other programs than Arrow's write them."""
    text, maps = pyarrow.string(), pyarrow.map_(pyarrow.string(), pyarrow.string())
    function = pyarrow.struct([("name", text), ("arguments", maps)])
    calls = pyarrow.list_(pyarrow.struct([("function", function)]))
    message = pyarrow.struct([("role", text), ("content", text), ("tool_calls", calls)])
    made = {"function": {"name": "look", "arguments": [("unit", "C"), ("city", "Rome")]}}
    turns = [ASK, {"role": "assistant", "tool_calls": [made]}]
    table = pyarrow.table({"turns": pyarrow.array([turns], pyarrow.list_(message))})
    parquet.write_table(table, tmp_path / "m.parquet")
    (prompt,) = prompts(Jsonl, tmp_path / "m.parquet", tools_column="")
    ids = render_conversation(talker(HERMES.replace(TOOLS, "")), prompt, True).ids
    shown = talker(HERMES).tokenizer.decode(ids)
    assert '"arguments": {"unit": "C", "city": "Rome"}}' in shown
