"""The part of vLLM that opdctl calls, for the type checker: vLLM is not installed where it runs."""

from typing import Any

from vllm.sampling_params import SamplingParams as SamplingParams

__version__: str

class EngineCore:
    def shutdown(self) -> None: ...

class Logprob:
    logprob: float

class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]

class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]

class LLMEngine:
    engine_core: EngineCore
    def add_request(
        self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams
    ) -> None: ...
    def step(self) -> list[RequestOutput]: ...
    def abort_request(self, request_ids: list[str]) -> None: ...

class ModelConfig:
    max_model_len: int

class LLM:
    llm_engine: LLMEngine
    model_config: ModelConfig
    def __init__(self, model: str, **arguments: Any) -> None: ...
    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, request: dict[str, Any]) -> None: ...
    def finish_weight_update(self, weight_version: str) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def wake_up(self) -> None: ...
    def sleep(self, level: int) -> None: ...
