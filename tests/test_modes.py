"""Modes of thinking and turns with an environment: what is asked, written, read and supervised."""

import random
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from conftest import ALPHABET, make_model, make_model64
from opdctl.config.schema import build
from opdctl.errors import UsageError
from opdctl.loss.objectives.nll import Nll
from opdctl.loss.signals.outcome import Outcome
from opdctl.models.chat.thinking import Thinking, Trace
from opdctl.models.model import Model
from opdctl.recipe.recipe import lookup
from opdctl.rollout.data.reasoning_gym import ReasoningGym
from opdctl.rollout.engines.transformers import Transformers
from opdctl.rollout.environments.calculator import Calculator
from opdctl.rollout.sampling import sample_group
from opdctl.scoring.asks import Pass
from opdctl.scoring.score import score
from opdctl.train import update
from opdctl.train.wal import Wal
from opdctl.types import Prompt, Rollout, ScoreRequest

FOLDS = {
    "count_bits": {
        "prompt": "{binary}=",
        "config": {"min_n": 1, "max_n": 4095},
        "trace": {"fold": "count", "over": "binary", "target": "1"},
    },
    "spell_backward": {
        "prompt": "{word}=",
        "lowercase": True,
        "trace": {"fold": "reverse", "over": "word"},
    },
    "letter_counting": {
        "prompt": "{target_letter}:{span}=",
        "config": {"min_words": 1, "max_words": 1},
        "lowercase": True,
        "trace": {"fold": "count", "over": "span", "target": "target_letter"},
    },
    "number_sorting": {
        "prompt": "{direction:.1}{original_numbers}=",
        "answer": "list",
        "separator": "",
        "config": {
            "max_numbers": 5,
            "min_value": 0,
            "max_value": 9,
            "min_decimals": 0,
            "max_decimals": 0,
        },
        "trace": {"fold": "sort", "over": "original_numbers"},
    },
}


OPEN = {"mode": "think", "open": "(", "close": ")"}


def gym(domain, **keys):
    problems = []
    config = build(ReasoningGym.Config, {"kind": "reasoning_gym", **keys}, "d", problems, lookup)
    assert not problems, problems
    return ReasoningGym(config, domain, 5)


@pytest.mark.parametrize("task", FOLDS)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_trace_ends_in_the_answer(task, every):
    keys = {**FOLDS[task], "trace": {**FOLDS[task]["trace"], "every": every}}
    thinking = {"mode": "think", "tag": "+", "open": "(", "close": ")"}
    data = gym("d", task=task, items=80, thinking=thinking, **keys)
    prompts = data.prompts("train")
    assert len(prompts) > 20
    for prompt in prompts:
        thought, answer = data.config.thinking.split(prompt.lead + prompt.answer)
        assert answer == prompt.answer and thought.endswith(answer) and prompt.text.endswith("=+")
        assert data.config.thinking.follows_mode(prompt.lead + answer)
        assert data.score(prompt, prompt.lead + answer) == 1.0
        assert data.score(prompt, prompt.lead + answer + "x") == 0.0
    longest = max(len(p.lead) for p in prompts)
    assert longest > 2 + len(prompts[0].answer) if every == 1 else longest >= 3


def test_every_makes_a_thought_sparser():
    lengths = []
    for every in (1, 2, 3):
        keys = FOLDS["count_bits"]
        trace = {**keys["trace"], "every": every}
        data = gym("d", task="count_bits", items=50, thinking=OPEN, **{**keys, "trace": trace})
        lengths.append([len(p.lead) for p in data.prompts("train")])
    assert all(a >= b >= c for a, b, c in zip(*lengths, strict=True))
    assert sum(lengths[0]) > sum(lengths[1]) > sum(lengths[2])
    keys = {**FOLDS["count_bits"], "thinking": OPEN}
    count = gym("d", task="count_bits", items=50, **keys).prompts("train")[0]
    bits = count.text[:-1]
    running = "".join(str(bits[: i + 1].count("1")) for i in range(len(bits)))
    assert count.lead == f"({running})"


