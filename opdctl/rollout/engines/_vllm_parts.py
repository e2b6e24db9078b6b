"""What vLLM is extended by, through its own interfaces: a weight-transfer backend, a mask.

The backend takes tensors that lie in this process, or the path of a file of them that both sides
see, so it needs no device of its own kind; vLLM's four phases (init, start, update, finish) are
around it as around its own. On a CPU vLLM packs each linear layer and drops the weight; a head
tied to the embedding is packed once, as the model is loaded, and never again, so it would stay as
it was: it is packed anew here. Layouts of weights are those of a checkpoint.

Tested with vLLM 0.32 on a CPU. vLLM is imported inside functions: it takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BACKEND = "opdctl"


def register_backend() -> str:
    """Make the backend known to vLLM in this process; its name."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    @dataclass
    class Init(WeightTransferInitInfo):
        """Nothing to agree on."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """All weights, by their names in a checkpoint."""

        tensors: dict = field(default_factory=dict)
        path: str = ""

    class Whole(WeightTransferEngine[Init, Update]):
        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info) -> None:
            tensors = update_info.tensors
            if update_info.path:
                from safetensors.torch import load_file

                tensors = load_file(update_info.path)
            self.model.load_weights(iter(tensors.items()))

        def update_weights(self, update_info) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type == "cuda":  # vLLM's own synchronises any device, and CPUs refuse
                import torch

                torch.cuda.synchronize(self.device)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu" and self.model.config.tie_word_embeddings:
                head = self.model.lm_head
                head.weight = self.model.model.embed_tokens.weight
                head.quant_method.process_weights_after_loading(head)

        def shutdown(self) -> None:
            pass

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, Whole)
    return BACKEND


def mask_padding() -> type:
    """The logits processor that gives padded rows of the vocabulary no mass."""
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class MaskPadding(LogitsProcessor):
        def __init__(self, vllm_config, device, is_pin_memory) -> None:
            self.valid_V = vllm_config.additional_config["valid"]

        def apply(self, logits):
            logits[:, self.valid_V :] = -torch.inf
            return logits

        def is_argmax_invariant(self) -> bool:
            return False  # a padded row may be the largest

        def update_state(self, batch_update) -> None:
            pass

    return MaskPadding


def named_weights(model) -> dict:
    """The weights by the names they have in a checkpoint, adapters in them; one of two that are
    tied."""
    from transformers.core_model_loading import revert_weight_conversion

    weights = model.net.state_dict()
    if any(".lora_A." in name for name in weights):
        from opdctl.models.lora import with_adapters

        weights = with_adapters(model)
    found, seen = {}, set()
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            found[name] = tensor.detach()
            seen.add(tensor.data_ptr())
    return revert_weight_conversion(model.net, found)
