"""The meaning of a model reference. One string names a model everywhere:

stage:sft               the output of a stage of this recipe: an edge of the graph
policy                  a frozen copy of the student's own starting point
./folder, /folder       a checkpoint in Hugging Face format
Qwen/Qwen3-1.7B         a public name, with @revision if wanted
http://host:8000        a teacher behind a server, with #NAME if it serves several
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from opdctl.config.files import open_regular, read_bytes, read_text
from opdctl.config.schema import did_you_mean

LONGEST = 1000  # characters; a longer one is no path
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
BESIDE = "base_in_run.json"  # in an adapter's folder
LARGEST_HEADER = 100_000_000  # bytes, as in safetensors itself
SIZES = ("_size", "_dim", "heads", "layers", "n_layer", "n_head", "n_embd", "n_inner", "experts")
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
    """Parse a reference without raising: one it cannot read has the form ``unknown``."""
    if len(text) > LONGEST or not text.isprintable():
        return Reference("unknown", text)
    if text == "policy":
        return Reference("policy", "policy")
    if text.startswith("stage:"):
        return Reference("stage", text[6:])
    if text.startswith(("http://", "https://")):
        return Reference("server", text)
    inside = "/" in text and is_model(str(Path(text).parent))  # model/part is no org/name
    if text.startswith(("./", "../", "/", "~")) or inside or os.path.isdir(text):
        return Reference("folder", str(Path(os.path.expanduser(text)).absolute()))
    if _PUBLIC.match(text):
        return Reference("public", text)
    return Reference("unknown", text)


def folder_complaint(folder: str) -> tuple[str, str] | None:
    """Return ``(message, hint)`` if a model folder cannot be what it says, else None.

    Reads config.json and the headers of the weights, and allocates nothing: a config that describes
    more than the weights hold never gets as far as a model.
    """
    place = Path(folder)
    hint = f"the model is in {place.parent}" if is_model(str(place.parent)) else ""
    if not os.path.isdir(folder):
        otherwise = "a model folder holds config.json and model.safetensors"
        return f"no folder {folder}", hint or otherwise
    special = [p for p in _files(place) if not (p.is_file() or p.is_dir())]
    if special and special[0].name != "config.json":
        return f"cannot read {special[0]}: a pipe, a device or a broken link", "remove it"
    if is_adapter(folder):
        return _unfounded(folder)
    if not is_model(folder):
        otherwise = "name the folder a stage wrote: .../stages/NAME/output"
        return f"{folder} has no config.json", hint or otherwise
    weights = sorted(place.glob("*.safetensors"))
    if not weights:
        hint = "save it again with safetensors: a pickle would run code, and is not read"
        return f"{folder} has no .safetensors file", hint
    if os.path.isfile(place / "adapter_config.json"):  # transformers would take the adapter's base
        hint = "keep adapter_config.json and adapter_model.safetensors in a folder of their own"
        return f"{folder} holds the weights of a model and an adapter", hint
    hint = "a file was cut short, or belongs to another model"
    path = place / "config.json"
    try:
        config = _json(read_bytes(path))
        shapes = []
        for path in weights:
            shapes += shapes_in(path)
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot read {path}: {error!s:.200}", hint
    numbers = sum(map(math.prod, shapes))
    for name, value in _sizes(config):
        if value > (len(shapes) if name in LAYERS else numbers):
            message = f"says {name}: {value}, more than the weights beside it hold"
            return f"{place / 'config.json'} {message}", hint
    return None


def _files(place: Path) -> list[Path]:
    """Return what is in a folder; nothing of one that cannot be listed."""
    try:
        return sorted(place.iterdir())
    except OSError:
        return []


def _json(content: bytes) -> dict:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def shapes_in(path: Path) -> list[list[int]]:
    """Return the shapes of the tensors in a safetensors file, from its header.

    Raises:
        OSError, ValueError: it cannot be read, or is shorter than its header says.
    """
    size = path.stat().st_size - 8
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size, LARGEST_HEADER):
            raise ValueError("not safetensors")
        header = _json(file.read(length))
    header.pop("__metadata__", None)
    shapes, end = [], 0
    for tensor in header.values():
        try:
            shapes.append([int(n) for n in tensor["shape"]])
            end = max(end, int(tensor["data_offsets"][1]))
        except (TypeError, KeyError, IndexError):
            raise ValueError("not safetensors") from None
    if length + end != size:
        raise ValueError(f"{size + 8} bytes, and its header says {length + end + 8}")
    return shapes


def _sizes(config: dict):
    """Every whole number of a config that is the size of something, at any depth."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif isinstance(value, int) and name.endswith(SIZES):
            yield name, value


