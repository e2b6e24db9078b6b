"""A model from nothing: a character tokenizer, a chat template and a random Qwen3."""

from __future__ import annotations

from typing import Any

from opdctl import draws
from opdctl.models.model import Model, configure_forward
from opdctl.models.weights_check import load_error

BEGIN, ANSWER, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}" + ANSWER + "{{ m.content }}" + END + "{% else %}"
    "" + BEGIN + "{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ANSWER + "{% endif %}"
)


def new_tokenizer(texts: list[str]) -> Any:
    """Train a tokenizer with one token per character of the texts, by the tokenizers library.

    Tasks of spelling and digits need characters, so text is split into them before training and
    no merge can form; the vocabulary is the alphabet and three special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(special_tokens=[END, BEGIN, ANSWER], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(ctx) -> Model:
    """Make a tokenizer of all the recipe's data and a random Qwen3 of the stage's shape.

    Raises:
        UsageError: ``runtime.attn`` names an attention that is not installed.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    texts = [
        "".join((p.text, p.lead, p.answer, *p.calls))
        for domain in ctx.recipe.data
        for split in ("train", "eval")
        for p in ctx.prompts.of(domain, split)
    ]
    environments = filter(None, map(ctx.prompts.environment, ctx.recipe.data))
    texts += [environment.alphabet for environment in environments]
    tokenizer = new_tokenizer(["".join(sorted(set("".join(texts))))])
    shape = ctx.config.model
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.context,
        initializer_range=shape.init_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    runtime = ctx.runtime
    if runtime.attn != "auto":
        config._attn_implementation = runtime.attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.key(ctx.seed, "init") % 2**63)
        try:
            net = Qwen3ForCausalLM(config)
        except (ImportError, ValueError) as error:
            raise load_error(f"stage {ctx.name}", error) from error
    net = net.to(dtype=getattr(torch, runtime.dtype), device=ctx.device)
    keys = ctx.models.chat_keys
    model = Model(net.train(False), tokenizer, f"stage {ctx.name}", chat_keys=keys)
    configure_forward(model, runtime.packing, runtime.gradient_checkpointing)
    return model
