"""LoRA through peft: a student's adapter, teachers that share a base, outputs, resume, merging.

Real adapters on models of the project's own; against dense weights, and against plain peft and
transformers on the same folders.
"""

import json
import shutil

import pytest
import torch
import transformers
from architectures import write
from one_step import First, opd, prompts, said

from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight._weights import same_weights
from opdctl.checks.preflight.memory import stage_memory
from opdctl.config import references
from opdctl.config.registry import member
from opdctl.errors import Interrupted, RecipeError, UsageError
from opdctl.models import tensor_file
from opdctl.models.lora import adapter_parameters, unadapted_matrices, weight_deltas
from opdctl.models.merging import with_adapters
from opdctl.models.model import load, outline, save
from opdctl.recipe.recipe import resolve
from opdctl.remote.hub import adapter_of
from opdctl.run import provenance
from opdctl.run.launch import new_run
from opdctl.run.rundir import RunDir, read_rows
from opdctl.train import checkpoint
from opdctl.train.context import Context
from running import carry_out, inside, one_stage

peft = pytest.importorskip("peft", reason="the extra peft")
KEYS = {"optim": {"lr": 1e-2}, "objectives": {"divergence": {}}, "signals": {}}
ADAPTER = {"output": "adapter"}
IDS = torch.arange(3, 19)[None]


def adapter(base, folder, seed, rank=3):
    """A random adapter on a model folder, written by plain peft; its dense weights by name."""
    net = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(seed)
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return {n: w.clone() for n, w in model.merge_and_unload().state_dict().items()}


@pytest.fixture(scope="module")
def adapters(on_disk):
    """Adapters a and b on the model t; what their dense weights are."""
    return {n: adapter(on_disk / "t", on_disk / n, i) for i, n in enumerate("ab")}


def dense(on_disk, weights):
    """The model t with those weights."""
    net = transformers.AutoModelForCausalLM.from_pretrained(on_disk / "t")
    net.load_state_dict(weights)
    return net.train(False)


def test_teachers_share_a_base(on_disk, adapters, tmp_path):
    """Three teachers, one load; each scores as its dense weights do, in any order."""
    teachers = {n: {"model": str(on_disk / n)} for n in ("a", "b", "t")}
    data = dict.fromkeys(teachers, prompts(on_disk))
    ctx = opd(on_disk, tmp_path, teachers=teachers, data=data, **{"signals": {"reverse_kl": {}}})
    first = First(ctx)
    assert ctx.models.loads == 1
    lengths = [r.length for r in first.rollouts]
    for rollout, scored in zip(
        first.rollouts, first.columns["teacher"].split(lengths), strict=True
    ):
        own = adapters.get(rollout.teacher)
        net = dense(on_disk, own) if own else load(str(on_disk / "t")).net
        with torch.no_grad():
            logits = net(torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])).logits[0]
        rows = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        assert (scored - said(rows, [rollout])).abs().max() < 1e-5
    assert {r.teacher for r in first.rollouts} == {"a", "b", "t"}
    views = [ctx.models.frozen(t["model"]) for t in teachers.values()]
    assert len({id(v.net) for v in views}) == 1
    with torch.no_grad():
        rows = [v.backbone(IDS).last_hidden_state for v in (*views, *views)]
    assert all(torch.equal(rows[i], rows[i + 3]) for i in range(3))
    assert (rows[0] - rows[1]).abs().max() > 1e-2 < (rows[0] - rows[2]).abs().max()
    assert not any(p.requires_grad for p in views[0].net.parameters())