def test_a_sort_of_many_digits_keeps_its_numbers():
    trace = Trace(fold="sort", over="n", separator=" ")
    numbers = ["3.51", "-20.7", "12345678", "5.0"]
    assert trace.write({"n": numbers}) == (
        "3.51 -20.7 3.51 -20.7 3.51 12345678 -20.7 3.51 5 12345678"
    )


@pytest.mark.parametrize(
    ("keys", "path", "says"),
    [
        ("data.d.trace.fold=sort", "data.d.trace.over", "a fold is over a field"),
        ("data.d.trace={fold: count, over: x}", "data.d.trace.target", "what is counted"),
        ("data.d.trace={fold: sort, over: x}", "data.d.trace.fold", "part of the answer"),
        ("data.d.thinking.close=''", "data.d.thinking.close", "two different marks"),
        ("data.d.thinking.close=<think>", "data.d.thinking.close", "two different marks"),
        ("data.d.environment={calculator: {open: ''}}", "calculator.close", "enclose a call"),
        ("data.d.call=ask x", "data.d.call", "no environment would answer"),
    ],
)
def test_what_a_domain_cannot_be(keys, path, says):
    from opdctl.errors import RecipeError
    from opdctl.recipe.recipe import resolve

    tree = {
        "data": {"d": {"kind": "reasoning_gym", "task": "gcd"}},
        "stages": {"base": {"kind": "pretrain"}},
    }
    with pytest.raises(RecipeError) as caught:
        resolve(tree, "x", overrides=(keys,))
    problems = [p for p in caught.value.problems if p.path.endswith(path)]
    assert problems and says in problems[0].message, caught.value.problems


def test_modes_are_read():
    think = Thinking(mode="think")
    plain = Thinking(mode="no_think")
    assert think.lead("a b") == "<think>a b</think>" and plain.lead("a b") == "<think></think>"
    for text, thought, answer in (
        ("<think>a</think>7", "a", "7"),
        ("a</think>7", "a", "7"),  # the template opened the block
        ("<think></think>7", "", "7"),
        ("<think>\n\n</think>7", "", "7"),
        ("\n<think>\n\n</think>\n\n7", "", "\n\n7"),
        ("<think>a</think>b</think>7", "a</think>b", "7"),
        ("7", "", "7"),
    ):
        assert think.split(text) == (thought, answer)
        assert think.follows_mode(text) == bool(thought)
        assert plain.follows_mode(text) == (not thought)
    for cut in ("<think>7", "<think></think><think>7", "<think>a</think>7<think>"):
        assert not think.follows_mode(cut) and not plain.follows_mode(cut)  # opened and not closed
    free = Thinking()
    assert free.split("<think>a</think>7") == ("", "<think>a</think>7") and free.follows_mode("x")
    assert free.lead("so ") == "so "


def test_a_question_is_on_one_side_in_all_of_its_modes():
    keys = FOLDS["count_bits"]
    sides: dict = {}
    for mode, tag in (("think", "+"), ("no_think", "-")):
        data = gym(f"math_{mode}", task="count_bits", thinking={"mode": mode, "tag": tag}, **keys)
        for split in ("train", "eval"):
            for prompt in data.prompts(split):
                assert prompt.text.endswith(tag)
                sides.setdefault(prompt.text[:-1], set()).add(split)
    assert len(sides) > 1000 and all(len(splits) == 1 for splits in sides.values())


