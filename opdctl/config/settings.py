"""The keys that several stage kinds share. No torch; of logic, who teaches what.

Each stage kind's own Config stands in ``stages/``; each member's in its family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from opdctl.config.schema import REQUIRED, key

# AdamW moves a weight by about lr; bfloat16 keeps 8 bits of it. Measured, 50 steps on weights of
# std .02: at 1e-6 2 % of them moved at all, at 1e-5 15 %, at 1e-4 88 %, in float32 every one.
ROUNDED_AWAY = 1e-5
T = TypeVar("T")
WATCHDOGS = ("non_finite", "empty", "kl", "length", "entropy", "reward", "mismatch")


@dataclass(kw_only=True)
class Optim:
    """AdamW and its schedule."""

    lr: float = key(1e-3, "peak learning rate", least=0.0)
    schedule: Literal["constant", "linear", "cosine"] = key("constant", "shape after the warm-up")
    warmup: int = key(0, "steps of linear warm-up", least=0)
    final: float = key(
        0.1,
        "share of lr that the last step has (linear, cosine), where that is after the warm-up",
        least=0,
        most=1,
    )
    weight_decay: float = key(0.0, "decoupled; on matrices only", least=0.0)
    beta1: float = key(0.9, "decay of the first moment", least=0, most=0.99999)
    beta2: float = key(0.95, "decay of the second moment", least=0, most=0.99999)
    eps: float = key(1e-8, "added to the root of the second moment", least=0.0)
    clip_norm: float = key(1.0, "largest gradient norm; 0 does not clip", least=0.0)


@dataclass(kw_only=True)
class Lora:
    """An adapter that is trained in place of the weights; needs the extra ``peft``."""

    absent: ClassVar[dict[str, str]] = {
        "dropout": "a policy with dropout is not the one that sampled: ratios would be of another"
    }
    rank: int = key(0, "of the adapter; 0 trains every weight", least=0)
    alpha: float = key(32.0, "B A is multiplied by alpha / rank", least=0)
    targets: list[str] = key([], "names of linear layers; empty is all of them but the head")
    output: Literal["merged", "adapter"] = key(
        "merged", "merged: a plain model; adapter: for peft, to be loaded on the same base"
    )


@dataclass(kw_only=True)
class Sampling:
    """The sampler's keys. Responses come from the whole distribution, so log-probs are exact."""

    absent: ClassVar[dict[str, str]] = dict.fromkeys(
        ("top_p", "top_k", "min_p", "min_tokens"),
        "the whole distribution is sampled: tokens of a cut one have other log-probs than the loss "
        "gives them, and every ratio is biased",
    )
    temperature: float = key(
        1.0, "divides the logits, in sampler and loss alike (but see loss_temperature)", least=1e-3
    )
    max_tokens: int = key(32, "longest turn of a response, in tokens", least=1)


NO_MEMBERS: Mapping[str, Any] = MappingProxyType({})


def no_keys(kind: type[T]) -> T | None:
    """Return None, typed as keys of that kind that a stage may lack."""
    return None


@dataclass(kw_only=True)
class SourceConfig:
    """The values that are read of a source without a key of that name; it adds no keys."""

    domains = NO_MEMBERS
    model = ""
    experts = NO_MEMBERS
    sampling = no_keys(Sampling)


@dataclass(kw_only=True)
class ControllerConfig:
    """The values that are read of a controller without a key of that name; it adds no keys."""

    most = 0  # tokens of the longest turn that it may allow
    candidates = 0  # weights that it scores beside those of a step


def longest_turn(config: Any) -> int:
    """The most tokens that a turn of a stage may ever have, where a controller moves the limit."""
    moved = [controller.most for controller in config.controllers.values()]
    return max(config.sampling.max_tokens, *moved, 0)


@dataclass(kw_only=True)
class PromptKeys:
    """The keys of the prompts of any stage."""

    max_tokens: int = key(
        0, "longest prompt, in tokens as the student reads it; 0 is any", least=0, neutral=True
    )
    too_long: Literal["error", "drop"] = key(
        "error", "error: the stage is refused; drop: they are left out and counted", neutral=True
    )
    domains: dict[str, float] = key({}, "domain: share of each step; empty is all, equally")


@dataclass(kw_only=True)
class Prompts(PromptKeys):
    """The prompts of a step. Their order is a pure function of seed, epoch and position."""

    per_step: int = key(32, "prompts a step", least=1)
    samples: int = key(1, "responses per prompt (the group, G)", least=1)
    pool: int = key(
        0, "only the first so many prompts of each domain; 0 is all", least=0, neutral=True
    )


