"""What a stage will do, in tokens, and how long a GPU takes for it: from its keys, without data.

The ledger of a finished stage (``types.Compute``) counts the same tokens with the same factors;
here the lengths that only a run can tell are assumed (``ASSUMED``), and so are the utilisations.
Left out: loading, checkpoints, verifiers, the preflight, and time between stages.

    opdctl plan qwen3 --size small --gpu h100
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from opdctl import references
from opdctl.estimate.gpus import Gpu
from opdctl.estimate.memory import BYTES, Estimate, estimate, of_student
from opdctl.estimate.rollout import (
    DECODE,
    GRAPH,
    LAUNCH,
    LENGTH,
    PROMPT,
    Sampled,
    decode_seconds,
    served_seconds,
)
from opdctl.estimate.shape import Shape, made, shape_of
from opdctl.settings import longest_turn
from opdctl.types import FORWARD, TRAIN

DEMONSTRATION = 512  # tokens of an answer that the data gives
COMPUTE = 0.4  # of the peak of multiplications: prompts, scoring, training
SHARE = 0.3  # of the GPU that vllm takes while it samples, where its arguments do not say
ASSUMED = (
    "parameters, gradients and two moments of AdamW in runtime.dtype; in float32 for copies of "
    "bfloat16 parameters (runtime.masters) and adapters on every linear layer; keys and "
    "values of a wave of "
    "responses of the full sampling.max_tokens (of the most that a controller may make of it); "
    "activations of a micro-batch, all of them unless "
    "runtime.gradient_checkpointing; "
    f"prompts of {PROMPT} tokens, demonstrations of {DEMONSTRATION}, responses of {LENGTH:.0%} of "
    f"sampling.max_tokens; {FORWARD:g} operations a parameter and token forward, {TRAIN:g} in "
    f"training, at {COMPUTE:.0%} of the GPU's dense peak in runtime.dtype; decoding at "
    f"{DECODE:.0%} of its bandwidth, and no faster than {1e3 * LAUNCH:g} ms a layer and token "
    f"(transformers) or {1e3 * GRAPH:g} ms (vllm, which has {SHARE:.0%} of the GPU and begins a "
    "response where another ends); one GPU; nothing measured. Not counted: loading, checkpoints, "
    "verifiers, teachers' kept hidden rows."
)


@dataclass
class Work:
    """What a stage does.

    Attributes:
        samples: who writes what.
        scored: ``(model, tokens)`` that are run forward with a gradient for nobody.
        trained: tokens that are trained on, every pass counted.
    """

    samples: list[Sampled] = field(default_factory=list)
    scored: list[tuple[Shape, float]] = field(default_factory=list)
    trained: float = 0.0


@dataclass
class Cost:
    """A stage on a GPU.

    Attributes:
        memory: bytes by what they are for.
        seconds: by phase: rollout, score, train.
        flops: of all phases.
        fits: whether its peak is within the GPU's memory.
        unknown: what was left out as no shape says it, in words.
    """

    memory: Estimate
    seconds: dict[str, float]
    flops: float
    fits: bool
    unknown: str

    def to_dict(self) -> dict:
        """For ``plan --json``: bytes and seconds."""
        memory = {**asdict(self.memory), "peak": self.memory.peak}
        return {**asdict(self), "memory": memory}


@dataclass
class Costs:
    """What every stage of a recipe would hold and take on a GPU.

    Attributes:
        stages: stage -> its cost, or in words why there is no telling.
    """

    gpu: Gpu
    stages: dict[str, Cost | str]
    assumed: str = ASSUMED

    def of(self, stage: str) -> dict:
        """For ``plan --json``."""
        found = self.stages[stage]
        return {"unknown": found} if isinstance(found, str) else found.to_dict()


def costs(recipe: Any, gpu: Gpu) -> Costs:
    """Of every stage, in the order they run."""
    return Costs(gpu, {stage: cost(recipe, stage, gpu) for stage in recipe.order()})


def cost(recipe: Any, stage: str, gpu: Gpu) -> Cost | str:
    """Memory and time of a stage, or in words why there is no telling."""
    config, runtime = recipe.stages[stage], recipe.runtime
    every = recipe.references(stage)  # those of its verifiers too
    read = [t for k, t in every if k != "template"]  # of that the tokenizer alone
    named = [t for t in read if references.parse(t).form != "unknown"]
    shapes = {text: shape_of(recipe, text, stage) for text in named}  # the verifier is no model
    missing = [text for text, shape in shapes.items() if shape is None]
    if missing:
        return f"no size of {missing[0]}; shapes: {{{missing[0]}: {{parameters: N, layers: N}}}}"
    start = getattr(config, "student", "")
    student = shapes[start] if start else made(config.model)
    work = work_of(config, recipe.domains(stage), student, shapes)
    wave, longest = _wave(work, runtime.wave)
    vllm = runtime.engine == "vllm"
    share = runtime.engine_args.get("gpu_memory_utilization", SHARE) if vllm else 0
    learns, lora = work.trained > 0, getattr(config, "lora", None)
    judges = {t for dotted, t in every if dotted.startswith("data.")}
    frozen = {r: s.parameters for r, s in shapes.items() if r != start or r in judges}
    per_pass = work.samples[0].longest if work.samples else DEMONSTRATION
    memory = estimate(
        of_student(
            student.parameters,
            runtime.dtype,
            masters=hasattr(config, "optim") and runtime.masters_of(config.optim.lr),
            adapter=student.adapter(lora.rank) if lora and lora.rank else None,
        ),
        [n * BYTES[runtime.dtype] for n in frozen.values()],
        dtype=runtime.dtype,
        learns=learns,
        steps=hasattr(config, "optim"),
        resident=1 if config.kind == "merge" else runtime.resident_teachers,
        chunk_mib=runtime.chunk_mib,
        cached=max((s.model.cached for s in work.samples), default=0),
        sampled=wave * (PROMPT + longest),
        engine=share * gpu.memory if work.samples else 0,
        activated=student.activated(runtime.gradient_checkpointing),
        trained=(runtime.micro_batch or 16) * (PROMPT + per_pass),
    )
    each = BYTES[runtime.dtype]
    peak = COMPUTE * gpu.flops[runtime.dtype]
    flops = {
        "rollout": sum(
            FORWARD * s.model.per_token * s.responses * (PROMPT + s.mean) for s in work.samples
        ),
        "score": sum(FORWARD * model.per_token * tokens for model, tokens in work.scored),
        "train": TRAIN * student.per_token * work.trained,
    }
    seconds = {
        "rollout": sum(
            served_seconds(s, runtime.wave, each, gpu, peak, share * gpu.memory)
            if vllm
            else decode_seconds(s, runtime.wave, each, gpu, peak)
            for s in work.samples
        ),
        "score": flops["score"] / peak,
        "train": flops["train"] / peak,
    }
    blind = any(s.model.layers == 0 for s in work.samples) or (learns and not student.layers)
    unknown = "cache and activations: a shape has no layers" if blind else ""
    return Cost(memory, seconds, sum(flops.values()), memory.peak <= gpu.memory, unknown)


def _wave(work: Work, most: int) -> tuple[int, int]:
    """Responses at once, and the longest of them."""
    batch = max((min(s.batch, most) for s in work.samples), default=0)
    return batch, max((s.longest for s in work.samples), default=0)


def work_of(config: Any, domains: dict[str, float], student: Shape, shapes: dict) -> Work:
    """What the keys of a stage ask for.

    Args:
        domains: domain -> share of each step.
        shapes: of every model the stage names.
    """
    kind = config.kind
    if kind == "merge":
        return Work()
    if kind == "evaluate":
        batch = config.prompts.limit * config.prompts.samples
        return Work([Sampled(student, len(domains), batch, config.sampling.max_tokens)])
    rounds = config.batches if kind == "gradients" else config.steps
    batch = config.prompts.per_step * config.prompts.samples
    if kind == "pretrain":
        return Work(trained=rounds * batch * (PROMPT + DEMONSTRATION))
    if kind == "sft":
        return _imitation(config, domains, rounds, batch, shapes)
    judge = shapes[config.policy] if kind == "orm" else student
    samples, tokens = _drawn(config, domains, rounds, batch, judge, shapes)
    if kind == "orm":
        return Work(samples, trained=tokens)
    scored = _scored(config, domains, tokens, shapes)
    passes = getattr(config, "updates_per_rollout", 1)
    if passes * getattr(config, "minibatches", 1) > 1:
        scored.append((student, tokens))  # the log-probs before the first update
    if kind == "gradients":
        passes = sum(o.coef > 0 for o in config.objectives.values())
    scoring = [  # of the weights at steps 2^n and of each candidate, where all are tried
        Sampled(student, rounds.bit_length() * (c.candidates + 1), c.size, longest_turn(config))
        for c in getattr(config, "controllers", {}).values()
        if hasattr(c, "candidates")
    ]
    return Work([*samples, *scoring], scored, tokens * passes)


def _drawn(
    config, domains, rounds: int, batch: int, student: Shape, shapes: dict
) -> tuple[list[Sampled], float]:
    """Who writes the responses of an on-policy stage, and their tokens with the prompts'."""
    longest, sources = longest_turn(config), getattr(config, "sources", {})
    whole = Sampled(student, rounds, batch, longest)
    if "teacher_mixed" in sources:  # both models read every token
        read = _by_teacher(config, domains, batch, shapes)
        samples = [whole, *(Sampled(model, rounds, n, longest) for model, n in read)]
        return samples, whole.responses * (PROMPT + whole.mean)
    if not (mixture := sources.get("mixture")):
        return [whole], whole.responses * (PROMPT + whole.mean)
    theirs = sum(mixture.teacher * mixture.decay**step for step in range(rounds)) / max(1, rounds)
    shown = mixture.dataset * rounds * batch
    written = [(student, batch * (1 - theirs - mixture.dataset))]
    written += _by_teacher(config, domains, batch * theirs, shapes)
    samples = [Sampled(m, rounds, max(1, round(n)), longest) for m, n in written if n > 1e-9]
    tokens = sum(s.responses * (PROMPT + s.mean) for s in samples)
    return samples, tokens + shown * (PROMPT + DEMONSTRATION)