def test_calculator_is_exact_arithmetic_and_nothing_else():
    calculator = Calculator(Calculator.Config())
    rng = random.Random(0)

    def expression(depth):
        if not depth or rng.random() < 0.3:
            return str(rng.randint(0, 99))
        a, b = expression(depth - 1), expression(depth - 1)
        op = rng.choice("+-*/")
        return f"({a} {op} {b})" if rng.random() < 0.5 else f"{a} {op} {b}"

    seen = 0
    for _ in range(300):
        text = expression(3)
        fractions = "".join(f"Fraction({t})" if t.isdigit() else t for t in _tokens(text))
        try:
            exact = eval(fractions, {"Fraction": Fraction})
        except ZeroDivisionError:
            assert calculator.reply(f"[{text}]") == "error"
            continue
        reply = calculator.reply(f"so [{text}]")
        assert reply == (str(exact) if exact.denominator == 1 else f"{float(exact):.12g}")
        assert len(reply) < 20
        seen += 1
    assert seen > 200
    assert calculator.reply("[12+30]") == "42" and calculator.reply("[1.5*2]") == "3"
    assert calculator.reply("[7//2]") == "3" and calculator.reply("[-7 % 4]") == "1"
    assert calculator.reply("[99999999*99999999*9]") == "8.99999982e+16"
    assert calculator.reply("[1e300*1e300]") == "error"
    for call in ("[__import__('os')]", "[2**9]", "[a]", "[]", "[1+]", "[True]", "[f(1)]", "[1;2]"):
        assert calculator.reply(call) == "error", call
    for final in ("42", "[1+1] is 2", "1+1]", ""):
        assert calculator.reply(final) is None
    strange = Calculator(Calculator.Config(open="<calc>", close="</calc>"))
    assert strange.reply("I ask <calc>2+2</calc>") == "4"


def _tokens(text):
    import re

    return re.findall(r"\d+|\D", text)


class Bag:
    """Just enough of a context to sample with."""

    def __init__(self, environment, samples, max_tokens):
        from types import SimpleNamespace as Names

        self.seed, self.runtime = 3, Names(rollout_batch=64)
        self.config = Names(
            prompts=Names(samples=samples), sampling=Names(temperature=1.0, max_tokens=max_tokens)
        )
        self.sampling = self.config.sampling
        self.prompts = Names(environment=lambda domain: environment)
        self.check = lambda: None
        self.models = Names(engine=lambda model, blend: Transformers(model, 64, wal=self.wal))
        self.aside = tempfile.TemporaryDirectory()
        self.wal = Wal(Path(self.aside.name))


