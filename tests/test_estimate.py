"""``opdctl plan --gpu``: sizes, memory and time of stages, against models that are really made."""

import json
import subprocess
import sys

import pytest
from one_step import opd, prompts
from test_architecture import BLOCKED, ROOT

from conftest import make_model
from opdctl.checks.preflight._checked_stage import CheckedStage
from opdctl.checks.preflight.memory import per_token, stage_memory
from opdctl.config.registry import member
from opdctl.config.shapes import Shape
from opdctl.estimate.cost import cost, update_flops
from opdctl.estimate.gpus import GPUS, gpu
from opdctl.estimate.memory import SHARE, engine_bytes, estimate, student_bytes
from opdctl.estimate.rollout import LENGTH, PROMPT, Responses, decode_seconds, served_seconds
from opdctl.estimate.shape import CHARACTERS, cached_numbers, folder_shape, pretrain_shape
from opdctl.estimate.work import DEMONSTRATION
from opdctl.models import tensor_file
from opdctl.models.model import save
from opdctl.models.packing import micro_batches
from opdctl.recipe.recipe import load, resolve
from opdctl.rollout.engines.transformers import cache_name
from opdctl.types import FORWARD, TRAIN, ScoreRequest

RECIPES = ("qwen3", "glm5", "mimo", "deepseek_v4", "thinking_machines", "sparse_to_dense")
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


def test_the_recipe_of_the_gpu_benchmark_fits_one_of_80_gib():
    recipe = load(str(ROOT / "benchmarks" / "gpu.yaml"))
    assert pretrain_shape(recipe.stages["base"].model).parameters == pytest.approx(75e6, rel=0.03)
    for stage in recipe.stages:
        found = cost(recipe, stage, gpu("h100"))
        assert not isinstance(found, str) and found.fits and not found.unknown, stage


def test_a_folder_and_a_stage_tell_their_size(tmp_path):
    model = make_model(alphabet="0123456789")
    save(model, tmp_path)
    found = folder_shape(tmp_path)
    assert found.parameters == model.parameters and found.vocabulary == model.head.out_features
    assert (found.layers, found.hidden, found.kv_heads, found.head_dim) == (2, 32, 1, 16)
    keys = {"heads": 2, "kv_heads": 1, "hidden": 32, "head_dim": 16, "intermediate": 48}
    shape = member("stages", "pretrain").Config(kind="pretrain").model
    for name, value in keys.items():
        setattr(shape, name, value)
    missing = (CHARACTERS - model.head.out_features) * 32  # the embedding has more rows
    assert pretrain_shape(shape).parameters == model.parameters + missing
    assert folder_shape(tmp_path / "nothing") is None


def numbers_in(cache):
    """Of all tensors that a cache of transformers holds."""
    import torch

    waiting, seen, found = [cache], set(), 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if torch.is_tensor(thing):
            found += thing.numel()
        elif isinstance(thing, list | tuple):
            waiting += thing
        elif hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
    return found


