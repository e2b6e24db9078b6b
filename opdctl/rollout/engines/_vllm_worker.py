"""What the worker of a vLLM server imports by name: an extension, and a mask of padded rows.

Importing it makes the weight-transfer backend known in that process.
``rollout/engines/_vllm_serve.py`` starts a server with it.
"""

from opdctl.rollout.engines._vllm_parts import mask_padding, register_backend

register_backend()
MaskPadding = mask_padding()


class Extension:
    """Adds nothing to the worker: naming it is what imports this module there."""
