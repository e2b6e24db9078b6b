"""What a message holds is said by the template, in the supervised ids, or the stage is refused.

The templates are short ones in the manner of public families: what they print and drop is theirs.
"""

import functools
import json
import string

import pytest
from test_chat import prompt_of
from transformers import GenerationConfig

from conftest import make_model
from opdctl.errors import UsageError
from opdctl.models.chat.conversation import render_conversation
from opdctl.models.chat.messages import invalid_reason, read_messages
from opdctl.models.chat.thinking import Thinking
from opdctl.models.model import Model

TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
CHATML = (
    TOOLS + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = (  # Hermes and Qwen: content, then each call
    "{% for c in m.tool_calls %}{{ '\n' if m.content or not loop.first else '' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}"
)
HERMES = CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS)
# thoughts of turns before the last question are cut, reasoning_content is a thought
QWEN3 = (
    TOOLS + "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = messages.index(m) %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% elif m.role == 'assistant' %}{% set content = m.content or '' %}{% set r = '' %}"
    "{% if m.reasoning_content %}{% set r = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set r = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or r) %}<think>\n{{ r.strip('\n') }}\n</think>\n\n"
    "{% endif %}{{ content }}" + CALLS + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# one call, in place of the content
LLAMA = (
    TOOLS + "{% for m in messages %}<|start|>{{ m.role }}<|header|>{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|header|>{% endif %}"
)
MISTRAL = (  # ids of nine characters; the whole function as JSON
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and tools %}[TOOLS]"
    "{{ tools | tojson }}{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}"
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}, "
    '"id": "{{ c.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]<|im_end|>'
    "{% elif m.role == 'tool' %}[RESULT] {{ m.content }}[/RESULT]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# always cuts thoughts, opens one, and joins the arguments as text
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|A|>{% if m.tool_calls %}"
    "{{ m.content }}{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}"
    "{% endfor %}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
DISTILL = R1.replace("<|A|><think>\n", "<|A|>")
GLM = HERMES.replace(
    "{{ c.function.arguments | tojson }}",
    "{% for k, v in c.function.arguments.items() %}<k>{{ k }}</k>"
    "<v>{{ v if v is string else v | tojson }}</v>{% endfor %}",
)
VERBATIM = HERMES.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
EITHER = HERMES.replace(
    "{{ c.function.arguments | tojson }}",
    "{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}",
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.reasoning_content }}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ID = "abcdefghi"
ASK = {"role": "user", "content": "how is Rome?"}