@pytest.mark.parametrize(
    "name, kept",  # by hand, of one layer
    [
        ("qwen3", 2 * 1 * 16),
        ("gpt2", 2 * 2 * 16),
        ("deepseek_v3", 16 + 8),
        ("glm_moe_dsa", 16 + 8 + 16),
    ],
)
def test_the_cache_is_as_large_as_it_gets(tmp_path, name, kept):
    """Latent attention included: against what transformers keeps of six more tokens."""
    import torch
    from architectures import write
    from transformers import DynamicCache

    net, numbers = write(tmp_path, name), []
    with torch.no_grad():
        for n in (6, 12):
            cache = DynamicCache(config=net.config)
            net(torch.arange(6, 6 + n)[None], use_cache=True, **{cache_name(net): cache})
            numbers.append(numbers_in(cache))
    few, many = numbers
    assert many - few == 6 * 2 * kept
    assert per_token(net.config) == 2 * kept
    shape = folder_shape(tmp_path)
    assert shape.kept == kept and (name == "gpt2" or shape.cached == 2 * kept)
    assert Shape(parameters=1, layers=61, kept=576).cached == 61 * 576
    uneven = {"num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128}  # MiMo-V2-Flash
    assert cached_numbers(uneven) == 4 * (192 + 128)


def test_memory_and_seconds_by_hand():
    found = estimate(
        student_bytes(10, "float32"), [20, 28, 24], dtype="float32", learns=True, steps=True,
        resident=2, chunk_mib=1, cached=3, sampled=100, activated=2, trained=50,
    )  # fmt: skip
    assert (found.parameters, found.gradients, found.moments, found.teachers) == (40, 40, 80, 52)
    assert (found.cache, found.activations, found.chunk) == (1200, 400, 2**20)
    assert found.peak == 40 + 80 + 52 + 40 + 400 + 2**20
    student = student_bytes(10, "bfloat16")
    frozen = estimate(
        student, [], dtype="bfloat16", learns=False, steps=False, cached=3, sampled=100
    )
    assert frozen.certain == 20 and frozen.peak == 20 + 600
    assert student == (20, 40, 40)  # micro-batches are summed in float32
    assert student_bytes(10, "bfloat16", masters=True) == (20, 40, 120)  # a copy and two moments
    assert student_bytes(10, "bfloat16", adapter=3) == (20 + 12, 12, 24)
    shape = Shape(parameters=1e9, layers=10, hidden=8, kv_heads=2, head_dim=4)
    h100 = GPUS["h100"]
    few = Responses(shape, rounds=3, batch=10, longest=100)
    peak = 1e15
    prompts = FORWARD * 1e9 * 30 * PROMPT / peak
    bound = 10 * 5e-4  # launching kernels: the weights would be read in 2.4 ms
    assert decode_seconds(few, 10, 4, h100, peak) == pytest.approx(prompts + 3 * 100 * bound)
    large = Responses(Shape(parameters=1e11, layers=1), rounds=1, batch=10, longest=100)
    read = 4e11 / (0.5 * 3.35e12)  # the weights, once a token
    prompts = FORWARD * 1e11 * 10 * PROMPT / peak
    assert decode_seconds(large, 5, 4, h100, peak) == pytest.approx(prompts + 200 * read)


def test_seconds_of_vllm_by_hand():
    """Responses at once are bounded by its memory, and a batch is gone through without waves."""
    shape = Shape(parameters=1e9, layers=10, hidden=8, kv_heads=2, head_dim=400)
    sampled = Responses(shape, rounds=3, batch=1000, longest=800)
    h100, each = GPUS["h100"], 2
    held = each * 2 * 10 * 2 * 400 * (PROMPT + 200)  # keys and values, at the middle of a response
    memory = 2e9 + 64 * held  # room for 64 responses
    step = (each * 1e9 + 64 * held) / (0.5 * h100.bandwidth)
    prompts = FORWARD * 1e9 * 3000 * PROMPT / 1e15
    expected = prompts + 3 * (1000 * 400 / 64) * step
    found = served_seconds(sampled, 256, each, h100, 1e15, memory)
    assert found == pytest.approx(expected)
    few = Responses(shape, rounds=3, batch=4, longest=8000)  # none takes another's place
    prompts = FORWARD * 1e9 * 12 * PROMPT / 1e15
    held = each * 2 * 10 * 2 * 400 * (PROMPT + 2000)
    step = max((each * 1e9 + 4 * held) / (0.5 * h100.bandwidth), 10 * 1e-4)
    found = served_seconds(few, 256, each, h100, 1e15, 1e12)
    assert found == pytest.approx(prompts + 3 * 8000 * step)


def test_vllm_holds_its_share_of_the_gpu():
    recipe = load("qwen3", size="small")
    assert recipe.runtime.engine == "vllm"
    found = cost(recipe, "s1_rl", GPUS["h100"]).memory
    assert found.cache == int(SHARE * GPUS["h100"].memory)
    recipe.runtime.engine_args["gpu_memory_utilization"] = 0.5
    assert cost(recipe, "s1_rl", GPUS["h100"]).memory.cache == GPUS["h100"].memory / 2
    recipe.runtime.engine = "transformers"
    slow = cost(recipe, "s1_rl", GPUS["h100"])
    assert slow.memory.cache == 256 * (PROMPT + 4096) * 2 * 28 * 8 * 128 * 2


def test_a_server_of_vllm_holds_nothing_on_the_gpu_of_the_stage(on_disk, tmp_path):
    """It has .9 of a GPU like it, and at most 128 requests; so says the check before a start."""
    shapes = {"o/s": {"parameters": 1e9, "layers": 10, "kv_heads": 2, "head_dim": 4}}
    stage = {"kind": "rl", "student": "o/s", "steps": 3, "sampling": {"max_tokens": 800}}
    stage["prompts"] = {"per_step": 64, "samples": 8}

    def found(**runtime):
        data = {"a": {"kind": "reasoning_gym", "task": "gcd"}}
        tree = {"data": data, "stages": {"it": stage}, "shapes": shapes, "runtime": runtime}
        return cost(resolve(tree, "x"), "it", gpu("h100"))

    at = {"engine": "vllm_server", "engine_at": "http://host:8000", "dtype": "bfloat16"}
    server = found(**at)
    alive, held = 128, 2 * 10 * 2 * 2 * 4 * (PROMPT + 200)
    step = max((2e9 + alive * held) / (0.5 * 3.35e12), 10 * 1e-4)
    prompts_take = FORWARD * 1e9 * 1536 * PROMPT / (0.4 * 989e12)
    assert server.seconds["rollout"] == pytest.approx(prompts_take + 3 * (512 * 400 / alive) * step)
    assert server.memory.cache == 0
    assert found(engine="vllm", dtype="bfloat16").memory.cache == int(0.3 * 80 * 2**30)
    assert found().memory.cache == 512 * (PROMPT + 800) * 10 * 2 * 2 * 4 * 4
    engines = [{}, {"engine": "vllm"}, at | {"dtype": "float32"}]
    caches = [stage_memory(CheckedStage(opd(on_disk, tmp_path, runtime=e))).cache for e in engines]
    assert caches[0] > 0 and caches[1:] == [0, 0], "on a CPU"
    runtime = opd(on_disk, tmp_path, runtime=engines[1]).runtime
    assert engine_bytes(runtime, 100.0) == 30.0
    runtime.engine_args["gpu_memory_utilization"] = 0.5
    assert engine_bytes(runtime, 100.0) == 50.0


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
    found, size = cost(recipe, "it", gpu("h200")), folder_shape(tmp_path / "s").parameters
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


def test_other_writers_and_a_reference_are_counted(tmp_path):
    """Of a mixture each writes its share; of a blend both models read every token."""
    save(make_model(), tmp_path / "s")
    save(make_model(1, layers=4), tmp_path / "t")
    s, t = (folder_shape(tmp_path / m) for m in "st")
    domain = {"kind": "reasoning_gym", "task": "gcd"}
    stage = {
        "kind": "opd", "student": str(tmp_path / "s"), "steps": 2, "signals": {},
        "prompts": {"per_step": 8, "samples": 1}, "sampling": {"max_tokens": 40},
        "teachers": {"a": str(tmp_path / "t")}, "objectives": {"divergence": {}},
    }  # fmt: skip

    def flops(**keys):
        tree = {"data": {"a": domain}, "stages": {"it": stage | keys}}
        return cost(resolve(tree, "x"), "it", gpu("h200")).flops

    sampled, shown = PROMPT + LENGTH * 40, PROMPT + DEMONSTRATION
    # teacher .5 then .25: 6 responses of 16; the data 4; the student the other 6
    mixture = {"student": 0.25, "teacher": 0.5, "dataset": 0.25, "decay": 0.5}
    tokens = 12 * sampled + 4 * shown
    wrote = FORWARD * 6 * sampled * (s.per_token + t.per_token)
    expected = wrote + tokens * (FORWARD * t.per_token + TRAIN * s.per_token)
    assert flops(sources={"mixture": mixture}) == pytest.approx(expected)
    tokens = 16 * sampled
    read = FORWARD * tokens * (s.per_token + t.per_token)
    expected = read + tokens * (FORWARD * t.per_token + TRAIN * s.per_token)
    assert flops(sources={"teacher_mixed": {}}) == pytest.approx(expected)
    beyond = {"signals": {"extrapolation": {}}, "objectives": {"policy_gradient": {}}}
    plain = flops(**beyond | {"signals": {"reverse_kl": {}}})
    save(make_model(2, layers=3), tmp_path / "u")
    for ref, model in (("policy", s), (str(tmp_path / "u"), folder_shape(tmp_path / "u"))):
        more = flops(reference=ref, **beyond) - plain
        assert more == pytest.approx(FORWARD * tokens * model.per_token)


def test_a_judge_is_held_beside_the_stage(on_disk, tmp_path):
    """By the plan and by the check before a start, the student's own weights as its judge too."""
    sizes = {n: folder_shape(on_disk / n).parameters for n in "stu"}
    for judge in ("", "u", "s"):
        verifier = {"judge": {"model": str(on_disk / judge)}} if judge else {"exact": {}}
        ctx = opd(on_disk, tmp_path, data={"sums": prompts(on_disk) | {"verifier": verifier}})
        teachers = 4 * (sizes["t"] + (sizes[judge] if judge else 0))
        assert cost(ctx.recipe, "it", gpu("h100")).memory.teachers == teachers
        assert stage_memory(CheckedStage(ctx)).teachers == teachers
    far = {"judge": {"model": "org/judge"}}
    ctx = opd(on_disk, tmp_path, data={"sums": prompts(on_disk) | {"verifier": far}})
    assert "shapes: {org/judge:" in cost(ctx.recipe, "it", gpu("h100"))


def test_tokens_of_each_kind_by_hand():
    """Of stages on models of known sizes, without a file."""
    shapes = {n: {"parameters": p, "layers": 1, "hidden": 4, "intermediate": 8}
              for n, p in (("o/s", 10.0), ("o/t", 30.0))}  # fmt: skip
    two = {"per_step": 4, "domains": {"a": 3, "b": 1}}
    sampling, short = {"max_tokens": 40}, PROMPT + LENGTH * 40
    whole = PROMPT + DEMONSTRATION

    def flops(runtime=None, **stage):
        domain = {"kind": "reasoning_gym", "task": "gcd"}
        stage = {"student": "o/s", "prompts": two, **stage}
        tree = {"data": {"a": domain, "b": domain}, "stages": {"it": stage}, "shapes": shapes}
        return cost(resolve({**tree, "runtime": runtime or {}}, "x"), "it", gpu("h100"))

    learns = TRAIN * 10
    orm = flops(kind="orm", policy="o/t", steps=2, sampling=sampling, prompts={**two, "samples": 2})
    assert orm.flops == pytest.approx(2 * 8 * short * (FORWARD * 30 + learns))
    teacher = {"model": "o/t", "domains": {"a": True}, "sampling": sampling}
    mixed = flops(kind="sft", steps=2, sources={"teacher": teacher, "dataset": {}})
    told = 2 * 3 * short * (FORWARD * 30 + learns)
    assert mixed.flops == pytest.approx(told + 2 * 4 * 0.25 * whole * learns)
    teacher = {"model": "o/t", "experts": {"b": "o/s"}, "sampling": sampling}
    experts = flops(kind="sft", steps=2, sources={"teacher": teacher})
    told = 2 * short * (FORWARD * (3 * 30 + 1 * 10) + 4 * learns)
    assert experts.flops == pytest.approx(told), "an expert writes what is of its domain"
    opd = {"kind": "opd", "steps": 2, "sampling": sampling, "teachers": {"a": "o/t", "b": "o/s"}}
    once, twice = flops(**opd), flops(**opd, epochs=2)
    tokens = 2 * 4 * short
    scores = FORWARD * (0.75 * 30 + 0.25 * 10)
    assert once.flops == pytest.approx(tokens * (FORWARD * 10 + scores + learns))
    assert twice.flops - once.flops == pytest.approx(tokens * (FORWARD * 10 + learns))
    keys = {k: v for k, v in opd.items() if k not in ("kind", "steps")}
    measured = flops(kind="gradients", batches=2, **keys)
    assert measured.flops == pytest.approx(once.flops + tokens * learns), "two objectives"
    assert once.memory.teachers == 4 * (30 + 10), "the student as a teacher is a copy of its own"
    adapter = 2 * (8 * 4 + 3 * 12)
    lora = flops(**opd, lora={"rank": 2})
    update = 4 * (10 + adapter) + 2 * adapter  # a token, forward and back, and its own gradient
    assert lora.flops == pytest.approx(tokens * (FORWARD * (10 + adapter) + scores + update))
    small = lora.memory
    assert small.gradients == 4 * 2 * (8 * 4 + 3 * 12) and small.parameters == 40 + small.gradients
    again = flops({"gradient_checkpointing": True, "micro_batch": 3}, **opd).memory
    assert again.activations == 3 * (PROMPT + 40) * 4 * (4 + 40 + 32)


def test_models_behind_a_server_are_left_out_and_named():
    """Their tokens are trained on all the same; what the stage does itself is counted as ever."""
    shapes = {n: {"parameters": p, "layers": 1, "hidden": 4, "intermediate": 8}
              for n, p in (("o/s", 10.0), ("o/t", 30.0))}  # fmt: skip
    away, sampling, short = "http://host:8000", {"max_tokens": 840}, PROMPT + LENGTH * 840

    def found(**stage):
        domain = {"kind": "reasoning_gym", "task": "gcd"}
        stage = {"student": "o/s", "steps": 2, **stage}
        stage["prompts"] = {"per_step": 4, "domains": {"a": 3, "b": 1}}
        tree = {"data": {"a": domain, "b": domain}, "stages": {"it": stage}, "shapes": shapes}
        return cost(resolve(tree, "x"), "it", gpu("h100"))

    both = {"sampling": sampling, "teachers": {"a": away, "b": "o/t"}}
    opd = found(kind="opd", signals={"reverse_kl": {}}, **both)
    tokens = 2 * 4 * short
    assert opd.flops == pytest.approx(tokens * (FORWARD * (10 + 0.25 * 30) + TRAIN * 10))
    assert (
        opd.memory.teachers == 4 * 30 and opd.unknown == f"{away} is behind a server: not counted"
    )
    teacher = {"model": away, "experts": {"b": "o/t"}, "sampling": sampling}
    sft = found(kind="sft", sources={"teacher": teacher})
    assert sft.flops == pytest.approx(2 * short * (FORWARD * 1 * 30 + 4 * TRAIN * 10))
    assert sft.unknown.count(away) == 1 and sft.memory.teachers == 4 * 30
    alone = found(kind="sft", sources={"teacher": teacher | {"experts": {}}})
    assert alone.flops == pytest.approx(tokens * TRAIN * 10) and alone.seconds["rollout"] == 0
    assert alone.memory.activations == 4 * (PROMPT + 840) * 4 * (40 + 32)


def write_adapter(folder, base, rank):
    """Of peft's form, on two matrices of 32 x 32 (the model is 32 wide)."""
    import torch

    sides = {"lora_A": (rank, 32), "lora_B": (32, rank)}
    names = [(f"{n}.{k}", size) for n in ("q_proj", "o_proj") for k, size in sides.items()]
    tensor_file.write(
        folder / "adapter_model.safetensors", {n: torch.zeros(size) for n, size in names}
    )
    content = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def test_an_adapter_is_its_file_on_its_base(on_disk, tmp_path):
    """Held once with others of its base, as the check before a start does; trained further where
    the keys ask for it; the hint for one without a size works."""
    base = folder_shape(on_disk / "t").parameters
    for name, on, rank in (
        ("a", on_disk / "t", 3),
        ("b", on_disk / "t", 5),
        ("far", "org/base", 3),
    ):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, on, rank)
    a, b = 2 * 3 * 64, 2 * 5 * 64
    data = dict.fromkeys(("a", "b", "t"), prompts(on_disk))
    places = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "t": str(on_disk / "t")}

    def found(student, teachers, shapes=None, **keys):
        stage = {"kind": "opd", "student": str(student), "steps": 2, "teachers": teachers, **keys}
        stage |= {"prompts": {"per_step": 6}, "sampling": {"max_tokens": 6}}
        tree = {"data": data, "stages": {"it": stage}, "shapes": shapes or {}}
        return cost(resolve(tree, "x"), "it", gpu("h100"))

    whole = found(on_disk / "s", places)
    assert whole.memory.teachers == 4 * (base + a + b)
    ctx = opd(on_disk, tmp_path, data=data, teachers=places)
    assert stage_memory(CheckedStage(ctx)).teachers == whole.memory.teachers
    own = folder_shape(on_disk / "s").parameters
    tokens = 2 * 6 * (PROMPT + LENGTH * 6)
    scored = FORWARD * (base + (a + b) / 3)
    assert whole.flops == pytest.approx(tokens * (FORWARD * own + scored + TRAIN * own))
    further = found(
        tmp_path / "a", {"t": str(on_disk / "u"), "a": "policy", "b": "policy"}, lora={"rank": 3}
    )
    assert further.memory.parameters == 4 * (base + a) and further.memory.gradients == 4 * a
    assert further.memory.moments == 8 * a
    dense = found(tmp_path / "a", places)
    assert dense.memory.parameters == dense.memory.gradients == 4 * base, "merged, trained whole"
    far = {**places, "a": str(tmp_path / "far")}
    assert "no size of org/base; shapes: {org/base: {" in found(on_disk / "s", far)
    shapes = {"org/base": {"parameters": 1000.0, "layers": 1}}
    assert found(on_disk / "s", far, shapes).memory.teachers == 4 * (1000 + a + base + b)
    shapes = {str(on_disk / "t"): {"parameters": 2000.0, "layers": 1}}
    assert found(on_disk / "s", places, shapes).memory.teachers == 4 * (2000 + a + b)
    blind = found("org/base", places, {"org/base": {"parameters": 1e3}}, lora={"rank": 3})
    assert "the adapter" in blind.unknown and blind.memory.gradients == 0


