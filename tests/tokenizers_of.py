"""Real tokenizers of every family, trained on a few lines by the tokenizers library; a chat of one
without a model; and chat templates of the forms that public models have."""

import json
from types import SimpleNamespace

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from opdctl.models.chat.control_tokens import NO_KEYS
from opdctl.models.chat.rendering import Chat

TEXTS = [
    "sort 3 1 2 is 1 2 3\nuser assistant system tool",
    "What is 1+1? The answer is 2.\n\nYes: </s> <|im_end|> [INST] [/INST]",
    "spell abc as c b a",
    "x y z 42 foo bar be brief",
] * 8
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]
SPECIAL += ["<think>", "</think>", "<|tool|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
FAMILIES = """metaspace-first metaspace-always metaspace-never unigram-first unigram-always
unigram-whole llama2 bytes bytes-space words""".split()  # noqa: SIM905
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
TOKENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{{ m.content }}</s>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' + m.content | trim + ' ' + eos_token }}{% else %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
SPACED = (
    "{% for m in messages %}<|user|> {{ m.content }}{% if m.role == 'assistant' %} <|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|user|>{% endif %}"
)


def tokenizer_of(family, special=SPECIAL, **named):
    """A tokenizer whose post-processor begins by <s> and ends by </s>, as T5's and Llama's do."""
    kind, _, scheme = family.partition("-")
    tokenizer, trainer = KINDS[kind](scheme, special)
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    ends = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names | named
    )


def _metaspace(scheme, special):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.BpeTrainer(
        vocab_size=220, special_tokens=special, show_progress=False
    )


def _unigram(scheme, special):
    tokenizer, prepended = Tokenizer(models.Unigram()), "first" if scheme == "whole" else scheme
    space = {"prepend_scheme": prepended, "split": scheme != "whole"}
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space)
    tokenizer.decoder = decoders.Metaspace(**space)
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    return tokenizer, trainers.UnigramTrainer(vocab_size=140, **options)


def _llama2(scheme, special):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    options = {"vocab_size": 480, "special_tokens": special + BYTES, "show_progress": False}
    return tokenizer, trainers.BpeTrainer(**options)


def _bytes(scheme, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=scheme == "space")
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    return tokenizer, trainers.BpeTrainer(vocab_size=300, **options)


def _words(scheme, special):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)


KINDS = {
    "metaspace": _metaspace,
    "unigram": _unigram,
    "llama2": _llama2,
    "bytes": _bytes,
    "words": _words,
}


def chat_of(tokenizer, template, stops=(), keys=NO_KEYS):
    """The rendering half of a model: no weights; ``stops`` stand in its generation config."""
    chat = Chat()
    chat.tokenizer, chat.name, chat.rows, chat.chat_keys = tokenizer, "it", 10**6, keys
    tokenizer.chat_template = template
    ids = tokenizer.convert_tokens_to_ids([*stops])
    chat.begin_chat(SimpleNamespace(eos_token_id=ids or None))
    return chat
