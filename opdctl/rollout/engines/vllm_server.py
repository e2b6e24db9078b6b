"""Sampling by a vLLM server on other devices; weights go to it through a file that both sides see.

    python -m opdctl.rollout.engines._vllm_serve DIR --port 8000
    opdctl run recipes/qwen3.yaml runtime.engine=vllm_server runtime.engine_at=http://127.0.0.1:8000

Publishing is vLLM's own sequence over HTTP: pause (what an earlier attempt left is aborted), start,
update with the path, finish with a version, resume. The version is of this engine alone; it is
asked before each rollout, and after each answer before that is logged, so a server that was started
again, or that another run uses too, ends the stage by name and not with samples of other weights.
Seeds, ends and the log are those of the ``vllm`` engine. Left out: several servers, ``nccl``
(weights from GPU to GPU).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from opdctl import draws
from opdctl.errors import Problem, StageFailed, UsageError
from opdctl.estimate.rollout import AT_ONCE
from opdctl.models import tensor_file
from opdctl.remote.endpoint import opened, reading
from opdctl.rollout.engines.transformers import Sample
from opdctl.rollout.engines.vllm import Vllm, logged, recalled, trained

ACTIVE = "a weight update is already active"  # vLLM's words for one that was not finished


class VllmServer:
    """A vLLM server on other devices; weights are published to it before it samples."""

    revision = 1
    holds = True

    @staticmethod
    def problems(recipe) -> list[Problem]:
        """What it cannot do, of a whole recipe."""
        runtime = recipe.runtime
        found = [p for p in Vllm.problems(recipe) if not p.path.startswith("runtime.engine_args")]
        if not runtime.engine_at.startswith(("http://", "https://")):
            what = "the engine is a server, and this is no address of one"
            found.append(Problem("runtime.engine_at", what, "runtime.engine_at=http://host:8000"))
        if runtime.engine_args:
            what = "a server was given its arguments when it was started"
            found.append(Problem("runtime.engine_args", what, "leave them out"))
        return found

    notes = staticmethod(Vllm.notes)

    @staticmethod
    def settings(runtime) -> Any:
        """All of a run's keys."""
        return runtime

    def __init__(self, model, wave: int, check: Callable[[], None], wal, runtime: Any) -> None:
        """Ask what is served, and prepare it for weights.

        Raises:
            StageFailed: it does not answer, or takes no weights.
            UsageError: the server was not started for this.
        """
        self.model, self.check, self.wal, self.share = model, check, wal, runtime.engine_share
        if not Path(self.share).is_dir():
            what = f"runtime.engine_share: there is no folder {self.share}"
            raise UsageError(what, "a folder that the server sees too, at the same path")
        self.who = f"the vllm engine ({runtime.engine_at})"
        self.endpoint, served = opened(
            self.who, runtime.engine_at, runtime, check, "runtime.engine_at=http://host:8000"
        )
        self.endpoint.again = [code for code in self.endpoint.again if code != 500]  # told at once
        self.endpoint.most = min(wave, AT_ONCE)
        self.served, self.longest = served["id"], served.get("max_model_len")
        self.published: int | str | None = None
        self.trained = trained(model)
        self.label = ""
        try:
            self.endpoint.all("/init_weight_transfer_engine", [{"init_info": {}}], check)
        except StageFailed as error:
            raise UsageError(
                f"{self.who} takes no weights: {error.message}",
                "start it with: python -m opdctl.rollout.engines._vllm_serve DIR --port 8000",
            ) from None

    def take(self, model) -> bool:
        """Sample from another model from now on; the server says whether its weights fit."""
        self.model, self.trained, self.published = model, trained(model), None
        return True

    def publish(self, version: int | str) -> None:
        """Give it the model's weights as they stand; nothing if it has this version. A stop is
        heeded before and after: cut in between, a server takes no other weights.

        Args:
            version: optimizer steps that the weights have seen, or a name for others.

        Raises:
            Interrupted: the stop flag was seen.
            StageFailed: it did not take them, or says that it has others.
        """
        if self.published is not None and (not self.trained or self.published == version):
            return
        from opdctl.rollout.engines._vllm_parts import named_weights

        name = uuid.uuid4().hex[:12]
        self.label = f"{name}:{version}"
        path = Path(self.share) / f"opdctl-{name}.safetensors"
        try:
            self._share(path, named_weights(self.model))
            self.check()
            self._tell("/pause?mode=abort", {})
            self._begin()
            self._tell("/update_weights", {"update_info": {"path": str(path)}})
            self._tell("/finish_weight_update", {"weight_version": self.label})
            self._tell("/reset_prefix_cache", {})  # it holds keys and values of other weights
            self._tell("/resume", {})
        finally:
            path.unlink(missing_ok=True)
        self._require_own()
        self.published = version

    def rest(self) -> None:
        """Its devices are its own."""

    def close(self) -> None:
        """Leave it as it is: the next engine publishes its own weights."""

    def generate(
        self, prompts: list[list[int]], keys: list[int], *, temperature: float, max_tokens: int
    ) -> list[Sample]:
        """One sample for each prompt and key; arguments as in ``Vllm.generate``.

        Raises:
            Interrupted: the stop flag was seen.
            StageFailed: the server died, hung or has other weights; what it finished is logged.
            UsageError: a prompt and its response are longer than it reads.
        """
        most = max(map(len, prompts)) + max_tokens
        if self.longest and most > self.longest:
            raise UsageError(
                f"a prompt and its response may have {most} tokens, and {self.who} reads "
                f"{self.longest}",
                f"start it with --max-model-len {most}, or a smaller sampling.max_tokens",
            )
        asked = list(zip(prompts, keys, strict=True))
        of = (self.model.name, self.published if self.trained else None)
        names = [f"response {draws.key(*of, p, k, temperature, max_tokens):016x}" for p, k in asked]
        samples = [recalled(self.wal, name, self.model.ends) for name in names]
        todo = [i for i, sample in enumerate(samples) if sample is None]
        bodies = [self._question(*asked[i], temperature, max_tokens) for i in todo]
        if todo:
            self._require_own()
        each = self.endpoint.each("/v1/completions", bodies, self.check, self._confirm)
        with closing(each) as answers:
            for at, answer in answers:
                with reading(self.who):
                    sample = samples[todo[at]] = self._sample(answer)
                if self.wal is not None:
                    self.wal.put(names[todo[at]], logged(sample))
        return samples

    def _question(self, prompt, seed: int, temperature: float, max_tokens: int) -> dict:
        return {
            "model": self.served,
            "prompt": prompt,
            "add_special_tokens": False,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed >> 1,  # 63 bits: a signed integer holds them
            "logprobs": 0,  # of the sampled token
            "stop_token_ids": list(self.model.ends),
            "ignore_eos": True,  # vLLM's own idea of it
            "return_token_ids": True,
        }

    def _sample(self, answer: dict) -> Sample:
        (choice,) = answer.get("choices") or [{}]
        ids = choice.get("token_ids") or []
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if not ids or len(ids) != len(logprobs) or None in logprobs:
            raise StageFailed(
                f"{self.who} sampled {len(ids)} tokens and gave {len(logprobs)} log-probs, having "
                f"ended by {choice.get('finish_reason')!r}",
                "is another run's weight update aborting its requests? resume samples the rest",
            )
        if choice["finish_reason"] not in ("stop", "length"):
            what = f"{self.who} ended a response by {choice['finish_reason']!r}"
            raise StageFailed(what, "resume samples it again")
        return Sample(ids, logprobs, ids[-1] not in self.model.ends)

    def _require_own(self) -> None:
        """It must have the weights that this engine gave it last."""
        self._compare(self.endpoint.all("/weight_info", [None], self.check)[0])

    def _confirm(self, stopped) -> None:
        """The same of an answer that has just come; ``stopped`` as in ``Endpoint.ask``."""
        self._compare(self.endpoint.ask("/weight_info", None, stopped))

    def _compare(self, info: dict) -> None:
        found = info.get("weight_version")
        if found != self.label:
            raise StageFailed(
                f"{self.who} has weights of version {found!r} and was given {self.label!r}",
                "was it started again, or does another run use it? one server for one run; resume "
                "publishes the weights anew",
            )

    def _share(self, path: Path, weights: dict) -> None:
        """Put the weights where the server sees them.

        Raises:
            StageFailed: there is no room; a stage would say that of its own folder.
        """
        from safetensors import SafetensorError

        try:
            tensor_file.write(path, weights)
        except (OSError, SafetensorError) as error:
            size = sum(t.numel() * t.element_size() for t in weights.values())
            raise StageFailed(
                f"runtime.engine_share: cannot write {size / 1e6:.0f} MB of weights under "
                f"{self.share}: {error}",
                "make room there, or runtime.engine_share=DIR: a larger folder that the server "
                "sees too; then resume",
            ) from None

    def _begin(self) -> None:
        """Start an update; one that a kill left open is ended first, whatever it had loaded."""
        try:
            self._tell("/start_weight_update", {})
        except StageFailed as error:
            if ACTIVE not in error.message:
                raise
            self._tell("/finish_weight_update", {"weight_version": "cut"})
            self._tell("/start_weight_update", {})

    def _tell(self, path: str, body: dict) -> None:
        self.endpoint.all(path, [body], lambda: None)
