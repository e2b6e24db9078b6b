"""Conversations to ids: which tokens are supervised, by which a response ends, what is refused."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from conftest import ALPHABET, make_model
from opdctl.errors import UsageError
from opdctl.models.chat.conversation import render_conversation
from opdctl.models.chat.messages import (
    invalid_reason,
    last_answer,
    question,
    question_text,
    with_tag,
)
from opdctl.models.chat.retemplated import retemplate, thought_opening
from opdctl.models.chat.thinking import Thinking
from opdctl.models.model import Model, different_tokens, load, outline, save
from opdctl.rollout.engines.transformers import Transformers
from opdctl.types import Prompt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
# thinking is left out of all but the last turn, which gets an empty block where it has none
QWEN = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "<|im_end|>",
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end_header|>"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end_header|>{% endif %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = (
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "calc"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "4"},
)


def chat(template, eos="<|im_end|>", stops=(), specials=(), bos=None, seed=0):
    """A small model that talks in a template; ``stops`` stand in its generation config."""
    model = make_model(seed, alphabet=ALPHABET + "<>|/_\n{}\"':[],ABCDEFGHIJKLMNOPQRSTUVWXYZ?!.")
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", eos, *stops, *specials]}
    )
    tokenizer.add_special_tokens({"eos_token": eos, "pad_token": eos})
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.chat_template = template
    model.net.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids([*stops] or [eos])
    model.net.generation_config = GenerationConfig(eos_token_id=ids)
    return Model(model.net, tokenizer, "it")


def prompt_of(messages, **keys):
    return Prompt(
        "x", "talk", question_text(messages), last_answer(messages), {}, "", (), messages, **keys
    )


def supervised(model, prompt, every=True):
    """The text of each supervised span, end token included."""
    rendered = render_conversation(model, prompt, every)
    return [model.tokenizer.decode(rendered.ids[a:b]) for a, b in rendered.spans], rendered


def test_a_response_ends_by_any_token_of_the_generation_config(tmp_path):
    model = chat(CHATML, stops=["<|im_end|>", "<|endoftext|>"])
    end, other = model.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.end_of_turn == end and model.ends == (end, other)
    with torch.no_grad():  # both ends are likely
        weight = model.net.get_output_embeddings().weight
        weight[other] = weight[end] = 0.0
    keys = np.arange(1, 65, dtype=np.uint64) * 7919
    prompts = [model.render("1+1")] * 64
    drawn = Transformers(model, 64).generate(prompts, keys.tolist(), temperature=8.0, max_tokens=12)
    last = {s.ids[-1] for s in drawn if not s.truncated}
    assert last == {end, other}, "the one that was sampled is kept"
    for s in drawn:
        assert not set(s.ids[:-1]) & {end, other}
        assert s.truncated == (s.ids[-1] not in model.ends)
        assert "im_end" not in model.decode(s.ids) and "endoftext" not in model.decode(s.ids)
    save(model, tmp_path)
    assert load(str(tmp_path)).ends == outline(str(tmp_path)).ends == model.ends


def test_what_the_template_ends_a_turn_by_is_an_end_too(tmp_path):
    base = chat(CHATML, eos="<|endoftext|>", stops=["<|endoftext|>"], specials=["<|im_end|>"])
    end, eos = base.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert base.eos == eos and base.end_of_turn == end and set(base.ends) == {end, eos}
    assert base.encode("4")[-1] == end, "a base model learns the end of its template"
    save(base, tmp_path)
    written = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert set(written) == {end, eos}, "other programs stop there too"
    glm = chat(GLM, eos="<|endoftext|>", stops=["<|endoftext|>", "<|user|>"], specials=["<|tool|>"])
    assert glm.tokenizer.convert_ids_to_tokens(glm.end_of_turn) == "<|user|>"
    plain = chat(None)
    assert plain.ends == (plain.eos,) and plain.render("1+1") == plain.tokenizer("1+1").input_ids


def test_an_end_that_is_none_is_refused_and_one_out_of_reach_is_not_kept():
    model = chat(CHATML)
    model.net.generation_config = GenerationConfig(eos_token_id=[model.eos, 10**6])
    assert Model(model.net, model.tokenizer, "far").ends == (model.eos,)
    model.net.generation_config.eos_token_id = "<|im_end|>"
    with pytest.raises(UsageError, match="eos_token_id of the generation config"):
        Model(model.net, model.tokenizer, "text")


def test_student_and_teacher_agree_on_the_ends():
    base = chat(CHATML, eos="<|endoftext|>", stops=["<|endoftext|>"], specials=["<|im_end|>"])
    names = base.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    base.net.generation_config = GenerationConfig(eos_token_id=names)
    instruct = Model(base.net, base.tokenizer, "instruct")
    assert different_tokens(base, instruct) is None
    told = Model(base.net, base.tokenizer, "told")
    told.ends = (*told.ends, 5)
    said, hint = different_tokens(base, told)
    assert "told" in said and "generation_config.json" in hint
    assert different_tokens(told, base) is None, "the student may stop where the teacher does not"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_assistant_turns_are_supervised_with_their_end(template):
    model = chat(template)
    said, rendered = supervised(model, prompt_of(TALK))
    assert said == ["2<|im_end|>", "calc<|im_end|>", "4<|im_end|>"]
    whole = model.apply(TALK)
    assert model.tokenizer.decode(rendered.ids) == whole.removesuffix("\n")
    assert rendered.ids[: rendered.spans[0][0]] == model.ids(model.apply(TALK[:2], generate=True))
    last, rendered = supervised(model, prompt_of(TALK), every=False)
    assert last == ["4<|im_end|>"] and model.tokenizer.decode(rendered.ids) == whole.rstrip()


def test_other_templates_end_their_turns_in_their_way():
    llama = chat(LLAMA, eos="<|eot|>", specials=["<|start|>", "<|end_header|>"], bos="<|begin|>")
    said, rendered = supervised(llama, prompt_of(TALK[:5]))
    assert said == ["2<|eot|>", "calc<|eot|>"]
    assert rendered.ids.count(llama.tokenizer.bos_token_id) == 1
    glm = chat(GLM, eos="<|endoftext|>", stops=["<|endoftext|>", "<|user|>"])
    said, rendered = supervised(glm, prompt_of(TALK[:5]))
    assert said == ["2<|user|>", "calc<|user|>"]
    assert glm.tokenizer.decode(rendered.ids) == glm.apply(TALK[:5]) + "<|user|>"
    gemma = chat(GEMMA, eos="<eos>", stops=["<eos>", "<end>"], specials=["<start>"], bos="<bos>")
    assert supervised(gemma, prompt_of(TALK[1:5]))[0] == ["2<end>", "calc<end>"]
    with pytest.raises(UsageError, match="no system role"):
        gemma.render(prompt_of(TALK[:5]))


def test_a_template_that_rewrites_earlier_turns_is_refused_for_all_and_not_for_the_last():
    model = chat(QWEN)
    with pytest.raises(UsageError, match="otherwise once turn 2 is over") as refused:
        supervised(model, prompt_of(TALK))
    assert "turns=last" in refused.value.hint
    said, rendered = supervised(model, prompt_of(TALK), every=False)
    assert said == ["<think>\n\n</think>\n\n4<|im_end|>"]
    assert rendered.ids[: rendered.spans[0][0]] == model.ids(model.apply(TALK[:-1], generate=True))


def test_marks_that_cannot_be_right_are_refused():
    early = MARKED.replace("<|im_start|>{{ m.role }}\n{% if", "{% if").replace(
        "{% generation %}", "{% generation %}<|im_start|>assistant\n"
    )
    with pytest.raises(UsageError, match="does not begin where a response does"):
        supervised(chat(early), prompt_of(TALK[1:3]))
    some = MARKED.replace("'assistant' %}", "'assistant' and loop.last %}")
    with pytest.raises(UsageError, match="marks 1 of 3 turns"):
        supervised(chat(some), prompt_of(TALK))
    without = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    assert supervised(chat(without), prompt_of(TALK))[0][0] == "2<|im_end|>"
    never = MARKED.replace("<|im_end|>\n{% endgeneration %}", "\n{% endgeneration %}")
    with pytest.raises(UsageError, match="ends by no token"):
        supervised(chat(never, specials=["<|x|>"]), prompt_of(TALK))


def test_system_turn_and_thinking_reach_the_template_or_are_refused():
    model = chat(CHATML)
    shown = model.tokenizer.decode(model.render(Prompt("a", "d", "1+1", "", {}, system="be kind")))
    assert shown.startswith("<|im_start|>system\nbe kind<|im_end|>")
    own = model.tokenizer.decode(model.render(prompt_of(TALK[:2], system="be kind")))
    assert "be brief" in own and "be kind" not in own
    off = Prompt("b", "d", "1+1", "", {}, enable_thinking=False)
    assert model.tokenizer.decode(model.render(off)).endswith("<think>\n\n</think>\n\n")
    for prompt, says in (
        (Prompt("c", "d", "1+1", "", {}, enable_thinking=True), "does not read enable_thinking"),
        (Prompt("e", "d", "1+1", "", {}, system="be kind"), "leaves the system turn out"),
    ):
        deaf = chat(
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
        )
        with pytest.raises(UsageError, match=says):
            deaf.render(prompt)
    with pytest.raises(UsageError, match="no chat template for a conversation of system, user"):
        chat(None).render(prompt_of(TALK[:2]))
    twice = chat("{{ bos_token }}" + LLAMA, eos="<|eot|>", bos="<|begin|>")
    with pytest.raises(UsageError, match="twice"):
        twice.render("1+1")


def test_a_demonstration_leaves_out_the_marks_its_prompt_ends_in():
    model, think = chat(CHATML), Thinking(mode="no_think", open="<think>\n", close="\n</think>\n\n")
    off = Prompt("a", "d", "1+1", "2", {}, think.lead(""), enable_thinking=False)
    assert think.lead("") == "<think>\n\n</think>\n\n"
    assert model.after_prompt(off, off.lead, think.open, think.close) == ""
    on = Prompt("b", "d", "1+1", "2", {}, enable_thinking=True)
    assert (
        model.after_prompt(on, "<think>\nx\n</think>\n\n", think.open, think.close)[:7] == "<think>"
    )
    opened = chat(CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}")
    said = opened.after_prompt(on, "<think>\nx\n</think>\n\n", think.open, think.close)
    assert said == "x\n</think>\n\n"
    asks = Thinking(mode="think", open="<think>\n", close="\n</think>\n\n")
    assert asks.split(said + "2") == ("x", "\n\n2") and asks.follows_mode(said + "2")
    assert think.follows_mode("2") and think.follows_mode("<think>\n\n</think>\n\n2")
    assert not think.follows_mode(said + "2") and not asks.follows_mode("<think>\n\n</think>\n\n2")


def test_a_turn_of_an_environment_continues_from_the_end_that_was_sampled():
    model = chat(CHATML, stops=["<|im_end|>", "<|endoftext|>"])
    other = model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    after = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(model.observation("42", "tool")) == after
    assert model.tokenizer.decode(model.observation("42", "tool", other)) == "<|im_end|>" + after
    off = Prompt("a", "d", "1+1", "", {}, enable_thinking=False)
    shown = model.tokenizer.decode(model.observation("42", "tool", prompt=off))
    assert shown == after + "<think>\n\n</think>\n\n"


def test_which_part_of_a_conversation_asks():
    assert question(TALK) == TALK[:4] and last_answer(TALK) == "4"
    assert question(TALK[:6]) == TALK[:6] and last_answer(TALK[:6]) == ""
    assert (
        question_text(TALK[1:3]) == "1+1"
        and question_text(TALK[:2]) == "system: be brief\nuser: 1+1"
    )
    assert with_tag(TALK, " /think")[3]["content"] == "2+2 /think" and TALK[3]["content"] == "2+2"
    assert invalid_reason(TALK) == invalid_reason(list(TALK)) == ""
    for wrong, says in (
        ("hi", "expected a list"),
        ([], "expected a list"),
        ([{"content": "x"}], "no role"),
        ([{"role": "user", "content": 3}], "int, not text"),
        ([{"role": "assistant", "content": "x"}], "nobody asks"),
    ):
        assert says in invalid_reason(wrong)


def test_what_is_remembered_of_prompts_does_not_grow(monkeypatch):
    """A stream brings new ones for ever: the newest are kept, by their length in all."""
    monkeypatch.setattr("opdctl.models.chat.recent_cache.CACHE_LIMIT", 200)
    model = chat(CHATML)
    for i in range(50):
        text = f"question {i}"
        assert model.render(text) is model.render(text)
        model.observation(f"{i}", "user")
        kept = (model.rendered, model.answers, model.readable)
        assert all(c.length == sum(map(len, c.values())) <= 200 for c in kept)
    assert text in model.rendered and text in model.readable and len(model.rendered) > 1
    long = "x" * 300
    assert len(model.render(long)) > 200 and list(model.rendered) == [long]


FREE = Thinking()
OPEN, EMPTY = "<think>\n", "<think>\n\n</think>\n\n"
R1 = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.mark.parametrize(
    "template, off, ends", [(CHATML, None, ""), (CHATML, False, EMPTY), (R1, None, OPEN)]
)
def test_what_a_template_opens(template, off, ends):
    model = chat(template)
    prompt = Prompt("a", "d", "is <think> a word", "", {}, enable_thinking=off)
    assert thought_opening(model, model.render(prompt), FREE) == ends


@pytest.mark.parametrize(
    "before, ours, text, told",
    [
        ("", "", "<think>a</think>4", "<think>a</think>4"),
        (OPEN, OPEN, "a</think>4", "a</think>4"),
        (OPEN, "", "a</think>4", "<think>\na</think>4"),  # lost otherwise
        (OPEN, "", "a cut tho", "<think>\na cut tho"),
        ("", OPEN, "<think>\na</think>4", "a</think>4"),  # twice otherwise
        ("", OPEN, "\n<think>a</think>4", "a</think>4"),
        ("", OPEN, "4", "</think>4"),
        ("", EMPTY, "4", "4"),
        ("", EMPTY, "<think>\n\n</think>\n\n4", "4"),
        (OPEN, EMPTY, "\n</think>\n\n4", "4"),
        (EMPTY, "", "4", "4"),
        (EMPTY, "", "<think>a</think>4", "<think>a</think>4"),
        (EMPTY, OPEN, "4", "</think>4"),
        (EMPTY, OPEN, "<think>a</think>4", "a</think>4"),
        ("</think>", "", "4", "4"),
        ("<think>", OPEN, "\na</think>4", "a</think>4"),
        (None, "", "a</think>4", "<think>a</think>4"),  # an API whose template opened
        (None, "", "<think>a</think>4", "<think>a</think>4"),
        (None, "", " 4", " 4"),
        (None, OPEN, "a</think>4", "a</think>4"),
        (None, OPEN, "4", "</think>4"),
    ],
)
def test_marks_of_thinking_are_told_once(before, ours, text, told):
    assert retemplate(text, before, ours, FREE) == told
    whole = ours + told
    assert whole.count("<think>") <= 1 and whole.count("</think>") <= 1


def test_thinking_that_has_no_place_is_refused():
    for before, text in (("", "<think>a</think>4"), (OPEN, "a</think>4"), (None, "a</think>4")):
        with pytest.raises(UsageError, match="closes the block of thought"):
            retemplate(text, before, EMPTY, FREE)
    with pytest.raises(UsageError, match="cut before it said"):
        retemplate("4", None, OPEN, FREE, cut=True)
    assert retemplate("4", EMPTY, "", Thinking(mode="no_think")) == "<think></think>4"