@pytest.mark.parametrize("output", ["merged", "adapter"])
def test_a_students_adapter(on_disk, tmp_path, output):
    """Check that only the adapter moves; the output loads in transformers, peft and here."""
    keys = KEYS | {"lora": {"rank": 4, "output": output}, "steps": 3}
    ctx = opd(on_disk, tmp_path, **keys)
    model = ctx.models.student()
    moved = model.trainable_parameters()
    assert moved and all("lora_" in n for n in moved) and "lm_head" not in str(list(moved))
    assert model.trained == sum(p.numel() for p in moved.values()) < 0.5 * model.parameters
    before = model.own_logits(IDS)
    assert torch.equal(before, load(str(on_disk / "s")).own_logits(IDS))  # B is zero
    rows = carry_out(ctx)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["grad_norm"] > 0
    out = ctx.folder / "output"
    if output == "merged":
        plain = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert not list(out.glob("adapter*"))
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(on_disk / "s")
        plain = peft.PeftModel.from_pretrained(base, out)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(on_disk / "s")
        assert not list(out.glob("model*.safetensors"))
    with torch.no_grad():
        expected = plain.train(False)(IDS).logits
    assert (expected - before).abs().max() > 1e-2
    store = opd(on_disk, tmp_path, student=out, teacher=out).models
    for model in (store.student(), store.frozen(str(out)), store.load(str(out))):
        with torch.no_grad():
            assert torch.allclose(model.own_logits(IDS), expected, atol=1e-5)
    base = load(str(on_disk / "s")).net.state_dict()
    now = store.student().net.state_dict()
    changed = {n for n, w in now.items() if not torch.equal(w, base[n])}
    assert changed and all("proj" in n for n in changed)


class Stopped(Context):
    """A stage that is asked to stop after two steps."""

    def check(self):
        self.stop = len(read_rows(self.folder / "metrics.jsonl")) >= 2
        super().check()


def test_resume_with_an_adapter_gives_the_same_bits(on_disk, tmp_path):
    keys = KEYS | {"lora": {"rank": 4, "output": "adapter"}, "steps": 4}
    whole, cut = (opd(on_disk, tmp_path, context=c, **keys) for c in (Context, Stopped))
    carry_out(whole)
    with pytest.raises(Interrupted):
        carry_out(cut)
    kept = tensor_file.read(next((cut.folder / "checkpoints").glob("*/weights.safetensors")))
    assert kept and all("lora_" in n for n in kept)
    carry_out(Context(cut.run, cut.recipe, "it", attempt=2))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = ((c.folder / "output" / name).read_bytes() for c in (whole, cut))
        assert ours == theirs


def test_an_adapter_is_float32_on_a_bfloat16_base(on_disk, adapters, tmp_path):
    """So small steps are not rounded away; sampler and trainer agree as far as bfloat16 does."""
    keys = KEYS | {"runtime": {"dtype": "bfloat16"}, "optim": {"lr": 1e-6}, "teacher": "b"}
    ctx = opd(on_disk, tmp_path, student="a", lora={"rank": 3, "alpha": 8, **ADAPTER}, **keys)
    types = {n.split(".")[-2]: p.dtype for n, p in ctx.models.student().net.named_parameters()}
    assert types["q_norm"] == torch.bfloat16 and types["default"] == torch.float32
    rows = carry_out(ctx)
    assert all(r["logprob_gap"] < 0.05 and r["loss"] > 0.1 for r in rows)
    start = tensor_file.read(on_disk / "a" / "adapter_model.safetensors")
    trained = tensor_file.read(ctx.folder / "output" / "adapter_model.safetensors")
    steps = torch.cat([(trained[n] - w).abs().flatten() for n, w in start.items()])
    assert (steps > 0).float().mean() > 0.9 and steps.max() < 1e-5


