from vllm.distributed.weight_transfer.base import WeightTransferEngine

class WeightTransferEngineFactory:
    _registry: dict[str, object]
    @classmethod
    def register_engine(cls, name: str, engine: type[WeightTransferEngine]) -> None: ...
