"""What a model reference means. One string names a model everywhere:

stage:sft               the output of a stage of this recipe: an edge of the graph
policy                  a frozen copy of the student's own starting point
./folder, /folder       a checkpoint in Hugging Face format
Qwen/Qwen3-1.7B         a public name, with @revision if wanted
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from opdctl.schema import did_you_mean

_PUBLIC = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


@dataclass(frozen=True)
class Reference:
    """A parsed reference.

    Attributes:
        form: stage, policy, folder, public, server or unknown.
        name: the stage, the absolute folder, the public name, the address.
    """

    form: str
    name: str

    def __str__(self) -> str:
        return f"stage:{self.name}" if self.form == "stage" else self.name


def parse(text: str) -> Reference:
    """Never raises: what it cannot read has the form ``unknown``."""
    if text == "policy":
        return Reference("policy", "policy")
    if text.startswith("stage:"):
        return Reference("stage", text[6:])
    if text.startswith(("http://", "https://")):
        return Reference("server", text)
    inside = "/" in text and is_model(str(Path(text).parent))  # model/part is no org/name
    if text.startswith(("./", "../", "/", "~")) or inside or (text and Path(text).is_dir()):
        return Reference("folder", str(Path(text).expanduser().absolute()))
    if _PUBLIC.match(text):
        return Reference("public", text)
    return Reference("unknown", text)


def is_model(folder: str) -> bool:
    """Whether a folder looks like a checkpoint in Hugging Face format."""
    return (Path(folder) / "config.json").is_file()


def written_in(folder: str) -> str:
    """``model``, ``classifier``, or empty: what the config.json of a folder says is in it."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        names = " ".join(config.get("architectures") or [])
    except (OSError, ValueError, AttributeError, TypeError):
        return ""
    return "classifier" if "Classification" in names else "model"


def complaint(
    text: str, stages: list[str], aliases: list[str], folders: bool = True
) -> tuple[str, str] | None:
    """``(message, hint)`` if the reference cannot be followed, else None.

    Args:
        folders: whether folders are looked at; a run that is over may have outlived them.
    """
    ref = parse(text)
    if ref.form == "stage" and ref.name not in stages:
        return f"no stage {ref.name!r}", did_you_mean(ref.name, stages, "stages:")
    if ref.form == "server":
        return (
            f"{text}: a teacher behind a server is not supported yet",
            "use a stage, a folder or a public name",
        )
    if ref.form == "folder" and folders:
        above = str(Path(ref.name).parent)
        hint = f"the model is in {above}" if is_model(above) else ""
        if not Path(ref.name).is_dir():
            otherwise = "a model folder holds config.json and model.safetensors"
            return f"no folder {ref.name}", hint or otherwise
        if not is_model(ref.name):
            otherwise = "name the folder a stage wrote: .../stages/NAME/output"
            return f"{ref.name} has no config.json", hint or otherwise
    if ref.form == "unknown":
        if text in stages:
            return f"{text!r} is not a model reference", f"write stage:{text}"
        return (
            f"{text!r} is not a model reference",
            did_you_mean(text, aliases) if aliases else "write stage:NAME, ./folder or org/name",
        )
    return None


def vocabulary(folder: str) -> dict[str, int] | None:
    """Token -> id of the tokenizer in a folder, read without loading it; None without one."""
    path = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = dict(content["model"]["vocab"])
        for token in content.get("added_tokens", []):
            vocab[token["content"]] = token["id"]
        return vocab
    except (OSError, ValueError, KeyError, TypeError):
        return None


def first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Says where two vocabularies first differ, by id; empty if they are equal."""
    if ours == theirs:
        return ""
    by_id = {v: k for k, v in ours.items()}
    other = {v: k for k, v in theirs.items()}
    for i in sorted(by_id.keys() | other.keys()):
        if by_id.get(i) != other.get(i):
            return f"id {i} is {by_id.get(i)!r} on one side and {other.get(i)!r} on the other"
    return "one token has two ids"


def origin(folder: str) -> dict | None:
    """The stage record of the run that wrote ``.../stages/NAME/output``; None elsewhere."""
    path = Path(folder).parent / "stage.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
