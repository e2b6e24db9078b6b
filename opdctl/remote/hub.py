"""Ask the hub, or its cache, for the commit of a public name and whether it is an adapter.

A name alone does not tell. An adapter is fetched into the cache and is a folder from then on, like
any other; a model is left to transformers, which fetches it itself. Without a network both must be
in the cache already.
"""

from __future__ import annotations

import functools

from opdctl.config import references

FILES = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges*",
    "chat_template*",
    "*.model",
)


def commit_of(name: str) -> str:
    """Return the commit of ``org/name@revision`` from the hub, or without a network from its cache;
    empty where neither has it."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    repository, _, revision = name.partition("@")
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{kind}": False for kind in quiet}
    for file in ("config.json", FILES[0]):
        try:
            path = cached_file(repository, file, revision=revision or None, **options)
        except OSError:  # transformers says what is wrong with a name, when it loads it
            path = None
        if path:
            return extract_commit_hash(path, None) or ""
    return ""


@functools.cache
def adapter_of(name: str) -> str:
    """Return the folder of the adapter ``org/name@revision``; empty where it is none, or missing.

    Only files of an adapter and of a tokenizer are fetched.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    repository, _, revision = name.partition("@")
    revision = revision or None
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{kind}": False for kind in quiet}
    try:
        if not cached_file(repository, FILES[0], revision=revision, **options):
            return ""
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=[*FILES, *TOKENIZER_FILES]
        )
    except OSError:  # transformers says what is wrong with a name, when it loads it
        return ""
    return folder if references.is_adapter(folder) else ""
