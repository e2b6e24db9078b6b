"""Every kind of adapter, merged and as a teacher beside others on its base, against peft's own
forward in float64 (peft #2018: an adapter on a tied embedding is merged into the head too)."""

import pytest
import torch
import transformers
from architectures import write

from opdctl.errors import UsageError
from opdctl.models.lora import merged
from opdctl.models.merging import has_adapter, require_tied, with_adapters
from opdctl.models.model import load, save
from opdctl.models.shared_base import SharedBase

peft = pytest.importorskip("peft", reason="the extra peft")
IDS = torch.arange(3, 15)[None]
TWO = ["q_proj", "down_proj"]
KINDS = {
    "embed": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "both tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "whole embed": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "whole norm": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "ranks": {"target_modules": TWO, "rank_pattern": {"q_proj": 5}},
    "alphas": {"target_modules": TWO, "alpha_pattern": {"q_proj": 5}},
    "rslora": {"use_rslora": True},
    "dora": {"target_modules": [*TWO, "embed_tokens"], "use_dora": True},
    "layers": {"layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models with the head tied to the embedding and not, by that."""
    folder = tmp_path_factory.mktemp("bases")
    for tied in (True, False):
        write(folder / str(tied), "llama", tie_word_embeddings=tied)
    write(folder / "gpt2", "gpt2")
    return folder


@pytest.fixture(autouse=True)
def in_float64(float64):
    transformers.utils.logging.set_verbosity_error()
    with torch.no_grad():
        yield


def make(base, folder, **keys):
    """A random adapter on a model; the log-probs of peft's own forward of what was written."""
    net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    keys = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | keys
    made = peft.get_peft_model(net, peft.LoraConfig(**keys))
    torch.manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return by_peft(peft.PeftModel.from_pretrained(net, str(folder)))


def by_peft(net):
    return net.train(False)(IDS).logits[0]


def apart(model, logits):
    """How far the model's log-probs are from those of the logits, by our head."""
    ours = model.logits(model.backbone(IDS).last_hidden_state[0])[:, : model.valid_V]
    return float((ours.log_softmax(-1) - logits[:, : model.valid_V].log_softmax(-1)).abs().max())


@pytest.mark.filterwarnings("ignore")  # peft's, of ties
@pytest.mark.parametrize(
    ("kind", "tied"), [(k, True) for k in KINDS] + [(k, False) for k in list(KINDS)[:8]]
)
def test_an_adapter_is_what_peft_computes(kind, tied, bases, tmp_path):
    base = str(bases / str(tied))
    expected = make(base, tmp_path / "a", **KINDS[kind])
    shared = SharedBase(load(base, dtype="float64"))
    before = shared.base.own_logits(IDS)[0]
    assert apart(shared.base, expected) > 1e-3
    view = shared.view(str(tmp_path / "a"))
    weights = with_adapters(view)
    for _ in range(2):  # switched on and off
        assert apart(view, expected) < 1e-10 and apart(shared.base, before) < 1e-10
    whole = merged(load(base, dtype="float64"), str(tmp_path / "a"))
    assert apart(whole, expected) < 1e-10 and not has_adapter(whole.net)
    state = whole.net.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.allclose(w, state[n], atol=1e-12) for n, w in weights.items())
    save(whole, tmp_path / "out")
    assert apart(load(str(tmp_path / "out"), dtype="float64"), expected) < 1e-10
    if tied and kind in ("embed", "head", "both", "whole head"):
        with pytest.raises(UsageError, match=r"parts lm_head\.weight from model\.embed_tokens"):
            require_tied(view, weights)  # as vLLM would
    else:
        require_tied(view, with_adapters(shared.base))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("of_head", ["both", "whole both"])
def test_adapters_of_several_kinds_share_a_base(of_head, bases, tmp_path):
    """A head and an embedding that one of them has are none of the others'."""
    base, expected = str(bases / "True"), {}
    for kind in ("rslora", of_head, "whole norm"):
        expected[kind] = make(base, tmp_path / kind, **KINDS[kind])
    shared = SharedBase(load(base, dtype="float64"))
    expected[""] = shared.base.own_logits(IDS)[0]
    views = {kind: shared.view(str(tmp_path / kind) if kind else "") for kind in expected}
    for kind in (*expected, *reversed(expected)):
        assert apart(views[kind], expected[kind]) < 1e-10, kind
        assert not any(p.requires_grad for p in shared.base.net.parameters())


def test_biases_of_layers_and_an_embedding_of_gpt2(bases, tmp_path):
    """Biases are in a merged model; a teacher of them would leave them in the base."""
    base, keys = str(bases / "gpt2"), {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    expected = make(base, tmp_path / "a", bias="lora_only", **keys)
    assert apart(merged(load(base, dtype="float64"), str(tmp_path / "a")), expected) < 1e-10
    with pytest.raises(UsageError, match="biases, which would stay in the base"):
        SharedBase(load(base, dtype="float64")).view(str(tmp_path / "a"))


@pytest.mark.filterwarnings("ignore")
def test_what_peft_cannot_merge_is_refused_and_is_a_teacher(bases, tmp_path):
    base = str(bases / "False")
    expected = make(base, tmp_path / "a", lora_bias=True)
    assert (
        apart(SharedBase(load(base, dtype="float64")).view(str(tmp_path / "a")), expected) < 1e-10
    )
    with pytest.raises(UsageError, match="its adapter cannot be merged: Impossible to merge"):
        merged(load(base, dtype="float64"), str(tmp_path / "a"))
