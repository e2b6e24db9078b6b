"""Start a vLLM server that samples for a run on other devices (``runtime.engine=vllm_server``).

    python -m opdctl.rollout.engines._vllm_serve DIR [--port 8000] [any flag of vLLM's server]

DIR is a model of the shape that the stages train: its weights are replaced before the first sample.
This sets the flags that the engine relies on and opens the routes for weights
(VLLM_SERVER_DEV_MODE), which need no key: so the server listens on 127.0.0.1 unless ``--host`` says
otherwise. The server's machine needs opdctl and the trainer's folder ``runtime.engine_share``.
"""

from __future__ import annotations

import json
import os
import sys

from opdctl.rollout.engines._vllm_plugins import BACKEND

WORKER = "opdctl.rollout.engines._vllm_worker"


def arguments(folder: str, flags: list[str]) -> list[str]:
    """Return the flags of vLLM's server; the user's own come last and win."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder).get_vocab().values()
    valid = 1 + max(ids)  # as the trainer counts them: len() would miss ids after a hole
    return [
        *("--model", folder, "--host", "127.0.0.1"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--worker-extension-cls", f"{WORKER}.Extension"),
        *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
        *("--logits-processors", f"{WORKER}:MaskPadding"),
        *("--additional-config", json.dumps({"valid": valid})),
        *flags,
    ]


def main() -> None:
    """Replace this process by vLLM's server."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m opdctl.rollout.engines._vllm_serve DIR [flags of vLLM's server]")
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-P", "-m", module, *arguments(sys.argv[1], sys.argv[2:])]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
