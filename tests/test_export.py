"""The output of a stage is the policy that was trained (NeMo-RL #3696: an adapter merged in
bfloat16): widened, kept beside its base, or refused; each export is read back."""

import json

import pytest
import torch
from one_step import opd, prompts, write

from conftest import make_model
from opdctl.errors import RecipeError, StageFailed, UsageError
from opdctl.models import export, merging, tensor_file
from opdctl.models.model import load, save
from opdctl.rollout.engines.vllm import Vllm
from opdctl.rollout.engines.vllm_server import _require_exact
from opdctl.train import checkpoint
from running import carry_out, one_stage

IDS = torch.arange(3, 19)[None]
BF16 = {"runtime": {"dtype": "bfloat16"}}
STEP = 1e-5  # of each factor of an adapter: far below the last bit of a weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models s and t in bfloat16, and prompts."""
    place = tmp_path_factory.mktemp("narrow")
    write(place, {n: make_model(i, dtype="bfloat16") for i, n in enumerate("st")})
    return place


def adapted(folder, tmp_path, output, **keys):
    """A stage's student with an adapter that adds a little everywhere, as after a few steps."""
    pytest.importorskip("peft", reason="the extra peft")
    ctx = opd(folder, tmp_path, lora={"rank": 4, "alpha": 4, "output": output}, **BF16, **keys)
    model = ctx.models.student()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            parameter.copy_(torch.randn_like(parameter) * (STEP if "lora_B" in name else 1.0))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx, model


def exact(folder, model):
    """The log-probs of the policy in float32 throughout, from the factors."""
    base, added = load(str(folder / "s"), dtype="float32"), 0
    weights = base.net.state_dict()
    for name, layer in model.net.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            a_RI, b_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weights[f"{name}.weight"] += b_OR @ a_RI
            added += 1
    assert added == 14
    return weights, logprobs(base)


@torch.no_grad()
def logprobs(model):
    return model.logits(model.backbone(IDS).last_hidden_state[0].float()).log_softmax(-1)


def test_a_merged_adapter_is_written_in_float32(folder, tmp_path, capsys):
    """Each weight is W + B A to float32, where bfloat16 would hold W itself in most."""
    ctx, model = adapted(folder, tmp_path, "merged")
    with torch.no_grad():
        weights, expected = exact(folder, model)
    checkpoint.commit(ctx.folder, model)
    out = ctx.folder / "output"
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    written = tensor_file.read(out / "model.safetensors")
    start = tensor_file.read(folder / "s" / "model.safetensors")
    names = [n for n in written if "proj" in n]
    kept = torch.cat([(written[n].bfloat16() == start[n]).flatten() for n in names])
    assert kept.float().mean() > 0.93  # what was written before
    for name in written:
        assert torch.allclose(written[name], weights[name], rtol=1e-6, atol=1e-8), name
    again = load(str(out), dtype="float32")
    base = logprobs(load(str(folder / "s"), dtype="float32"))
    assert (logprobs(again) - expected).abs().max() < 1e-4 < (base - expected).abs().max()
    assert "log-probs of output/ are the model's to" in capsys.readouterr().out
    with pytest.raises(UsageError, match="bfloat16 would round away what it added") as caught:
        load(str(out), dtype="bfloat16")
    assert "lora.output=adapter" in caught.value.hint
    save(again, tmp_path / "whole")  # trained in full from there it is a model like any other
    assert load(str(tmp_path / "whole"), dtype="bfloat16")


def test_an_adapter_stays_beside_a_bfloat16_base(folder, tmp_path):
    """As a model to read it is the policy; as a start of every weight it would be rounded."""
    ctx, model = adapted(folder, tmp_path, "adapter")
    before = logprobs(model)
    checkpoint.commit(ctx.folder, model)
    store = opd(folder, tmp_path, student=ctx.folder / "output", **BF16).models
    for read in (store.load(str(ctx.folder / "output")), store.frozen(str(ctx.folder / "output"))):
        assert torch.equal(logprobs(read), before) and merging.has_adapter(read.net)
    with pytest.raises(UsageError, match="in 16 bits would round away what it adds") as caught:
        store.student()
    assert "lora.rank=4 lora.alpha=4" in caught.value.hint


