"""Sampling by vLLM in this process, beside the weights being trained on the same device.

Every request has a seed of its own, from the sample's draws, and stops at the tokens that end a
response. Log-probs are those of the distribution sampled from, after temperature and with the
padded rows of the vocabulary at -inf. Responses are logged as they finish; one that a kill cut is
sampled again with its seed. vLLM does not promise equal bits: on a CPU in fp32 a rerun gave the
same tokens, on a GPU the composition of a batch may change them. Left out: other devices (the
engine ``vllm_server``), several devices for one engine, top-p and top-k.

    opdctl run recipes/qwen3.yaml runtime.engine=vllm runtime.engine_args.max_model_len=4096
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from opdctl.config.references import base_of, parse
from opdctl.config.registry import member
from opdctl.config.schema import did_you_mean
from opdctl.config.settings import longest_turn
from opdctl.errors import Problem, UsageError
from opdctl.rollout.engines._engine import Engine, Sample
from opdctl.rollout.engines._logged import Finished, is_trained, sampled_or_logged

ROUNDED = (  # of an adapter: message and hint
    "vllm samples from merged weights, and in bfloat16 what an adapter adds is rounded away",
    "runtime.engine=transformers, runtime.dtype=float32, or runtime.engine_args.dtype=float32 "
    "(not of a server)",
)
WIDE = ("float32", "float", "float64")
LOWEST_TEMPERATURE = 0.01  # vLLM raises a lower one to this, and says so in its log only
RESERVED = {  # arguments that are set here, with the reason
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


class Vllm(Engine):
    """vLLM in the stage's process; weights are published to it before it samples."""

    revision = 1
    has_own_weights = True

    @staticmethod
    def problems(recipe) -> list[Problem]:
        """Return what vLLM cannot do of a recipe."""
        wrong = [
            Problem(f"runtime.engine_args.{name}", why, "leave it out")
            for name, why in RESERVED.items()
            if name in recipe.runtime.engine_args
        ]
        if recipe.runtime.dtype == "float64":
            message = "vllm has no float64"
            wrong.append(Problem("runtime.dtype", message, "runtime.engine=transformers"))
        for stage, config in recipe.stages.items():
            places = {f"stages.{stage}.sampling": config.sampling}
            for name, source in config.sources.items():
                place = f"stages.{stage}.sources.{name}"
                places[f"{place}.sampling"] = source.sampling
                if (
                    name == "mixture"
                    and source.teacher
                    and member("sources", name).student_share(source)
                ):
                    message = "one vllm engine a stage, and two models sample here"
                    hint = "runtime.engine=transformers"
                    wrong.append(Problem(f"{place}.teacher", message, hint))
            room = recipe.runtime.engine_args.get("max_model_len")
            if config.lora.rank and rounds_adapters(recipe.runtime):
                wrong.append(Problem(f"stages.{stage}.lora.rank", ROUNDED[0], ROUNDED[1]))
            if config.sampling is not None and isinstance(room, int):
                most = longest_turn(config)  # report it now, not when a limit has grown to it
                if most >= room:
                    message = (
                        f"a response of stages.{stage} may have {most} tokens, beside its prompt"
                    )
                    hint = f"at least {most + 1}, and what the prompts take"
                    wrong.append(Problem("runtime.engine_args.max_model_len", message, hint))
            for place, sampling in places.items():
                if sampling is not None and not LOWEST_TEMPERATURE <= sampling.temperature <= 2.0:
                    message = f"vllm samples at temperatures from {LOWEST_TEMPERATURE} to 2"
                    wrong.append(Problem(f"{place}.temperature", message, "temperature=1.0"))
        return wrong

    @staticmethod
    def notes(recipe) -> list[Problem]:
        """Return objectives that take sampler for trainer, and several samplers in turns."""
        notes = []
        for stage, config in recipe.stages.items():
            for name, source in config.sources.items():
                models = {source.model, *source.experts.values()}
                if name == "mixture" and source.teacher:
                    models = {t.model for t in config.teachers.values()}
                if len([m for m in models if parse(m).form != "server"]) > 1:
                    message = (
                        "several models sample in turns, by one vllm: each publishes its weights"
                    )
                    hint = "of one shape they do so in place; another starts vllm again each time"
                    notes.append(Problem(f"stages.{stage}.sources.{name}", message, hint))
            for name, keys in config.objectives.items():
                own = keys.coef and member("objectives", name).on_policy_only
                if own and not any(member("weights", w).is_importance_weight for w in keys.weights):
                    path = f"stages.{stage}.objectives.{name}.weights"
                    message = "vllm's log-probs are not the trainer's, and nothing corrects for it"
                    notes.append(Problem(path, message, "weights={truncated: {}}"))
        return notes

    @staticmethod
    def require() -> None:
        """Check that vllm is installed; its version and device are checked when it starts.

        Raises:
            UsageError: it is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            message = "runtime.engine is vllm, and vllm is not installed here"
            hint = "pip install 'opdctl[vllm]' (CUDA), or runtime.engine=transformers"
            raise UsageError(message, hint)

    @staticmethod
    def settings(runtime) -> dict[str, Any]:
        """Return the arguments of vLLM's engine, from a run's keys."""
        return {"trust_remote_code": runtime.trust_remote_code, **runtime.engine_args}

    def __init__(
        self,
        model,
        batch: int,
        check: Callable[[], None] = lambda: None,
        wal=None,
        args: dict[str, Any] | None = None,
    ) -> None:
        """Start vLLM on the folder or public name that the model came from.

        Args:
            batch: most responses sampled at once.
            args: arguments of vLLM's engine, by vLLM's names.

        Raises:
            UsageError: vllm is not installed, is of another version, has no such argument, or
                cannot run this model here.
        """
        self.model, self.check, self.wal = model, check, wal
        self.cuda = model.device.type == "cuda"
        self.published: int | str | None = None
        self.awake = True
        self.trained = is_trained(model)
        base = base_of(model.name)
        self.differs_from_folder = self.trained or bool(base)  # no folder has these exact weights
        from opdctl.rollout.engines import _vllm_plugins as plugins

        vllm = plugins.import_vllm(self.cuda)
        name, revision = base or model.name, ""
        if not os.path.isdir(name):
            name, _, revision = name.partition("@")
        arguments = self._arguments(batch, args or {})
        self.wide = _type_of(arguments, type_name(model)) in WIDE
        self._require_exact(model)
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
                weight_transfer_config={"backend": plugins.register_backend()},
                logits_processors=[plugins.mask_padding()] if model.valid_V < rows else None,
                additional_config={"valid": model.valid_V},
                **arguments,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"vllm cannot run {model.name} here: {str(error).strip().splitlines()[0]}",
                "runtime.engine=transformers, or other runtime.engine_args",
            ) from error
        self.longest = self.llm.model_config.max_model_len
        plugins.require_fixed_rope(model, self.longest)
        self.llm.init_weight_transfer_engine({"init_info": {}})

    def _arguments(self, batch: int, args: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of vLLM's engine that ``args`` may replace or add to.

        Raises:
            UsageError: vLLM has no such argument.
        """
        from vllm.engine.arg_utils import EngineArgs

        known = [f.name for f in dataclasses.fields(EngineArgs)]
        for name in args:
            if name not in known:
                near = did_you_mean(name, known, "arguments of vllm's engine:")
                raise UsageError(f"runtime.engine_args.{name}: vllm has no such argument", near)
        return {
            "dtype": type_name(self.model),
            "max_num_seqs": batch,
            "use_tqdm_on_load": False,
            **({"gpu_memory_utilization": 0.3} if self.cuda else {"enforce_eager": True}),
            **({} if self.cuda else {"kv_cache_memory_bytes": 256 << 20}),
            **args,
        }

    def _require_exact(self, model) -> None:
        """Check that the engine holds all that an adapter adds to a model.

        Raises:
            UsageError: it would be rounded to 16 bits.
        """
        from opdctl.models.merging import has_adapter

        if not self.wide and has_adapter(model.net):
            raise UsageError(f"{model.name} has an adapter: {ROUNDED[0]}", ROUNDED[1])

    def switch_model(self, model) -> bool:
        """Sample from another model from now on, once its weights are published.

        Return False and change nothing if its weights have another shape.
        """
        if module_config(model) != module_config(self.model):
            return False
        self._require_exact(model)
        self.model, self.published = model, None
        self.trained, self.differs_from_folder = is_trained(model), True
        return True

    def publish(self, version: int | str) -> None:
        """Wake vLLM up and give it the model's weights, unless it has this version.

        Args:
            version: optimizer steps that the weights have seen, or a name for other weights.
        """
        if self.cuda and not self.awake:
            self.llm.wake_up()
        self.awake = True
        again = self.trained and self.published != version
        if not self.differs_from_folder or not (again or self.published is None):
            return
        from opdctl.rollout.engines._vllm_plugins import named_weights

        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"tensors": named_weights(self.model)}})
        self.llm.finish_weight_update(weight_version=str(version))
        self.llm.reset_prefix_cache()  # it holds keys and values of other weights
        self.published = version

    def release(self) -> None:
        """Give the device's memory to the trainer until the next publish; on a CPU do nothing."""
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
        """Return one sample for each prompt and key.

        Args:
            prompts: token ids; ragged.
            keys: 64 bits each; the seeds.

        Raises:
            Interrupted: a stop was asked for, between two tokens.
            UsageError: a prompt and its response are longer than the engine's limit.
        """
        most = max(map(len, prompts)) + max_tokens
        if most > self.longest:
            raise UsageError(
                f"a prompt and its response may have {most} tokens, and vllm was started for "
                f"{self.longest}",
                f"runtime.engine_args.max_model_len={most}, or a smaller sampling.max_tokens",
            )
        requests = list(zip(prompts, keys, strict=True))

        def run(places: list[int]) -> Finished:
            return self._run(requests, places, temperature, max_tokens)

        return sampled_or_logged(self, requests, run, temperature, max_tokens)

    def _run(
        self,
        requests: list[tuple[list[int], int]],
        places: list[int],
        temperature: float,
        max_tokens: int,
    ) -> Finished:
        """Yield the place and the sample of each prompt and seed at these places, as it comes."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, waiting = self.llm.llm_engine, set()
        try:
            for place in places:
                prompt, seed = requests[place]
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


def rounds_adapters(runtime: Any) -> bool:
    """Return True where vLLM would hold merged adapters in 16 bits."""
    return _type_of(runtime.engine_args, runtime.dtype) not in WIDE


def _type_of(args: dict[str, Any], dtype: str) -> str:
    """Return the type of vLLM's weights, from its arguments and the type of the model's."""
    chosen = str(args.get("dtype", "auto"))
    return dtype if chosen == "auto" else chosen


def type_name(model) -> str:
    """Return the type of a model's weights, as vLLM names it."""
    return str(next(model.net.parameters()).dtype).removeprefix("torch.")


def module_config(model) -> dict:
    """Return all that vLLM's modules depend on: models of equal ones can exchange their weights."""
    parameter = next(model.net.parameters())
    config = {**model.net.config.to_dict(), "_name_or_path": None, "transformers_version": None}
    return config | {
        "dtype": parameter.dtype,
        "valid": model.valid_V,
        "rows": model.head.out_features,
    }
