"""Sampling by a vLLM server on other devices, which reads the weights from a shared folder.

    python -m opdctl.rollout.engines._vllm_serve DIR --port 8000
    opdctl run recipes/qwen3.yaml runtime.engine=vllm_server runtime.engine_at=http://127.0.0.1:8000

Publishing is vLLM's own sequence over HTTP: pause (which aborts requests of an earlier attempt),
start, update with the path, finish with a version, resume. The version is unique to this engine. It
is read back before each rollout, and after each answer before that is logged: a server that was
restarted, or that another run uses too, ends the stage by name instead of giving samples of other
weights. Seeds, ends and the log are those of the ``vllm`` engine. Left out: several servers,
``nccl`` (weights from GPU to GPU).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from opdctl.errors import Problem, StageFailed, UsageError
from opdctl.estimate.rollout import AT_ONCE
from opdctl.models import tensor_file
from opdctl.remote.endpoint import opened, reading
from opdctl.rollout.engines._engine import Engine, Sample
from opdctl.rollout.engines._logged import Finished, is_trained, sampled_or_logged
from opdctl.rollout.engines._vllm_plugins import require_fixed_rope
from opdctl.rollout.engines.vllm import ROUNDED, Vllm

ACTIVE = "a weight update is already active"  # vLLM's words for one that was not finished


class VllmServer(Engine):
    """A vLLM server on other devices; weights are published to it before it samples."""

    revision = 1
    has_own_weights = True

    @staticmethod
    def problems(recipe) -> list[Problem]:
        """Return what a vLLM server cannot do of a recipe."""
        runtime = recipe.runtime
        wrong = [p for p in Vllm.problems(recipe) if not p.path.startswith("runtime.engine_args")]
        if not runtime.engine_at.startswith(("http://", "https://")):
            message = "the engine is a server, and this is no address of one"
            hint = "runtime.engine_at=http://host:8000"
            wrong.append(Problem("runtime.engine_at", message, hint))
        if runtime.engine_args:
            message = "a server was given its arguments when it was started"
            wrong.append(Problem("runtime.engine_args", message, "leave them out"))
        return wrong

    notes = staticmethod(Vllm.notes)

    @staticmethod
    def settings(runtime) -> Any:
        """Return all of a run's keys."""
        return runtime

    def __init__(self, model, batch: int, check: Callable[[], None], wal, runtime: Any) -> None:
        """Ask the server for its model, and prepare it for weights.

        Args:
            batch: most requests at once.
            runtime: the run's keys.

        Raises:
            StageFailed: the server does not answer, or takes no weights.
            UsageError: the server was not started for this.
        """
        self.model, self.check, self.wal, self.share = model, check, wal, runtime.engine_share
        _require_exact(model)
        if not Path(self.share).is_dir():
            message = f"runtime.engine_share: there is no folder {self.share}"
            raise UsageError(message, "a folder that the server sees too, at the same path")
        self.who = f"the vllm engine ({runtime.engine_at})"
        self.endpoint, served = opened(
            self.who, runtime.engine_at, runtime, check, "runtime.engine_at=http://host:8000"
        )
        again = self.endpoint.again
        self.endpoint.again = tuple(code for code in again if code != 500)  # reported at once
        self.endpoint.most = min(batch, AT_ONCE)
        self.served, self.longest = served["id"], served.get("max_model_len")
        require_fixed_rope(model, self.longest)
        self.published: int | str | None = None
        self.trained = is_trained(model)
        self.label = ""
        try:
            self.endpoint.all("/init_weight_transfer_engine", [{"init_info": {}}], check)
        except StageFailed as error:
            raise UsageError(
                f"{self.who} takes no weights: {error.message}",
                "start it with: python -m opdctl.rollout.engines._vllm_serve DIR --port 8000",
            ) from None

    def switch_model(self, model) -> bool:
        """Sample from another model from now on; the server refuses weights that do not fit."""
        _require_exact(model)
        require_fixed_rope(model, self.longest)
        self.model, self.trained, self.published = model, is_trained(model), None
        return True

    def publish(self, version: int | str) -> None:
        """Give the server the model's weights, unless it has this version.

        A stop is heeded before and after only: cut in between, a server takes no other weights.

        Args:
            version: optimizer steps that the weights have seen, or a name for other weights.

        Raises:
            Interrupted: a stop was asked for.
            StageFailed: the server did not take the weights, or reports other ones.
        """
        if self.published is not None and (not self.trained or self.published == version):
            return
        from opdctl.rollout.engines._vllm_plugins import named_weights

        name = uuid.uuid4().hex[:12]
        self.label = f"{name}:{version}"
        path = Path(self.share) / f"opdctl-{name}.safetensors"
        try:
            self._write_weights(path, named_weights(self.model))
            self.check()
            self._post("/pause?mode=abort", {})
            self._start_update()
            self._post("/update_weights", {"update_info": {"path": str(path)}})
            self._post("/finish_weight_update", {"weight_version": self.label})
            self._post("/reset_prefix_cache", {})  # it holds keys and values of other weights
            self._post("/resume", {})
        finally:
            path.unlink(missing_ok=True)
        self._require_own()
        self.published = version

    def release(self) -> None:
        """Do nothing: the server's devices are its own."""

    def close(self) -> None:
        """Leave the server as it is: the next engine publishes its own weights."""

    def generate(
        self, prompts: list[list[int]], keys: list[int], *, temperature: float, max_tokens: int
    ) -> list[Sample]:
        """Return one sample for each prompt and key; arguments as in ``Vllm.generate``.

        Raises:
            Interrupted: a stop was asked for.
            StageFailed: the server died, hung or has other weights; finished responses are logged.
            UsageError: a prompt and its response are longer than the server reads.
        """
        most = max(map(len, prompts)) + max_tokens
        if self.longest and most > self.longest:
            raise UsageError(
                f"a prompt and its response may have {most} tokens, and {self.who} reads "
                f"{self.longest}",
                f"start it with --max-model-len {most}, or a smaller sampling.max_tokens",
            )
        requests = list(zip(prompts, keys, strict=True))

        def run(places: list[int]) -> Finished:
            bodies = [self._request(*requests[i], temperature, max_tokens) for i in places]
            return self._run(places, bodies)

        return sampled_or_logged(self, requests, run, temperature, max_tokens)

    def _run(self, places: list[int], bodies: list[dict]) -> Finished:
        """Yield the place and the sample of each request, as it is answered."""
        self._require_own()
        each = self.endpoint.each("/v1/completions", bodies, self.check, self._require_own_now)
        with closing(each) as answers:
            for at, answer in answers:
                with reading(self.who):
                    sample = self._sample(answer)
                yield places[at], sample

    def _request(self, prompt, seed: int, temperature: float, max_tokens: int) -> dict:
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
            message = f"{self.who} ended a response by {choice['finish_reason']!r}"
            raise StageFailed(message, "resume samples it again")
        return Sample(ids, logprobs, ids[-1] not in self.model.ends)

    def _require_own(self) -> None:
        """Check that the server has the weights that this engine gave it last."""
        self._compare(self.endpoint.all("/weight_info", [None], self.check)[0])

    def _require_own_now(self, stopped) -> None:
        """Check the same when an answer has just come; ``stopped`` as in ``Endpoint.ask``."""
        self._compare(self.endpoint.ask("/weight_info", None, stopped))

    def _compare(self, info: dict) -> None:
        version = info.get("weight_version")
        if version != self.label:
            raise StageFailed(
                f"{self.who} has weights of version {version!r} and was given {self.label!r}",
                "was it started again, or does another run use it? one server for one run; resume "
                "publishes the weights anew",
            )

    def _write_weights(self, path: Path, weights: dict) -> None:
        """Write the weights into the shared folder.

        Raises:
            StageFailed: the folder has no room; names it, as it is not the stage's own.
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

    def _start_update(self) -> None:
        """Start a weight update; first end one that a kill left open, whatever it had loaded."""
        try:
            self._post("/start_weight_update", {})
        except StageFailed as error:
            if ACTIVE not in error.message:
                raise
            self._post("/finish_weight_update", {"weight_version": "cut"})
            self._post("/start_weight_update", {})

    def _post(self, path: str, body: dict) -> None:
        self.endpoint.all(path, [body], lambda: None)


def _require_exact(model) -> None:
    """Check that a server, which has a model's type, holds all that an adapter adds to it.

    Raises:
        UsageError: it would be rounded to 16 bits.
    """
    from opdctl.models.merging import has_adapter, is_narrow

    if has_adapter(model.net) and is_narrow(model.net):
        raise UsageError(f"{model.name} has an adapter: {ROUNDED[0]}", ROUNDED[1])
