"""Start a vLLM server that samples for a run on other devices (``runtime.engine=vllm_server``).

    python -m opdctl.rollout.engines._vllm_serve DIR [--port 8000] [any flag of vLLM's server]

DIR is a model of the shape that the stages train: its weights are replaced before the first sample.
What the engine relies on is set here, and so are the routes for weights (VLLM_SERVER_DEV_MODE),
which have no key: the server listens on 127.0.0.1 unless ``--host`` says otherwise. The machine of
the server needs opdctl and the folder ``runtime.engine_share`` of the trainer's.
"""

from __future__ import annotations

import json
import os
import sys

from opdctl.rollout.engines._vllm_parts import BACKEND

PARTS = "opdctl.rollout.engines._vllm_worker"


def arguments(folder: str, flags: list[str]) -> list[str]:
    """The flags of vLLM's server, in which those that are given come last and win."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder).get_vocab().values()
    valid = 1 + max(ids)  # as the trainer counts them: len() would miss ids after a hole
    return [
        *("--model", folder, "--host", "127.0.0.1"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--worker-extension-cls", f"{PARTS}.Extension"),
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        *("--logits-processors", f"{PARTS}:MaskPadding"),
        *("--additional-config", json.dumps({"valid": valid})),
        *flags,
    ]


def main() -> None:
    """Become vLLM's server."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m opdctl.rollout.engines._vllm_serve DIR [flags of vLLM's server]")
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, *arguments(sys.argv[1], sys.argv[2:])]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