def address(text: str) -> tuple[str, str]:
    """Split ``http://host:8000#NAME`` into the address and the name of a served model or ""."""
    base, _, name = text.partition("#")
    return base.rstrip("/").removesuffix("/v1"), name


def is_model(folder: str) -> bool:
    """Return True for a folder that looks like a checkpoint in Hugging Face format."""
    return os.path.isfile(Path(folder) / "config.json")


def is_adapter(folder: str) -> bool:
    """Return True for a folder that holds an adapter of peft and no weights of a model."""
    place = Path(folder)
    if not os.path.isfile(place / "adapter_config.json") or any(place.glob("model*.safetensors")):
        return False
    return not is_model(folder) or os.path.isfile(place / "adapter_model.safetensors")


def is_there(folder: str) -> bool:
    """Return True for a folder that holds a model, or an adapter whose base exists."""
    base = base_of(folder)
    return is_model(base or folder) or parse(base).form == "public"


def base_of(folder: str) -> str:
    """Return the base of an adapter, a folder or a public name; empty for a whole model.

    A folder of the same run is looked for first, where it stood from the adapter; others beside the
    adapter, then from the working directory.
    """
    if not is_adapter(folder):
        return ""
    try:
        way = json.loads(read_text(Path(folder) / BESIDE))["path"]
        if is_model(str(Path(folder, way))):
            return str(Path(folder, way).resolve())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # only a stage writes it, and only of a base of its run
    try:
        config = json.loads(read_text(Path(folder) / "adapter_config.json"))
        name, revision = str(config["base_model_name_or_path"]), config.get("revision")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return str(Path(folder) / "adapter_config.json")  # names none: refused as a base
    for place in (Path(folder, name), Path(os.path.expanduser(name))):
        if os.path.isdir(place):
            return str(place.resolve())
    return f"{name}@{revision}" if revision else name


def _unfounded(folder: str) -> tuple[str, str] | None:
    """Return ``(message, hint)`` if an adapter's base cannot be what its configuration says."""
    base, hint = base_of(folder), "base_model_name_or_path in adapter_config.json names its base"
    if os.path.isdir(base):
        if not is_model(base):
            wrong = "has no config.json: an adapter stands on a whole model"
            return f"{folder} is an adapter, and its base {base} {wrong}", hint
        return folder_complaint(base) or _broken(Path(folder, "adapter_model.safetensors"))
    if parse(base).form == "public":
        return _broken(Path(folder, "adapter_model.safetensors"))
    if base == str(Path(folder, "adapter_config.json")):
        return f"{folder} is an adapter, and {base} names no base", hint
    return f"{folder} is an adapter, and its base {base} is not there", hint


def _broken(weights: Path) -> tuple[str, str] | None:
    try:
        shapes_in(weights)
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot read {weights}: {error!s:.200}", "a file is missing or was cut short"
    return None


def written_in(folder: str) -> str:
    """Return ``model``, ``classifier`` or empty, as the config.json of a folder says."""
    if is_adapter(folder):
        folder = base_of(folder)
        if not Path(folder).is_dir():
            return "model"  # a public name
    try:
        config = json.loads(read_text(Path(folder) / "config.json"))
        names = " ".join(config.get("architectures") or [])
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return ""
    return "classifier" if "Classification" in names else "model"


def complaint(
    text: str, stages: list[str], aliases: list[str], folders: bool = True
) -> tuple[str, str] | None:
    """Return ``(message, hint)`` if the reference cannot be followed, else None.

    Args:
        folders: whether folders are looked at; a run that is over may have outlived them.
    """
    ref = parse(text)
    if ref.form == "stage" and ref.name not in stages:
        return f"no stage {ref.name!r}", did_you_mean(ref.name, stages, "stages:")
    if ref.form == "folder" and folders:
        return folder_complaint(ref.name)
    if ref.form == "unknown":
        if text in stages:
            return f"{text!r:.80} is not a model reference", f"write stage:{text}"
        return (
            f"{text!r:.80} is not a model reference",
            did_you_mean(text, aliases) if aliases else "write stage:NAME, ./folder or org/name",
        )
    return None


def vocabulary(folder: str) -> dict[str, int] | None:
    """Return ``{token: id}`` of the tokenizer in a folder, without loading it; None without one."""
    path = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(read_text(path))
        vocab = dict(content["model"]["vocab"])
        for token in content.get("added_tokens", []):
            vocab[token["content"]] = token["id"]
        return vocab
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """Describe where two vocabularies first differ, by id; empty if they are equal."""
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
        return _json(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        return None
