from enum import Enum

class RequestOutputKind(Enum):
    FINAL_ONLY = 2

class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        logprobs: int,
        stop_token_ids: list[int],
        ignore_eos: bool,
        detokenize: bool,
        output_kind: RequestOutputKind,
    ) -> None: ...