def test_an_adapter_is_trained_further(on_disk, adapters, tmp_path):
    keys = KEYS | {"student": "a", "steps": 1}
    lora = {"rank": 3, "alpha": 8, "output": "adapter"}
    ctx = opd(on_disk, tmp_path, **keys, lora=lora)
    model = ctx.models.student()
    with torch.no_grad():
        expected = dense(on_disk, adapters["a"])(IDS).logits
        assert torch.allclose(model.own_logits(IDS), expected, atol=1e-5)
    assert len(model.trainable_parameters()) == 2 * 2 * 2  # A and B, two targets, two layers
    carry_out(ctx)
    config = json.loads((ctx.folder / "output" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(on_disk / "t") and config["r"] == 3
    with pytest.raises(UsageError, match=r"adapter of rank 3, and lora\.rank is 4"):
        opd(on_disk, tmp_path, **keys, lora=lora | {"rank": 4}).models.student()


@pytest.mark.parametrize("scale", [None, 0.5, 1.5])
def test_adapters_are_merged_as_their_products(on_disk, adapters, tmp_path, scale):
    """Average, task arithmetic and extrapolation equal those of the dense weights, and differ from
    those of the factors."""
    paths = {n: str(on_disk / n) for n in "ab"}
    keys = {"method": "task_arithmetic", "scale": scale} if scale else {}
    stage = {"kind": "merge", "student": str(on_disk / "t"), "models": paths, **keys}
    ctx = one_stage(tmp_path / "run", {}, **stage)
    carry_out(ctx)
    weights = load(str(ctx.folder / "output")).net.state_dict()
    base = load(str(on_disk / "t")).net.state_dict()
    factor = scale or 0.5
    for name, weight in weights.items():
        deltas = [adapters[n][name].double() - base[name].double() for n in "ab"]
        expected = base[name].double() + factor * sum(deltas)
        assert torch.allclose(weight.double(), expected, atol=1e-6), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_outcome_model_by_an_adapter(on_disk, adapters, tmp_path, dtype):
    """Check an adapter on the backbone with a full score: written merged, started from one."""
    a, s = str(on_disk / "a"), str(on_disk / "s")
    keys = {"kind": "orm", "policy": s, "steps": 4, "optim": {"lr": 1e-2 if "3" in dtype else 1e-6}}
    keys |= {"prompts": {"per_step": 4, "samples": 4}, "sampling": {"max_tokens": 2}}
    data = {"sums": prompts(on_disk) | {"verifier": {"regex": {"pattern": "[0-9]"}}}}
    keys_of_stage = {"runtime": {"dtype": dtype}, "lora": {"rank": 4}, **keys}
    ctx = one_stage(tmp_path / "orm", data, student=s, **keys_of_stage)
    moved = ctx.models.student(classifier=True).trainable_parameters()
    score = {"score.weight", "score.bias"}
    assert len(moved) > 10 and {n for n in moved if "lora_" not in n} == score
    rows = carry_out(ctx)
    assert rows[-1]["loss"] < rows[0]["loss"] or dtype == "bfloat16"
    out = ctx.folder / "output"
    net = transformers.AutoModelForTokenClassification.from_pretrained(out, dtype=dtype)
    start = load(s, dtype=dtype, classifier=True).net.state_dict()
    assert net.score.weight.abs().max() > 0, "the steps of the score are not rounded away"
    assert net.state_dict().keys() == start.keys()
    if dtype == "float32":
        moved = {n for n, w in net.state_dict().items() if not torch.equal(w, start[n])}
        assert moved == {n for n in start if "_proj" in n} | score
        for lora in ({}, {"rank": 3, "alpha": 8}):  # an adapter of a language model is a start
            again = one_stage(
                tmp_path / f"a{len(lora)}", data, student=a, **keys_of_stage | {"lora": lora}
            )
            hidden = again.models.student(classifier=True).backbone(IDS).last_hidden_state
            own = dense(on_disk, adapters["a"]).model(IDS).last_hidden_state
            assert torch.allclose(hidden, own, atol=1e-5)
            carry_out(again)
    adapter_only = {"rank": 4, "output": "adapter"}
    with pytest.raises(RecipeError, match="its score is trained whole"):
        one_stage(tmp_path / "no", data, student=s, **keys_of_stage | {"lora": adapter_only})


def test_gradients_of_an_adapter(on_disk, adapters, tmp_path):
    """Check the gradients of the factors alone, from a trained adapter."""
    keys = {"kind": "gradients", "student": str(on_disk / "a"), "batches": 2}
    keys |= {"prompts": {"per_step": 4}, "sampling": {"max_tokens": 4}}
    keys |= {"lora": {"rank": 3, "alpha": 8}, "teachers": {"sums": str(on_disk / "b")}}
    data = {"sums": prompts(on_disk)}
    ctx = one_stage(tmp_path / "run", data, **keys)
    assert all("lora_" in n for n in ctx.models.student().trainable_parameters())
    member("stages", "gradients")().run(ctx)
    facts = json.loads((ctx.folder / "facts.json").read_text())
    assert facts["variance of divergence"] > 0
    keys["lora"] |= {"output": "adapter"}
    with pytest.raises(RecipeError, match="nothing is written here"):
        one_stage(tmp_path / "no", data, **keys)


def test_what_cannot_be_an_adapter(on_disk, adapters, tmp_path):
    lost = tmp_path / "lost"
    lost.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (lost / name).write_bytes((on_disk / "a" / name).read_bytes())
    config = json.loads((lost / "adapter_config.json").read_text())
    path = lost / "adapter_config.json"
    wrong = (("./gone", "is not there"), (str(on_disk / "b"), "stands on a whole model"))
    for base, says in (*wrong, (None, "names no base")):
        kept = config | ({"base_model_name_or_path": base} if base else {})
        path.write_text(json.dumps(kept if base else {}))
        with pytest.raises(RecipeError, match=says):
            opd(on_disk, tmp_path, teacher=lost)
    (lost / "adapter_config.json").write_text(json.dumps(config))
    weights = lost / "adapter_model.safetensors"
    pickled = weights.rename(lost / "adapter_model.bin")
    with pytest.raises(RecipeError, match=r"cannot read .*adapter_model\.safetensors"):
        opd(on_disk, tmp_path, teacher=lost)
    with pytest.raises(UsageError, match="has no adapter_model"):
        opd(on_disk, tmp_path).models.frozen(str(lost))
    pickled.rename(weights)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(on_disk / "t" / name, lost)
    with pytest.raises(RecipeError, match="a model and an adapter"):
        opd(on_disk, tmp_path, teacher=lost)
    with pytest.raises(UsageError, match=r"lora.targets=\['qproj'\]") as caught:
        opd(on_disk, tmp_path, lora={"rank": 2, "targets": ["qproj"]}).models.student()
    assert "q_proj" in caught.value.hint
    with pytest.raises(UsageError, match="has its head in it"):
        opd(on_disk, tmp_path, lora={"rank": 2, "targets": ["lm_head"]}).models.student()
    for keys, says in (({"alpha": 8}, "0 is no adapter"), ({"dropout": 0.1}, "unknown key")):
        with pytest.raises(RecipeError, match=says):
            opd(on_disk, tmp_path, lora=keys)


def test_what_the_checks_make_of_adapters(on_disk, adapters, tmp_path):
    """A factor may differ where the product is the same; a base is counted once."""
    twin, nothing = tmp_path / "twin", tmp_path / "nothing"
    for folder, factor in ((twin, -2.0), (nothing, 0.0)):
        adapter(on_disk / "t", folder, 0)
        weights = tensor_file.read(on_disk / "a" / "adapter_model.safetensors")
        scaled = {n: w * factor if "lora_A" in n else w / (factor or 1) for n, w in weights.items()}
        tensor_file.write(folder / "adapter_model.safetensors", scaled)
    merged = opd(on_disk, tmp_path).models.load(str(on_disk / "a"))
    save(merged, tmp_path / "dense")
    a, b, t = (on_disk / n for n in "abt")
    assert (
        same_weights(a, twin) and same_weights(tmp_path / "dense", a) and same_weights(t, nothing)
    )
    assert not same_weights(a, b) and not same_weights(a, t) and not same_weights(on_disk / "s", a)

    def memory(**keys):
        return stage_memory(CheckedStage(opd(on_disk, tmp_path, **keys)))

    one, both = {n: str(a) for n in "ab"}, {n: str(on_disk / n) for n in "ab"}
    data = dict.fromkeys("ab", prompts(on_disk))
    size = sum(4 * w.numel() for w in weights.values())
    estimates = [memory(teachers=x, data=data).teachers for x in (one, both)]
    assert estimates == [merged.parameters * 4 + size, merged.parameters * 4 + 2 * size]
    ctx = opd(on_disk, tmp_path, lora={"rank": 4})
    outlined, loaded = (
        stage_memory(CheckedStage(ctx)),
        stage_memory(CheckedStage(ctx, ctx.models.student())),
    )
    assert outlined == loaded and loaded.gradients == 4 * ctx.models.student().trained
    before = provenance.model(a)
    copy = tmp_path / "t"
    shutil.copytree(t, copy)
    path = twin / "adapter_config.json"
    path.write_text(path.read_text().replace(str(t), str(copy)))
    for folder, changed in ((copy, "base weights"), (twin, "weights")):
        before = provenance.model(twin)
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes() + b" ")
        now = provenance.model(twin)
        assert [k for k in now if now[k] != before[k]] == [changed]


def test_a_run_that_was_copied_finds_its_own_base(on_disk, tmp_path):
    """Plain peft goes by the place that is written, opdctl by the way within the run."""
    stage = {"kind": "sft", "steps": 1, "prompts": {"per_step": 4}}
    lora = {"rank": 2, "output": "adapter"}
    stages = {"base": stage | {"student": str(on_disk / "s")}}
    stages["more"] = stage | {"student": "stage:base", "lora": lora}
    recipe = resolve({"name": "two", "data": {"x": prompts(on_disk)}, "stages": stages}, "two")
    run = new_run(recipe, "", tmp_path / "run")
    for name in stages:
        carry_out(Context(run, recipe, name))
    made = run.output("more")
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(made)
    expected = plain(IDS).logits
    assert torch.allclose(
        Context(run, recipe, "more").models.load(str(made)).own_logits(IDS), expected, atol=1e-5
    )
    copied = RunDir(shutil.copytree(tmp_path / "run", tmp_path / "copy"))
    assert references.base_of(str(made)) == str(run.output("base"))
    assert references.base_of(str(copied.output("more"))) == str(copied.output("base"))
    shutil.rmtree(tmp_path / "run")
    moved = Context(copied, recipe, "more").models.load(str(copied.output("more")))
    assert torch.allclose(moved.own_logits(IDS), expected, atol=1e-5)
    assert not (copied.output("base") / references.BESIDE).exists()


MIXTURES = {  # what peft leaves out
    "qwen3_moe": [],
    "deepseek_v3": [f"model.layers.*.mlp.{s}{n}_proj" for s in ("", "shared_experts.")
                    for n in ("down", "gate", "up")],
    "gpt_oss": ["model.layers.*.mlp.router"],
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_adapted_or_it_is_said(on_disk, tmp_path, capsys, name):
    """Check experts of a mixture: moved, written, read by plain peft, switched, merged."""
    base = str(tmp_path / name)
    write(base, name)
    keys, outs = {"student": base, "teacher": base}, {}
    for output in ("adapter", "merged"):
        ctx = opd(on_disk, tmp_path, **keys | {"lora": {"rank": 2, "output": output}})
        model = ctx.models.student()
        assert sum("mlp.experts" in n for n in model.trainable_parameters()) == (
            8 if "deep" not in name else 4
        )
        assert unadapted_matrices(model, ctx.config.lora) == sorted(MIXTURES[name])
        assert adapter_parameters(outline(base), ctx.config.lora) == model.trained
        with torch.no_grad():
            for n, p in sorted(model.trainable_parameters().items()):
                torch.manual_seed(len(n))
                p.normal_(0, 0.1)
        ctx.folder.mkdir(parents=True, exist_ok=True)
        dense = with_adapters(model)
        checkpoint.commit(ctx.folder, model)
        if output == "merged":
            weights = model.net.state_dict()
            assert dense.keys() == weights.keys()
            assert all(torch.allclose(dense[n], weights[n], atol=1e-6) for n in dense)
        outs[output] = str(ctx.folder / "output")
    printed = capsys.readouterr().out
    assert ("adapts no" in printed) == bool(MIXTURES[name])
    assert all(n in printed for n in MIXTURES[name])
    start = load(base).own_logits(IDS)
    net = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = peft.PeftModel.from_pretrained(net, outs["adapter"]).train(False)(IDS).logits
    assert (plain - start).abs().max() > 0.1
    ctx = opd(on_disk, tmp_path, **keys)
    double = shutil.copytree(outs["adapter"], tmp_path / "double")
    weights = tensor_file.read(double / "adapter_model.safetensors")
    twice = {n: 2 * w if "lora_B" in n else w for n, w in weights.items()}
    tensor_file.write(double / "adapter_model.safetensors", twice)
    more = ctx.models.load(str(double)).own_logits(IDS)
    assert (more - plain).abs().max() > 0.1
    expected = {outs["adapter"]: plain, base: start, str(double): more}
    for place in (*expected, *expected):
        assert torch.allclose(ctx.models.frozen(place).own_logits(IDS), expected[place], atol=1e-4)
        switched = with_adapters(ctx.models.frozen(place))
        same = all(torch.allclose(switched[n], dense[n], atol=1e-6) for n in dense)
        assert same == (place == outs["adapter"])
    assert ctx.models.loads == 1
    for place in outs.values():
        assert torch.allclose(ctx.models.load(place).own_logits(IDS), plain, atol=1e-4)


def cached(hub, name, folder, commit, ref):
    """A folder as a snapshot of the hub's cache."""
    place = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / (commit * 40))
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / ref).write_text(commit * 40)


