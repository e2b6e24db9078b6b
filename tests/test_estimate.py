"""``opdctl plan --gpu``: sizes, memory and time of stages, against models that are really made."""

import json
import subprocess
import sys

import pytest
from test_architecture import BLOCKED, ROOT

from conftest import make_model
from opdctl.core.models import save
from opdctl.estimate.gpus import GPUS, gpu
from opdctl.estimate.memory import estimate, of_student
from opdctl.estimate.shape import CHARACTERS, Shape, made, of_folder
from opdctl.estimate.work import LENGTH, PROMPT, Sampled, cost, decode_seconds
from opdctl.recipe import load, resolve
from opdctl.registry import member
from opdctl.types import FORWARD, TRAIN

RECIPES = ("qwen3", "glm5", "mimo", "deepseek_v4", "thinking_machines")
HEADS = {"0.6B": (16, True), "1.7B": (16, True), "4B": (32, True), "8B": (32, False)}
HEADS["32B"] = (64, False)


def test_the_sizes_in_the_recipes_are_those_of_the_models():
    """Parameters of each Qwen3 of the recipes, counted by transformers on the meta device."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shapes = {}
    for name in RECIPES:
        for size in ("small", "lab"):
            shapes |= load(name, size=size).shapes
    qwen = {n: s for n, s in shapes.items() if n.startswith("Qwen/Qwen3-")}
    assert len(qwen) >= 4
    for name, shape in qwen.items():
        heads, tied = HEADS[name.removeprefix("Qwen/Qwen3-").removesuffix("-Base")]
        config = Qwen3Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate,
            tie_word_embeddings=tied,
        )
        with torch.device("meta"):
            net = Qwen3ForCausalLM(config)
        counted = sum(p.numel() for p in net.parameters())
        assert shape.parameters == pytest.approx(counted, rel=1e-5), name


@pytest.mark.parametrize("name", RECIPES)
def test_small_sizes_fit_one_gpu_of_80_gib(name):
    recipe = load(name, size="small")
    for stage in recipe.stages:
        found = cost(recipe, stage, gpu("h100"))
        assert not isinstance(found, str), found
        assert found.fits and not found.unknown, stage
        slow = cost(recipe, stage, gpu("a100"))
        assert sum(slow.seconds.values()) >= sum(found.seconds.values())


def test_a_folder_and_a_stage_tell_their_size(tmp_path):
    model = make_model(alphabet="0123456789")
    save(model, tmp_path)
    found = of_folder(tmp_path)
    assert found.parameters == model.parameters and found.vocabulary == model.head.out_features
    assert (found.layers, found.hidden, found.kv_heads, found.head_dim) == (2, 32, 1, 16)
    keys = {"heads": 2, "kv_heads": 1, "hidden": 32, "head_dim": 16, "intermediate": 48}
    shape = member("stages", "pretrain").Config(kind="pretrain").model
    for name, value in keys.items():
        setattr(shape, name, value)
    missing = (CHARACTERS - model.head.out_features) * 32  # the embedding has more rows
    assert made(shape).parameters == model.parameters + missing
    assert of_folder(tmp_path / "nothing") is None


def test_memory_and_seconds_by_hand():
    found = estimate(
        of_student(10, "float32"), [20, 28, 24], dtype="float32", learns=True, steps=True,
        resident=2, chunk_mib=1, cached=3, sampled=100, activated=2, trained=50,
    )  # fmt: skip
    assert (found.parameters, found.gradients, found.moments, found.teachers) == (40, 40, 80, 52)
    assert (found.cache, found.activations, found.chunk) == (1200, 400, 2**20)
    assert found.peak == 40 + 80 + 52 + 40 + 400 + 2**20
    student = of_student(10, "bfloat16")
    frozen = estimate(
        student, [], dtype="bfloat16", learns=False, steps=False, cached=3, sampled=100
    )
    assert frozen.certain == 20 and frozen.peak == 20 + 600
    assert of_student(10, "bfloat16", masters=True) == (20, 40, 120)  # a copy and two moments
    assert of_student(10, "bfloat16", adapter=3) == (20 + 12, 12, 24)
    shape = Shape(parameters=1e9, layers=10, hidden=8, kv_heads=2, head_dim=4)
    h100 = GPUS["h100"]
    few = Sampled(shape, rounds=3, batch=10, longest=100)
    peak = 1e15
    prompts = FORWARD * 1e9 * 30 * PROMPT / peak
    bound = 10 * 5e-4  # launching kernels: the weights would be read in 2.4 ms
    assert decode_seconds(few, 10, 4, h100, peak) == pytest.approx(prompts + 3 * 100 * bound)
    large = Sampled(Shape(parameters=1e11, layers=1), rounds=1, batch=10, longest=100)
    read = 4e11 / (0.5 * 3.35e12)  # the weights, once a token
    prompts = FORWARD * 1e11 * 10 * PROMPT / peak
    assert decode_seconds(large, 5, 4, h100, peak) == pytest.approx(prompts + 200 * read)


def test_tokens_and_operations_are_those_of_the_ledger(tmp_path):
    """An opd stage of two domains and two teachers, one served by the policy."""
    save(make_model(), tmp_path / "s")
    save(make_model(1), tmp_path / "t")
    domain = {"kind": "reasoning_gym", "task": "gcd"}
    stage = {
        "kind": "opd", "student": str(tmp_path / "s"), "steps": 5,
        "prompts": {"per_step": 8, "samples": 2, "domains": {"a": 3, "b": 1}},
        "sampling": {"max_tokens": 40},
        "teachers": {"a": str(tmp_path / "t"), "b": "policy"},
    }  # fmt: skip
    recipe = resolve({"data": {"a": domain, "b": domain}, "stages": {"it": stage}}, "x")
    found, size = cost(recipe, "it", gpu("h200")), of_folder(tmp_path / "s").parameters
    tokens = 5 * 8 * 2 * (PROMPT + LENGTH * 40)
    assert found.flops == pytest.approx(tokens * size * (FORWARD + FORWARD + TRAIN))
    assert found.memory.teachers == 2 * 4 * size, "the policy is a copy of its own"
    leaps = {"size": 10, "candidates": 3}
    stage["controllers"] = {"extrapolate": leaps, "length": {"least": 1, "most": 60}}
    recipe = resolve({"data": {"a": domain, "b": domain}, "stages": {"it": stage}}, "x")
    tokens = 5 * 8 * 2 * (PROMPT + LENGTH * 60)  # as if the limit were the largest from the start
    tried = 3 * 4 * 10 * (PROMPT + LENGTH * 60)  # at steps 1, 2 and 4, the weights and three more
    more = cost(recipe, "it", gpu("h200"))
    assert more.flops == pytest.approx(size * (tokens * (2 * FORWARD + TRAIN) + tried * FORWARD))
    unknown = resolve(
        {"data": {"a": domain}, "stages": {"it": {"kind": "sft", "student": "a/b"}}}, "x"
    )
    assert "shapes: {a/b:" in cost(unknown, "it", gpu("h100"))


def test_the_command_says_what_it_assumed_and_needs_no_torch():
    def run(*arguments):
        code = BLOCKED + f"sys.argv = {['opdctl', *arguments]!r}"
        code += "; from opdctl.cli import main; main()"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run("plan", "glm5", "--size", "small")
    assert "for one h100 of 80 GiB" in done.stdout and "nothing measured" in done.stdout
    content = json.loads(run("plan", "glm5", "--size", "lab", "--gpu", "H200", "--json").stdout)
    assert content["gpu"] == "h200" and "AdamW" in content["assumed"]
    first = content["stages"][0]
    assert {"name", "kind", "action", "reasons", "upstream", "estimate"} <= first.keys()
    assert first["estimate"]["memory"]["peak"] > 744e9 * 16 and not first["estimate"]["fits"]
    assert "no layers" in first["estimate"]["unknown"]
    assert "estimate" not in run("plan", "glm5", "--json").stdout, "a tiny recipe runs on the CPU"
    wrong = run("plan", "glm5", "--gpu", "h10")
    assert wrong.returncode == 2 and "did you mean 'h100'" in wrong.stderr
