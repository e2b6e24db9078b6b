"""The first prompt of a stage for a person to read: what the model sees and what is trained.

Special tokens are shown as they are. Long parts are cut in the middle; ``tokens`` counts all.
"""

from __future__ import annotations

from typing import Any

from opdctl.types import Rollout

LONGEST = 600  # characters of a part


def build_example(rollout: Rollout, tokenizer: Any, trained: bool) -> dict[str, Any]:
    """Return ``{domain, tokens, written, trained, parts}``; a part is ``{text, written}``.

    Args:
        trained: True if the stage has a loss on the written tokens, False if it only samples them.
    """
    request = rollout.request
    places = set(request.targets)
    parts: list[dict[str, Any]] = []
    ids: list[list[int]] = []
    for place, token in enumerate(request.ids):
        written = place in places
        if not parts or parts[-1]["written"] != written:
            parts.append({"text": "", "written": written})
            ids.append([])
        ids[-1].append(token)
    for part, run in zip(parts, ids, strict=True):
        part["text"] = shorten(tokenizer.decode(run, skip_special_tokens=False))
    return {
        "domain": rollout.prompt.domain,
        "tokens": len(request.ids),
        "written": len(places),
        "trained": trained,
        "parts": parts,
    }


def shorten(text: str) -> str:
    """Cut the middle out of a text longer than ``LONGEST`` characters."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} (... {len(text) - 2 * half} characters ...) {text[-half:]}"


def heading(example: dict[str, Any]) -> str:
    """Return one line that says how many tokens of the example were sampled or trained on."""
    use = "trained on" if example["trained"] else "sampled"
    counts = f"{example['written']} of {example['tokens']} tokens"
    return f"first prompt, of {example['domain']}: {counts} {use}"


def plain_text(example: dict[str, Any]) -> str:
    """Return the example without colours: written tokens stand in [[ ]]."""
    shown = (f"[[{p['text']}]]" if p["written"] else p["text"] for p in example["parts"])
    return f"{heading(example)}\n{''.join(shown)}"