def two_turns(model, count=6000):
    """Rollouts of a random model, some of which happened to make a call: ``2`` .. ``3``."""
    calculator = Calculator(Calculator.Config(open="r", close="1", turns=2))
    prompts = [Prompt(str(i), "d", str(i), "", {}) for i in range(3)]
    return sample_group(Bag(calculator, count // 3, 10), model, prompts, 0, "student"), calculator


def test_a_call_is_answered_and_its_answer_is_context(model):
    rollouts, calculator = two_turns(model)
    several = [r for r in rollouts if r.observed]
    assert len(several) > 3, "no sample made a call; take another seed"
    for rollout in several:
        assert len(rollout.before) == 2 * len(rollout.observed) <= 4
        for (start, stop), said, reply in zip(
            rollout.observed, rollout.before[::2], rollout.before[1::2], strict=True
        ):
            assert rollout.response_ids[start - 1] == model.eos  # a turn ends, then the answer
            assert calculator.reply(said) == reply
            shown = model.tokenizer.decode(rollout.response_ids[start:stop])
            assert shown == f"<|user|>{reply}<|assistant|>"
        assert rollout.length == len(rollout.behaviour_logprobs) < len(rollout.response_ids)
        places = rollout.request.targets
        offset = len(rollout.prompt_ids)
        inside = {p for a, b in rollout.observed for p in range(offset + a, offset + b)}
        assert not inside & set(places) and len(places) == len(rollout.request) == rollout.length
        last = rollout.observed[-1][1]
        assert model.decode(rollout.response_ids[last:]) == rollout.text
    again, _ = two_turns(model)
    assert [r.response_ids for r in again] == [r.response_ids for r in rollouts]
    ours = score(model, [r.request for r in rollouts]).logprobs_N
    sampled = torch.tensor([v for r in rollouts for v in r.behaviour_logprobs])
    assert (ours - sampled).abs().max() < 1e-4  # the trainer sees what the sampler saw


def test_observed_tokens_are_never_supervised():
    model = make_model64()
    spans = [
        ScoreRequest((5, 6, 7, 8, 9, 10, 11), 2, ((4, 6),)),
        ScoreRequest((5, 9, 8), 1),
        ScoreRequest((3, 4, 5, 6, 7), 1, ((2, 3), (4, 5))),
    ]
    torch.set_default_dtype(torch.float64)
    try:
        model.net.zero_grad(set_to_none=True)
        term = update.LossTerm(Nll(Nll.Config()))
        update.accumulate(model, update.Batch(spans, {}, [term]), Pass(chunk_mib=1))
        ours = torch.cat([p.grad.flatten() for p in model.net.parameters()])
        model.net.zero_grad(set_to_none=True)
        total = 0.0
        for span, places in zip(spans, ([2, 3, 6], [1, 2], [1, 3]), strict=True):
            logprobs = model.net(torch.tensor([span.ids])).logits[0].log_softmax(-1)
            nll = sum(-logprobs[p - 1, span.ids[p]] for p in places)
            total = total + nll / len(places) / len(spans)
        total.backward()
        expected = torch.cat([p.grad.flatten() for p in model.net.parameters()])
        assert (ours - expected).abs().max() < 1e-12
    finally:
        torch.set_default_dtype(torch.float32)


QWEN3 = """{%- for m in messages %}
    {%- if m.role == "user" %}{{ "<|im_start|>user\\n" + m.content + "<|im_end|>\\n" }}
    {%- elif m.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.last %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}
        {{- m.content.split("</think>")[-1] + "<|im_end|>\\n" }}
    {%- elif m.role == "tool" %}
        {{- "<|im_start|>user\\n<tool_response>\\n" + m.content }}
        {{- "\\n</tool_response><|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""  # as Qwen3's, cut


def test_an_answer_in_the_words_of_a_chat_template(model):
    assert model.tokenizer.decode(model.observation("42", "tool")) == "<|user|>42<|assistant|>"
    assert model.observation("42", "tool") == model.observation("42", "user")
    tokenizer = make_model(alphabet=ALPHABET + "<>|/_\n").tokenizer
    tokenizer.chat_template = QWEN3
    model.net.resize_token_embeddings(64)  # of a tokenizer of more characters
    for end in ("<|im_end|>", "<|endoftext|>"):
        tokenizer.add_special_tokens({"eos_token": end})
        chat = Model(model.net, tokenizer, "chat")
        shown = tokenizer.decode(chat.observation("42", "tool", chat.eos))
        after = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        after += "<|im_start|>assistant\n"
        # a model that ends by another token than its template keeps the template's own end
        assert shown == (after if end == "<|im_end|>" else "<|im_end|>" + after)


def test_a_template_without_room_for_an_answer_is_refused(model):
    for template, says in (
        ("{{ messages[0].content }}", "does not show a turn"),
        ("{{ raise_exception('roles must alternate') }}", "no place for a turn of role tool"),
        ("{% for m in messages %}{{ m.content if loop.first else '' }}{% endfor %}", "not show"),
    ):
        model.tokenizer.chat_template = template
        model.answers.clear()
        with pytest.raises(UsageError, match=says):
            model.observation("42", "tool")


def test_a_length_penalty_costs_what_it_says():
    from types import SimpleNamespace as Names

    context = Names(config=Names(sampling=Names(max_tokens=10)))

    def credit(rewards, lengths, **keys):
        rollouts = [
            Rollout(Prompt("x", "d", "q", "", {}), [1], [5] * n, group=0, reward=r)
            for r, n in zip(rewards, lengths, strict=True)
        ]
        step = Names(rollouts=rollouts, spread=lambda values: values)
        return Outcome(Outcome.Config(**keys), context).credit(step)

    plain = credit([1, 0, 1, 0], [4, 6, 8, 2])
    assert plain == pytest.approx([1, -1, 1, -1])
    with_it = credit([1, 0, 1, 0], [4, 6, 8, 2], length_penalty=0.5)
    net = [1 - 0.2, -0.3, 1 - 0.4, -0.1]
    assert with_it == pytest.approx([(v - sum(net) / 4) / 0.5 for v in net])
    for k in (0.1, 0.001):  # all right: what is left is the penalty, in its own size
        advantages = credit([1, 1, 1, 1], [4, 6, 8, 2], length_penalty=k)
        assert advantages == pytest.approx([k * (5 - n) / 10 for n in (4, 6, 8, 2)])
    assert credit([1, 1], [3, 9]) == [0, 0]