def _by_teacher(config, domains, batch: float, shapes: dict) -> list[tuple[Shape, float]]:
    """A batch in the shares of the domains that each teacher serves."""
    found = []
    for name, teacher in config.teachers.items():
        shape = shapes[config.student if teacher.model == "policy" else teacher.model]
        served = [d for d, on in teacher.serves.items() if on] or [name]
        share = sum(domains.get(d, 0.0) for d in served)
        alone = len(config.teachers) == 1 and not share
        found.append((shape, batch * (1.0 if alone else share)))
    return found


def _imitation(config, domains, rounds: int, batch: int, shapes: dict) -> Work:
    """An sft stage: a teacher samples its share of each step, the data has the rest."""
    teacher = config.sources.get("teacher")
    share = 0.0
    if teacher:
        own = {d for d, on in teacher.domains.items() if on}
        other = {d for n, s in config.sources.items() if n != "teacher" for d in s.domains}
        share = sum(v for d, v in domains.items() if (d in own if own else d not in other))
    work = Work(trained=rounds * batch * (1 - share) * (PROMPT + DEMONSTRATION))
    if teacher:
        model, longest = shapes[teacher.model], teacher.sampling.max_tokens
        sampled = Sampled(model, rounds, max(1, round(batch * share)), longest)
        work.samples.append(sampled)
        work.trained += sampled.responses * (PROMPT + sampled.mean)
    return work


def _scored(config, domains, tokens: float, shapes: dict) -> list[tuple[Shape, float]]:
    """Teachers score what is of their domains; a reference and a reward model everything."""
    found = _by_teacher(config, domains, tokens, shapes) if getattr(config, "teachers", {}) else []
    if reference := getattr(config, "reference", None):
        found.append((shapes[config.student if reference == "policy" else reference], tokens))
    for signal in config.signals.values():
        reward = getattr(signal, "reward", "verifier")
        if signal.coef and references.parse(reward).form in ("stage", "folder", "public"):
            found.append((shapes[reward], tokens))
    return found
