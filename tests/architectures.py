"""Tiny random models of many architectures: two layers, width 32, a byte-level tokenizer of the
tokenizers library, a chat template of several turns; in Hugging Face format."""

import torch
import transformers

TEXTS = ["sort 3 1 2=1 2 3", "gcd 12 18=6", "spell abc=cba"] * 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CAPPED = {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
V3 = {
    **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    **{"num_key_value_heads": 2, "v_head_dim": 16, "head_dim": 8, "first_k_dense_replace": 1},
}
# many heads of the indexer: with few, equal scores make its choice depend on the batch
SPARSE = {"index_topk": 4, "index_n_heads": 16, "index_head_dim": 16}
LINEAR = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_conv_kernel_dim": 3},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
STATE = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16},
    **{"state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
}
SHAPES = {
    "qwen3": ("Qwen3", SIZE),
    "llama": ("Llama", SIZE),
    "mistral": ("Mistral", SIZE | {"sliding_window": 6}),
    "gemma2": ("Gemma2", SIZE | WINDOW | CAPPED | {"attn_logit_softcapping": 20.0}),
    "gemma3": ("Gemma3Text", SIZE | WINDOW | CAPPED),
    "glm4": ("Glm4", SIZE | {"partial_rotary_factor": 0.5}),
    "deepseek_v3": ("DeepseekV3", SIZE | MLA | MOE | V3),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        SIZE | MLA | MOE | V3 | SPARSE | {"mlp_layer_types": ["dense", "sparse"]},
    ),
    "qwen3_next": (
        "Qwen3Next",
        SIZE | MOE | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("Qwen3Moe", SIZE | MOE | {"num_experts": 4, "norm_topk_prob": True}),
    "gpt_oss": ("GptOss", SIZE | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("Granite", SIZE | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": ("Cohere", SIZE | {"logit_scale": 0.25}),
    "gpt2": ("GPT2", GPT2),
    "mamba2": ("Mamba2", STATE),
}
FALCON = {k: v for k, v in SIZE.items() if k != "head_dim"}
WIDE = {"ffn_dim": 48, "word_embed_proj_dim": 32}
DROPPING = {  # layers that drop by their own flag
    "opt": ("OPT", SIZE | WIDE | {"dropout": 0.5}),
    "falcon": ("Falcon", FALCON | {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
}
UNSUPPORTED = {"rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2})}


def tokenizer_of():
    """Bytes and a few merges, with a token for each role and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|tool|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write(folder, name, seed=0, **config):
    """A random model of that architecture and its tokenizer, in ``folder``; what was written.

    Args:
        config: keys of its configuration that differ.
    """
    prefix, shape = (SHAPES | DROPPING | UNSUPPORTED)[name]
    tokenizer = tokenizer_of()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids |= {"bos_token_id": None, "vocab_size": len(tokenizer) + 5}  # a few padded rows
    config = getattr(transformers, f"{prefix}Config")(**shape | ids | config)
    heads = {"Gemma3Text": "Gemma3", "GPT2": "GPT2LMHead"}
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{heads.get(prefix, prefix)}ForCausalLM"
    torch.manual_seed(seed)
    net = getattr(transformers, head)(config)
    with torch.no_grad():  # a random model is nearly uniform: sharpen it
        for parameter in net.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8.0)
    net.train(False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return net