@dataclass(kw_only=True)
class Teacher:
    """One teacher. ``NAME: REF`` is short for ``NAME: {model: REF}``."""

    short: ClassVar[str] = "model"
    model: str = key(
        REQUIRED, "stage:NAME, a folder, a public name, http://host:8000, or policy", ref=True
    )
    serves: dict[str, bool] = key({}, "domain: true; empty is the domain of the teacher's name")
    weight: float = key(1.0, "factor of its signal", least=0.0)
    at: str = key(
        "",
        "where a served model is now, if not at the address in model",
        role="operational",
    )
    scored_by: dict = key(
        {},
        "a member of teachers/ of one's own that asks the model; empty is opdctl's",
        family="teachers",
        neutral=True,
    )

    @property
    def address(self) -> str:
        """The address: ``model``, or ``at`` with the name of the model that is meant there."""
        name = self.model.partition("#")[2]
        return f"{self.at}#{name}" if self.at and name else self.at or self.model


def routes(domains: Mapping[str, float], teachers: Mapping[str, Teacher]) -> dict[str, list[str]]:
    """Return the names of the teachers that serve each domain.

    A teacher serves what ``serves`` says; without it the domain of its name; and the only one, if
    it is called ``teacher``, all of them.
    """
    serving: dict[str, list[str]] = {domain: [] for domain in domains}
    for name, teacher in teachers.items():
        chosen = [d for d, on in teacher.serves.items() if on]
        if not teacher.serves:
            alone = len(teachers) == 1 and name == "teacher" and name not in domains
            chosen = list(domains) if alone else [name]
        for domain in chosen:
            serving.setdefault(domain, []).append(name)
    return serving


@dataclass(kw_only=True)
class SignalConfig:
    """Keys of every signal, and what is read of one that lacks a key others have."""

    coef: float = key(1.0, "factor of this signal in the advantage; 0 turns it off")

    reward = ""  # who rewards the rollouts that it reads, if it reads a reward
    policy = ""  # the policy that it reads, if it reads one