def test_a_sum_of_adapters_is_written_in_float32(folder, tmp_path):
    """Task arithmetic of an adapter and a model, by hand; of models alone it stays bfloat16."""
    ctx, model = adapted(folder, tmp_path, "adapter")
    with torch.no_grad():
        weights, _ = exact(folder, model)
    checkpoint.commit(ctx.folder, model)
    s, t = (load(str(folder / n), dtype="float32").net.state_dict() for n in "st")
    paths = {"a": str(ctx.folder / "output"), "t": str(folder / "t")}
    keys = {"kind": "merge", "method": "task_arithmetic", "scale": 0.5, **BF16}
    for i, start in enumerate((str(folder / "s"), paths["a"])):
        place = one_stage(tmp_path / f"m{i}", {}, student=start, models=paths, **keys)
        carry_out(place)
        written = load(str(place.folder / "output"), dtype="float32").net.state_dict()
        own = weights if i else s
        for name, w in written.items():
            expected = own[name].double() + 0.5 * (weights[name].double() - own[name].double())
            expected += 0.5 * (t[name].double() - own[name].double())
            assert torch.allclose(w.double(), expected, rtol=1e-5, atol=1e-7), name
    del paths["a"]
    place = one_stage(tmp_path / "plain", {}, student=str(folder / "s"), models=paths, **keys)
    carry_out(place)
    kinds = {w.dtype for w in tensor_file.read(place.folder / "output/model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_an_embedding_that_an_adapter_parts_from_the_head_is_averaged_apart(folder, tmp_path):
    """The start ties them, a model of the sum does not: the output has both."""
    peft = pytest.importorskip("peft", reason="the extra peft")
    base = load(str(folder / "s"), dtype="float32")
    made = peft.get_peft_model(base.net, peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    made.save_pretrained(tmp_path / "a")
    weights = merging.with_adapters(base)
    models = {"a": str(tmp_path / "a"), "s": str(folder / "s")}
    keys = {"kind": "merge", "student": str(folder / "s"), "models": models}
    ctx = one_stage(tmp_path / "run", {}, **keys)
    carry_out(ctx)
    written = tensor_file.read(ctx.folder / "output/model.safetensors")
    start = load(str(folder / "s"), dtype="float32").net.state_dict()
    embed = "model.embed_tokens.weight"
    assert torch.equal(written["lm_head.weight"], start[embed])
    assert torch.allclose(written[embed], (weights[embed] + start[embed]) / 2, atol=1e-6)
    assert (written[embed] - start[embed]).abs().max() > 0.01


def test_files_that_are_not_the_model_are_refused(tmp_path):
    """A key of the configuration that changed after the model was made; nothing is left there."""
    model = make_model()
    model.net.config.rope_parameters["rope_theta"] = 50.0
    with pytest.raises(StageFailed, match=r"differs from the one that was trained by [\d.]+ nats"):
        checkpoint.commit(tmp_path, model)
    assert not (tmp_path / "output").exists()
    whole = make_model()
    assert export.export(whole, tmp_path / "whole") == 0.0


def test_a_stage_that_would_round_a_merged_adapter_is_refused(folder, tmp_path):
    """Where one recipe has both stages it is said before anything runs."""
    from opdctl.recipe.recipe import resolve

    sft = {"kind": "sft", "student": str(folder / "s"), "lora": {"rank": 2}}
    data = {"sums": prompts(folder)}
    last = {"kind": "evaluate", "student": "stage:sft"}
    tree = {"name": "two", "data": data, "stages": {"sft": sft, "e": last}, **BF16}
    with pytest.raises(RecipeError, match="stage e reads them in bfloat16") as caught:
        resolve(tree, "two")
    assert [p.path for p in caught.value.problems] == ["stages.sft.lora.output"]
    sft["lora"]["output"] = "adapter"
    assert resolve(tree, "two")
    sft["lora"]["output"] = "merged"
    assert resolve(tree | {"runtime": {}}, "two")


def test_vllm_does_not_round_an_adapter(folder, tmp_path):
    """It holds merged weights: in float32 all that an adapter adds, in bfloat16 nothing of it."""
    from opdctl.recipe.recipe import resolve

    stage = {"kind": "sft", "student": str(folder / "s"), "lora": {"rank": 2, "output": "adapter"}}
    tree = {"name": "it", "data": {"sums": prompts(folder)}, "stages": {"sft": stage}}
    for dtype, more, refused in (
        ("bfloat16", {}, True),
        ("bfloat16", {"engine_args": {"dtype": "float32"}}, False),
        ("float32", {"engine_args": {"dtype": "bfloat16"}}, True),
        ("float32", {}, False),
    ):
        recipe = resolve(tree | {"runtime": {"dtype": dtype, "engine": "transformers"}}, "it")
        recipe.runtime.engine_args = more.get("engine_args", {})
        wrong = [p.path for p in Vllm.problems(recipe)]
        assert wrong == (["stages.sft.lora.rank"] if refused else [])
    _, model = adapted(folder, tmp_path, "adapter")
    with pytest.raises(UsageError, match="what an adapter adds is rounded away"):
        _require_exact(model)
    _require_exact(load(str(folder / "s"), dtype="bfloat16"))
    weights = merging.dense_weights(model)
    start = load(str(folder / "s"), dtype="float32").net.state_dict()
    moved = [n for n, w in weights.items() if not torch.equal(w.float(), start[n])]
    assert len(moved) == 14 and all(weights[n].dtype == torch.float32 for n in moved)
