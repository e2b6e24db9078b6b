"""The module that a vLLM server's worker imports by name: an extension and a logits mask.

Importing it registers the weight-transfer backend in that process.
``rollout/engines/_vllm_serve.py`` starts a server with it.
"""

from opdctl.rollout.engines._vllm_plugins import mask_padding, register_backend

register_backend()
MaskPadding = mask_padding()


class Extension:
    """An extension that adds nothing to the worker: naming it makes vLLM import this module."""
