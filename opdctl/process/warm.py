"""The modules that the fork server imports once, so that a stage starts in a tenth of a second.

Only the server process imports this module. It starts no thread and makes no CUDA call: forking
would not be safe otherwise.
"""

import contextlib
import os
import threading

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import reasoning_gym  # noqa: F401
import torch
import tqdm
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401

from opdctl.config.registry import FAMILIES, member, shipped

for family in FAMILIES:
    for name in shipped(family):  # one's own are imported in the stage: they may do anything
        member(family, name)

with contextlib.suppress(ImportError):  # a table that every load of a model would build again
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen3")

# Forked stages must not share tqdm's process lock: they end without Python's clean-up.
tqdm.tqdm.set_lock(threading.RLock())
assert not torch.cuda.is_initialized(), "a forked CUDA context cannot be used"