def test_models_and_adapters_by_public_names(on_disk, adapters, tmp_path, monkeypatch):
    """Check a cache without a network: revisions differ, and an adapter finds its base there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    adapter_of.cache_clear()
    named = changed(on_disk / "a", tmp_path / "named", base_model_name_or_path="org/base")
    other = {"base_model_name_or_path": "org/base", "revision": "old"}
    cached(tmp_path / "hub", "org/base", on_disk / "t", "a", "main")
    cached(tmp_path / "hub", "org/base", on_disk / "s", "b", "old")
    cached(tmp_path / "hub", "org/adapter", named, "c", "main")
    cached(tmp_path / "hub", "org/adapter", changed(named, tmp_path / "o", **other), "d", "old")
    ctx = opd(on_disk, tmp_path, lora={"rank": 2, **ADAPTER}, student="s")
    t, s = (load(str(on_disk / n)).own_logits(IDS) for n in "ts")
    for name, expected in (("org/base", t), ("org/base@old", s), (f"org/base@{'b' * 40}", s)):
        assert torch.equal(ctx.models.load(name).own_logits(IDS), expected)
        assert ctx.models.path_of(name) == name
    first = ctx.models.load("org/adapter").own_logits(IDS)
    assert torch.allclose(first, dense(on_disk, adapters["a"])(IDS).logits, atol=1e-5)
    assert (ctx.models.load("org/adapter@old").own_logits(IDS) - first).abs().max() > 1e-2
    assert ctx.models.frozen("org/adapter").net is ctx.models.frozen("org/base").net
    keys = {"student": "org/adapter", "teacher": "org/base", "lora": {"rank": 3, "alpha": 8}}
    keys["lora"] |= ADAPTER
    tree = {"kind": "opd", "steps": 1, "sampling": {"max_tokens": 4}, **keys}
    tree["teachers"] = {"sums": tree.pop("teacher")}
    further = one_stage(tmp_path / "further", {"sums": prompts(on_disk)}, **tree)
    carry_out(further)
    written = json.loads((further.folder / "output" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "org/base"
    with pytest.raises(UsageError, match="not in the cache of the hub") as caught:
        ctx.models.load("org/gone@v2")
    assert "hf download org/gone --revision v2" in caught.value.hint


@pytest.mark.slow
def test_a_run_of_adapters(on_disk, adapters, tmp_path):
    """An adapter is made, taught by two on one base, evaluated and merged, by the command."""
    paths = {n: str(on_disk / n) for n in ("a", "b", "s")}
    two = dict.fromkeys(("x", "y"), prompts(on_disk) | {"eval_share": 0.4})
    lora = {"rank": 4, "output": "adapter"}
    short = {"steps": 2, "prompts": {"per_step": 4}, "optim": {"lr": 1e-2}}
    stages = {
        "sft": {"kind": "sft", "student": paths["s"], "lora": lora, **short},
        "opd": {
            "kind": "opd",
            "student": "stage:sft",
            "teachers": {"x": paths["a"], "y": paths["b"]},
            "lora": lora | {"output": "merged"},
            "sampling": {"max_tokens": 6},
            **short,
        },
        "soup": {"kind": "merge", "student": paths["s"], "models": {"a": "stage:sft"}},
        "eval": {"kind": "evaluate", "student": "stage:sft", "sampling": {"max_tokens": 6}},
    }
    recipe = tmp_path / "adapters.yaml"
    recipe.write_text(json.dumps({"name": "adapters", "data": two, "stages": stages}))
    done = inside("run", recipe, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "run")
    assert run.record("opd")["status"] == run.record("eval")["status"] == "done"
    made, read = run.record("sft")["output"], run.record("opd")["inputs"]
    assert made["base weights"] == read["student"]["base weights"] != read["student"]["weights"]
    assert read["teachers.x.model"]["base weights"] == read["teachers.y.model"]["base weights"]
    sft = load(str(on_disk / "s"))
    dense = peft.PeftModel.from_pretrained(sft.net, run.output("sft")).merge_and_unload()
    soup = load(str(run.output("soup"))).net.state_dict()
    assert all(torch.allclose(w, soup[n], atol=1e-6) for n, w in dense.state_dict().items())
    assert not (run.output("opd") / "adapter_config.json").exists()
    assert len(read_rows(run.stage("opd") / "metrics.jsonl")) == 2


def test_a_stage_starts_from_an_adapter_and_trains_all(on_disk, adapters, tmp_path):
    """Merged as a start: every weight moves."""
    source = {"dataset": {}}
    keys = {"kind": "sft", "student": str(on_disk / "a"), "steps": 1, "sources": source}
    ctx = one_stage(tmp_path / "run", {"sums": prompts(on_disk, "long")}, **keys)
    start = dict(ctx.models.student().net.named_parameters())
    carry_out(ctx)
    net = transformers.AutoModelForCausalLM.from_pretrained(ctx.folder / "output")
    assert all(not torch.equal(p, start[n]) for n, p in net.named_parameters() if p.ndim > 1)


def changed(folder, to, **keys):
    shutil.copytree(folder, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return to


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_taken_out_of_its_base_shares_none(on_disk, adapters, tmp_path, start):
    """peft changes the base's weights as it reads one: other teachers would be others. Alone it is
    a model like any other, and its change of the weights is no product to compare."""
    net = transformers.AutoModelForCausalLM.from_pretrained(on_disk / "t")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=start)
    made = peft.get_peft_model(net, config)
    made.save_pretrained(tmp_path / start)
    teachers = {"a": {"model": str(on_disk / "a")}, "b": {"model": str(tmp_path / start)}}
    data = dict.fromkeys(teachers, prompts(on_disk))
    ctx = opd(on_disk, tmp_path, teachers=teachers, data=data, signals={"reverse_kl": {}})
    ctx.models.frozen(str(on_disk / "a"))
    with pytest.raises(UsageError, match=f"was started with '{start}'.*base's weights change"):
        ctx.models.frozen(str(tmp_path / start))
    with pytest.raises(UsageError, match="more than pairs of A and B"):
        weight_deltas(str(tmp_path / start))
    expected = made.train(False)(IDS).logits
    logits = ctx.models.load(str(tmp_path / start)).own_logits(IDS)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_an_adapter_with_biases_shares_no_base(on_disk, adapters, tmp_path):
    other = changed(on_disk / "a", tmp_path / "biased", bias="all")
    ctx = opd(on_disk, tmp_path, teachers={"sums": str(other)})
    with pytest.raises(UsageError, match="biases, which would stay in the base"):
        ctx.models.frozen(str(other))


def test_an_adapter_that_cannot_be_compared_is_another_model(on_disk, adapters, tmp_path):
    other = changed(on_disk / "a", tmp_path / "scaled", use_rslora=True)
    assert not same_weights(on_disk / "a", other) and same_weights(other, other)


def test_a_learnt_prompt_is_no_adapter_here(on_disk, adapters, tmp_path):
    net = transformers.AutoModelForCausalLM.from_pretrained(on_disk / "t")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(net, config).save_pretrained(tmp_path / "prompt")
    ctx = opd(on_disk, tmp_path, teachers={"sums": str(on_disk / "t")})
    with pytest.raises(UsageError, match="a learnt prompt"):
        ctx.models.frozen(str(tmp_path / "prompt"))