# What the k most probable ids of a side ask of a teacher. Its log-probs at the student's ids come
# out of its hidden rows; at its own ids a list of them will do, which a server can give.
_REBUILT = ("teacher.hidden", "teacher.lse", "teacher.topk", "teacher.entropy")
ON_TOP = {
    "topk_student": _REBUILT,
    "topk_union": _REBUILT,
    "topk_teacher": ("teacher.topk_list",),
}


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Keys of every objective, and what is read of one that lacks a key others have."""

    coef: float = key(1.0, "factor of this objective in the loss; 0 turns it off", least=0.0)
    normalise: Literal["seq_mean", "token_mean", "domain_mean"] = key(
        "seq_mean",
        "seq_mean: 1/|y| per response, then their mean; domain_mean: a domain's tokens together "
        "weigh as its share of the responses",
    )
    weights: dict = key({}, "per-token factors", family="weights")

    k = 0  # ids of a list that it asks a teacher for
    rank = 0  # numbers that the states of both sides are mapped to
    layers = ""
    clip_low = 0.0
    clip_high = 0.0


@dataclass(kw_only=True)
class WatchdogConfig:
    """Keys of every watchdog."""

    steps: int = key(5, "steps in a row before it acts", role="operational", least=1)
    action: Literal["warn", "stop"] = key(
        "warn", "warn, or stop the stage as failed", role="operational"
    )


NO_TEACHERS: Mapping[str, Teacher] = MappingProxyType({})


@dataclass(kw_only=True)
class StageConfig:
    """Keys of every stage, and what is read of a kind that lacks a key others have.

    What has no annotation below is no key: it is the neutral value that a stage without the key of
    that name has, so that nobody asks a stage whether it has one.
    """

    kind: str = key(REQUIRED, "the stage's kind; `opdctl ls stages` lists them")

    student = ""
    lora = Lora()
    reference = ""
    template = ""
    prompts = no_keys(PromptKeys)
    sampling = no_keys(Sampling)
    optim = no_keys(Optim)
    seed_group = ""
    steps = 0
    batches = 0
    epochs = 1
    minibatches = 1
    loss_temperature = 0.0
    pooled = False
    sources = NO_MEMBERS
    controllers = NO_MEMBERS
    signals = NO_MEMBERS
    objectives = NO_MEMBERS
    teachers = NO_TEACHERS


@dataclass(kw_only=True)
class TrainConfig(StageConfig):
    """Keys of every stage that trains."""

    steps: int = key(100, "optimizer steps", least=1)
    prompts: Prompts = key(Prompts(), "which prompts")
    optim: Optim = key(Optim(), "optimizer")
    seed_group: str = key("", "stages with one name here share prompts and draws (paired arms)")
    watchdogs: dict = key(
        {name: {} for name in WATCHDOGS},
        "eyes on every step; those not named stay as they are",
        role="operational",
        family="watchdogs",
        keep=True,
        was="watch",
    )


@dataclass(kw_only=True)
class Runtime:
    """The keys of how a run is carried out, whatever the recipe."""

    threads: int = key(1, "CPU threads of a stage", role="numeric", least=1, most=1024)
    jobs: int = key(
        0,
        "stages at once; 0 is one per thread-group of cores",
        role="operational",
        least=0,
        most=1024,
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto takes CUDA if there", role="numeric")
    dtype: Literal["float32", "bfloat16", "float64"] = key("float32", "parameters and activations")
    master_weights: Literal["auto", "float32", "none"] = key(
        "auto",
        "copies of bfloat16 parameters that the optimizer moves; auto: float32 where a stage's lr "
        "is at most 1e-5, whose steps bfloat16 rounds away",
        neutral=True,
        was="masters",
    )
    attn: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = key(
        "auto", "attention, by transformers' name; auto is its choice", role="numeric"
    )
    packing: Literal["auto", "padded", "packed"] = key(
        "auto",
        "sequences of a pass in rows of their own, padded, or one after another without padding; "
        "auto packs with flash attention: others would compute the blocks between sequences too",
        role="numeric",
    )
    gradient_checkpointing: bool = key(
        False,
        "compute activations again in the backward pass, to save memory",
        role="numeric",
    )
    engine: Literal["transformers", "vllm", "vllm_server"] = key(
        "transformers", "who samples; `opdctl show engines/vllm`", neutral=True
    )
    engine_args: dict[str, Any] = key({}, "of vllm's engine, by its own names", neutral=True)
    engine_at: str = key("", "address of the server, for vllm_server", role="operational")
    engine_share: str = key(
        "/dev/shm", "folder that vllm_server sees too: weights go through it", role="operational"
    )
    rollout_batch: int = key(512, "responses sampled at once", role="numeric", least=1, was="wave")
    micro_batch: int = key(
        0, "sequences per pass of an update; 0 is as many as are alike", role="numeric", least=0
    )
    chunk_mib: int = key(
        0,
        "memory for the logits of one chunk, MiB; 0 is 256, on CUDA 3072",
        role="numeric",
        least=0,
    )
    kernel: Literal["auto", "reference", "chunked", "triton"] = key(
        "auto", "row pass of the loss; auto is triton on CUDA, else chunked", role="numeric"
    )
    other_machine: Literal["note", "refuse"] = key(
        "note",
        "a run that goes on under another class of processor, number of threads, device or version "
        "of torch is equal up to rounding: say so, or refuse",
        role="operational",
    )
    shared: bool = key(
        False, "other users of this machine may read the run directory", role="operational"
    )
    rounded_logits: bool = key(False, "round logits to bfloat16 in the loss, to compare")
    resident_teachers: int = key(
        0, "frozen models kept loaded; others are read again; 0 is all", role="operational", least=0
    )
    trust_remote_code: bool = key(
        False, "run code that a model brings with it (auto_map); read it first", neutral=True
    )
    template_date: str = key(
        "",
        "the day, as '2026-01-31' in quotes, that a chat template which prints one is shown; empty "
        "refuses such a template",
        neutral=True,
    )
    server_timeout: float = key(
        120.0,
        "seconds a served model has for an answer, tries included",
        role="operational",
        least=0.1,
    )
    server_requests: int = key(
        4, "requests to a served model at once", role="operational", least=1, most=1024
    )
    server_batch: int = key(16, "sequences in a request", role="numeric", least=1)
    checkpoint_every: int = key(20, "steps between checkpoints", role="operational", least=1)
    keep_checkpoints: int = key(2, "newest ones kept", role="operational", least=1)
    log_rollouts_every: int = key(
        20, "steps between rollout logs; 0 is never", role="operational", least=0
    )
    log_overlap_every: int = key(
        20,
        "steps between passes that measure how student and teacher overlap, on log_rollouts of a "
        "step; 0 is never. Objectives that have both sides' logits log it in every step",
        role="operational",
        least=0,
    )
    log_accuracy: bool = key(True, "verify each step's rollouts", role="operational")
    log_rollouts: int = key(16, "rollouts in each log", role="operational", least=1)

    def masters_of(self, lr: float) -> bool:
        """Return True where a stage of this learning rate keeps fp32 copies of its parameters."""
        wanted = self.master_weights == "float32" or (
            self.master_weights == "auto" and lr <= ROUNDED_AWAY
        )
        return self.dtype == "bfloat16" and wanted