@functools.cache
def talker(template):
    model = make_model(alphabet=string.printable + "\u00e9\u4e2d")
    tokenizer = model.tokenizer
    names = ["<|im_start|>", "<|im_end|>", "<|A|>", "<|U|>", "<|start|>", "<|header|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names, "eos_token": "<|im_end|>"})
    tokenizer.chat_template = template
    model.net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.net.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return Model(model.net, tokenizer, "it")


def said(template, *turns, every=True, marks=None, **keys):
    """The supervised texts, without the end that each of them has."""
    model = talker(template)
    model.rendered.clear()  # all prompts of these tests have one id
    rendered = render_conversation(model, prompt_of(turns, **keys), every, marks)
    texts = [model.tokenizer.decode(rendered.ids[a:b]) for a, b in rendered.spans]
    assert all(text.endswith("<|im_end|>") for text in texts)
    return [text.removesuffix("<|im_end|>") for text in texts]


def call(arguments, name="look", **keys):
    return {"id": ID, "type": "function", "function": {"name": name, **keys}} | (
        {} if arguments is None else {"function": {"name": name, "arguments": arguments, **keys}}
    )


def says(content=None, *calls, **keys):
    message = {"role": "assistant", **keys}
    if content is not None:
        message["content"] = content
    return message | ({"tool_calls": list(calls)} if calls else {})


ROME = {"city": 'Rome & <b>\u4e2d "x"', "n": 4, "deep": [True, None, {"a": 1.5}]}
JSON = json.dumps(ROME, ensure_ascii=False)
WRAPPED = f'<tool_call>\n{{"name": "look", "arguments": {JSON}}}\n</tool_call>'


@pytest.mark.parametrize("arguments", [ROME, JSON])
@pytest.mark.parametrize(
    "template, content, text",
    [
        (HERMES, None, WRAPPED),
        (HERMES, "", WRAPPED),
        (HERMES, "I look", "I look\n" + WRAPPED),
        (QWEN3, None, "<think>\n\n</think>\n\n" + WRAPPED),
        (LLAMA, None, f'{{"name": "look", "parameters": {JSON}}}'),
        (MISTRAL, None, f'[TOOL_CALLS] [{{"name": "look", "arguments": {JSON}, "id": "{ID}"}}]'),
        (DISTILL, None, f"<|call|>look\n```json\n{JSON}\n```"),
        (DISTILL, "I look", f"I look<|call|>look\n```json\n{JSON}\n```"),
        (VERBATIM, None, WRAPPED),
        (EITHER, None, WRAPPED),
        (
            GLM, None,
            '<tool_call>\n{"name": "look", "arguments": <k>city</k><v>Rome & <b>\u4e2d "x"</v>'
            '<k>n</k><v>4</v><k>deep</k><v>[true, null, {"a": 1.5}]</v>}\n</tool_call>',
        ),
    ],
)  # fmt: skip
def test_a_call_is_learnt_whole_and_encoded_once(template, content, text, arguments):
    assert said(template, ASK, says(content, call(arguments))) == [text]


def test_arguments_that_a_template_prints_as_text_keep_their_spelling():
    """Check that only what the template would encode again is read as JSON."""
    tight = '{"city":"Rome","n":1e3}'
    for template in (VERBATIM, EITHER):
        assert f'"arguments": {tight}}}' in said(template, ASK, says("", call(tight)))[0]
    assert (
        '"arguments": {"city": "Rome", "n": 1000.0}}' in said(HERMES, ASK, says("", call(tight)))[0]
    )
    for empty in ({}, "{}", "", " "):
        turns = read_messages([ASK, says("", call(empty))])
        for template in (HERMES, VERBATIM, EITHER):
            assert '"arguments": {}}' in said(template, *turns)[0]
    with pytest.raises(
        UsageError, match=r"leaves out tool_calls\[0\].function.arguments of turn 1"
    ):
        said(HERMES, ASK, says("", call("city=Rome")))
    assert '"arguments": city=Rome}' in said(VERBATIM, ASK, says("", call("city=Rome")))[0]


def test_several_calls_and_turns():
    one, two = (
        f'<tool_call>\n{{"name": "look", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
        for city in ("Rome", "Bern")
    )
    turns = (
        ASK,
        says(None, call({"city": "Rome"}), call('{"city": "Bern"}'), reasoning_content="two"),
        {"role": "tool", "name": "look", "tool_call_id": ID, "content": "sun"},
        says("fine", reasoning_content="ok"),
    )
    first = f"<think>\ntwo\n</think>\n\n{one}\n{two}"
    assert said(QWEN3, *turns) == [first, "<think>\nok\n</think>\n\nfine"]
    assert said(QWEN3, *turns, every=False) == ["<think>\nok\n</think>\n\nfine"]
    with pytest.raises(UsageError, match="single tool-calls"):
        said(LLAMA, *turns)


@pytest.mark.parametrize(
    "template, turn, part",
    [
        (CHATML, says("", call({"city": "Rome"})), r"tool_calls\[0\].function.name of turn 1"),
        (CHATML, says("fine", call({"city": "Rome"})), r"tool_calls\[0\].function.name"),
        (LLAMA, says("4", call({"n": 4})), "content of turn 1 .assistant.: '4'"),
        (MISTRAL, says("I look", call({"n": 4})), "content of turn 1"),
        (CHATML, says("4", reasoning_content="2+2"), "reasoning_content of turn 1"),
        (QWEN3, says("4", reasoning_content="2+2", reasoning="3"), "out reasoning of turn 1"),
        (DISTILL, says("4", thinking="2+2"), "leaves out thinking of turn 1"),
        (R1, says("4", reasoning_content="2+2"), "reasoning_content of turn 1"),
        (CHATML, says("", function_call={"name": "look", "arguments": "{}"}), "function_call.name"),
        (CHATML, says("4", name="ann"), "name of turn 1"),
        (CHATML, says("4", weight=0), "weight of turn 1"),
        (CHATML, says("4", citations=[{"url": "a.b"}]), r"key citations\[0\].url"),
        (CHATML.replace("m.content", "m.content[:20]"), says("4" * 30), "content of turn 1"),
        (CHATML.replace("m.content", "m.content | e"), says("a & b"), "content of turn 1"),
        (R1.replace("[-1] }}", "[-1] | upper }}"), says("<think>2+2</think>abc"), "turn 1.*'abc'"),
        (HERMES.replace("| tojson }}}", "| tojson | e }}}"), says("", call({"a": "<b>"})), "'<b>'"),
        (
            HERMES.replace("c.function.arguments |", "c.function.arguments.city |"),
            says("", call({"city": "Rome", "unit": "C"})),
            "arguments.city",
        ),
        (GLM.replace("<k>{{ k }}</k>", ""), says("", call({"city": "Rome"})), "the key .*city"),
        (
            GLM.replace("v if v is string else v | tojson", "v"),
            says("", call({"deep": {"a": "x"}})),
            "as Python prints it: {'a': 'x'}",
        ),
        (MARKED.replace("{% generation %}{{ m.reasoning_content }}", "{{ m.reasoning_content }}"
                        "{% generation %}"), says("4", reasoning_content="2+2"), "begin where"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_say_is_named(template, turn, part):
    with pytest.raises(UsageError, match=part):
        said(template, ASK, turn)


def test_a_thought_outside_of_the_marks_is_named():
    assert said(MARKED, ASK, says("4", reasoning_content="2+2 ")) == ["2+2 4"]
    after = MARKED.replace("{{ m.reasoning_content }}", "").replace(
        "{% endgeneration %}", "{% endgeneration %} {{ m.reasoning_content }}"
    )
    with pytest.raises(UsageError, match="leaves out reasoning_content of turn 1") as refused:
        said(after, ASK, says("4", reasoning_content="2+2"))
    assert "generation" in refused.value.hint
    cut = MARKED.replace("{{ m.content }}<", "{{ m.content.split('</think>')[-1] }}<")
    with pytest.raises(UsageError, match="leaves out the thought in content of turn 1"):
        said(cut, ASK, says("<think>2+2</think>4"))


def test_a_thought_that_a_template_cuts_is_put_where_it_opens():
    thinks = says("<think>\n2+2\n</think>\n\n4")
    assert said(R1, ASK, thinks) == ["2+2\n</think>\n\n4"], "the prompt ends in <think>"
    assert said(DISTILL, ASK, thinks) == ["<think>\n2+2\n</think>\n\n4"]
    assert said(R1, ASK, says("2+2</think>4")) == ["2+2</think>4"]
    asks = {"role": "user", "content": "sure?"}
    earlier = says("<think>\nhm\n</think>\n\nyes")
    for template, last in ((R1, "2+2\n</think>\n\n4"), (DISTILL, thinks["content"])):
        assert said(template, ASK, earlier, asks, thinks, every=False) == [last]
        with pytest.raises(UsageError, match=r"the thought in content of turn 1.*'hm'") as refused:
            said(template, ASK, earlier, asks, thinks)
        assert "turns=last" in refused.value.hint
    assert said(DISTILL, ASK, says("yes"), asks, thinks) == ["yes", thinks["content"]]
    # a template that writes an empty block in place of the thought
    empty = DISTILL.replace("{{ m.content.split", "<think>\n\n</think>\n\n{{ m.content.split")
    assert said(empty, ASK, thinks) == ["<think>\n2+2\n</think>\n\n4"]
    marks = Thinking(open="[T]", close="[/T]")
    other = DISTILL.replace("</think>", "[/T]")
    assert said(other, ASK, says("[T]2+2[/T]4"), marks=marks) == ["[T]2+2[/T]4"]
    closed = R1.replace("<think>\n{% endif %}", "<think>\n\n</think>\n\n{% endif %}")
    with pytest.raises(UsageError, match="closes the block of thought"):
        said(closed, ASK, thinks)
    with pytest.raises(UsageError, match="otherwise once turn 1 is asked") as refused:
        said(R1, ASK, says("4"))
    assert "a thought in the turn's content" in refused.value.hint


def test_thoughts_of_qwen3():
    inside, apart = says("<think>\n2+2\n</think>\n\n4"), says("4", reasoning_content="2+2")
    both = says("4", reasoning_content="2+2", reasoning="2+2")
    for turn in (inside, apart, says("4", reasoning="2+2"), says("4", thinking="2+2"), both):
        assert said(QWEN3, ASK, turn) == ["<think>\n2+2\n</think>\n\n4"]
    assert said(QWEN3, ASK, says("4")) == ["<think>\n\n</think>\n\n4"]
    with pytest.raises(UsageError, match="turn 1"):
        said(QWEN3, ASK, inside, {"role": "user", "content": "sure?"}, says("yes"))


def test_context_is_said_or_refused():
    """Check what the model is shown: a tool's answer, tools, calls and questions; not only SFT."""
    tool = {"role": "tool", "content": "sun"}
    turns = (ASK, says("", call({"city": "Rome"})), tool, says("fine"))
    deaf = HERMES.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    schema = {"type": "function", "function": {"name": "look", "description": 'a <b> & "c"'}}
    schema["function"]["parameters"] = {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": ["C", "F"]}, "x": {"description": "why"}},
    }
    names = HERMES.replace("{{ t | tojson }}", "{{ t.function.name }}")
    for template, keys, part in (
        (deaf, {}, "content of turn 2 .tool.: 'sun'"),
        (CHATML, {}, r"tool_calls\[0\].function.name of turn 1"),
        (HERMES.replace(TOOLS, ""), {"tools": (schema,)}, r"\[0\].function.name of the tools"),
        (names, {"tools": (schema,)}, r"description of the tools: 'a <b>"),
        (HERMES.replace("t | tojson", "t | tojson | e"), {"tools": (schema,)}, "description"),
    ):
        for every in (True, False):
            with pytest.raises(UsageError, match=part):
                said(template, *turns, every=every, **keys)
        talker(template).rendered.clear()
        with pytest.raises(UsageError, match=part):
            talker(template).render(prompt_of((*turns, ASK), **keys))
    model = talker(HERMES)
    model.rendered.clear()
    shown = model.tokenizer.decode(model.render(prompt_of(turns, tools=(schema,))))
    assert json.dumps(schema) in shown, "with every character as it is"
    with pytest.raises(UsageError, match=r"name of turn 0 .user."):
        said(HERMES, {**ASK, "name": "ann"}, says("fine"))
    with pytest.raises(UsageError, match="leaves the developer turn out"):
        said(R1.replace("messages %}", "messages if m.role != 'developer' %}"),
             {"role": "developer", "content": "be brief"}, ASK, says("4"))  # fmt: skip


def test_calls_that_are_none():
    assert read_messages([ASK, {**says("4"), "tool_calls": []}]) == [ASK, says("4")]
    turns = read_messages(json.dumps([ASK, {**says("4"), "tool_calls": json.dumps([call({})])}]))
    assert turns[1]["tool_calls"] == [call({})]
    assert "no list of calls: 'look" in invalid_reason([ASK, {**says("4"), "tool_calls": "look()"}])
    assert said(LLAMA, *read_messages([ASK, {**says("4"), "tool_calls": []}])) == ["4"]