def test_an_update_of_an_adapter_costs_what_the_ledger_says(on_disk, tmp_path):
    """The model that a stage trains, its own count of operations a token."""
    pytest.importorskip("peft", reason="the extra peft")
    whole = opd(on_disk, tmp_path).models.student()
    assert update_flops(whole.parameters, None) == whole.flops
    model = opd(on_disk, tmp_path, lora={"rank": 3}).models.student()
    assert 0 < model.trained < model.parameters
    assert update_flops(model.parameters, model.trained) == model.flops


def test_a_pass_that_nothing_bounds_may_have_every_sequence_of_a_step():
    """As models/packing.micro_batches does it: equal lengths never close a group."""
    shapes = {"o/s": {"parameters": 10.0, "layers": 1, "hidden": 4, "intermediate": 8}}
    stage = {"student": "o/s", "prompts": {"per_step": 40, "samples": 2}}
    rl = {**stage, "kind": "rl", "sampling": {"max_tokens": 44}}

    def activations(stage, **runtime):
        data = {"a": {"kind": "reasoning_gym", "task": "gcd"}}
        tree = {"data": data, "stages": {"it": stage}, "shapes": shapes, "runtime": runtime}
        return cost(resolve(tree, "x"), "it", gpu("h100")).memory.activations

    token = 4 * (10 * 4 + 4 * 8)  # float32
    spans = [ScoreRequest((1,) * 9, 5)] * 80
    assert [len(group) for group, _ in micro_batches(spans, 0)] == [80]
    assert activations(rl | {"minibatches": 1}) == 80 * (PROMPT + 44) * token
    assert activations(rl | {"minibatches": 3}) == 27 * (PROMPT + 44) * token
    assert activations(rl | {"minibatches": 3}, micro_batch=5) == 5 * (PROMPT + 44) * token
    assert activations(stage | {"kind": "sft"}) == 80 * (PROMPT + DEMONSTRATION) * token


def test_activations_computed_again_are_counted_as_such():
    shape = Shape(parameters=1, layers=10, hidden=8, intermediate=16)
    assert shape.activated() == 10 * (80 + 64) and shape.activated(True) == 10 * 8 + 80 + 64


def test_the_command_says_what_it_assumed_and_needs_no_torch():
    def run(*arguments):
        code = BLOCKED + f"sys.argv = {['opdctl', *arguments]!r}"
        code += "; from opdctl.cli.app import main; main()"
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
