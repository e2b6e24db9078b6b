"""Public names that are adapters: a name alone does not tell, so the hub or its cache is asked.

An adapter is fetched into the cache and is a folder from then on, like any other; a model is left
to transformers, which fetches it itself. Without a network both must be in the cache already.
"""

from __future__ import annotations

import functools

from opdctl.config import references

FILES = ("adapter_config.json", "adapter_model.safetensors")
SPOKEN = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges*", "chat_template*", "*.model")


def commit_of(name: str) -> str:
    """The commit that ``org/name@revision`` is at, as the hub says, or without a network its cache;
    empty where neither knows."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    repository, _, revision = name.partition("@")
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{what}": False for what in quiet}
    for file in ("config.json", FILES[0]):
        try:
            found = cached_file(repository, file, revision=revision or None, **options)
        except OSError:  # transformers says what is wrong with a name, when it loads it
            found = None
        if found:
            return extract_commit_hash(found, None) or ""
    return ""


@functools.cache
def adapter_of(name: str) -> str:
    """Folder of the adapter that ``org/name@revision`` is; empty if it is none, or not there.

    Only files of an adapter and of a tokenizer are fetched.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    repository, _, revision = name.partition("@")
    revision = revision or None
    quiet = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{what}": False for what in quiet}
    try:
        if not cached_file(repository, FILES[0], revision=revision, **options):
            return ""
        folder = snapshot_download(repository, revision=revision, allow_patterns=[*FILES, *SPOKEN])
    except OSError:  # transformers says what is wrong with a name, when it loads it
        return ""
    return folder if references.is_adapter(folder) else ""
