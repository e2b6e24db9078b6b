"""The first prompt of a stage as a person may read it: what the model sees, and what is trained.

Special tokens are shown as they are. Long parts are cut in the middle; ``tokens`` count them whole.
"""

from __future__ import annotations

from typing import Any

from opdctl.types import Rollout

LONGEST = 600  # characters of a part


def example(rollout: Rollout, tokenizer: Any, trained: bool) -> dict[str, Any]:
    """``{domain, tokens, written, trained, parts}``; a part is ``{text, written}``.

    Args:
        trained: whether the stage has a loss on what was written; else it was only sampled.
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
        part["text"] = cut(tokenizer.decode(run, skip_special_tokens=False))
    return {
        "domain": rollout.prompt.domain,
        "tokens": len(request.ids),
        "written": len(places),
        "trained": trained,
        "parts": parts,
    }


def cut(text: str) -> str:
    """A long text without its middle."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} (... {len(text) - 2 * half} characters ...) {text[-half:]}"


def heading(found: dict[str, Any]) -> str:
    """What is shown, in a line."""
    what = "trained on" if found["trained"] else "sampled"
    return (
        f"first prompt, of {found['domain']}: {found['written']} of {found['tokens']} tokens {what}"
    )


def plain(found: dict[str, Any]) -> str:
    """The example without colours: what was written stands in [[ ]]."""
    shown = (f"[[{p['text']}]]" if p["written"] else p["text"] for p in found["parts"])
    return f"{heading(found)}\n{''.join(shown)}"
