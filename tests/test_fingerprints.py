"""The fingerprints of the shipped recipes are those of runs that people have."""

import hashlib
import json

import pytest

from opdctl.recipe.recipe import load
from opdctl.recipe.source import shipped
from opdctl.run.fingerprint import fingerprints

# Of all stages, with every option on. A change of one of these makes finished runs stale: it is
# meant where a revision was raised, or a number in a recipe changed, and a mistake elsewhere.
RECORDED = {
    "deepseek_v4": {
        "tiny": "4b73cd3443e5d7ff",
        "small": "1fd85854b222f296",
        "lab": "6dbb77d6969ac4f9",
    },
    "glm5": {"tiny": "8acbca2d62f54495", "small": "a236d0c09aa7c802", "lab": "7d0243bd4b030b3a"},
    "mimo": {"tiny": "004f422e4cb17092", "small": "da7e878a3c608c40", "lab": "6dfce8c586d5f496"},
    "qwen3": {"tiny": "cc69a1d4b55ce1e8", "small": "581ea3fdf1e8dd85", "lab": "ffb6524e87ed4977"},
    "sparse_to_dense": {
        "tiny": "4e0d9c2918cc9dca",
        "small": "e4611d4ead5b4956",
        "lab": "7a885a972f87919e",
    },
    "thinking_machines": {
        "tiny": "178f0a96b55fe719",
        "small": "f963d8141ff8bcfa",
        "lab": "d98f8d63a32dbfe3",
    },
}


def test_every_shipped_recipe_is_recorded():
    assert set(RECORDED) == set(shipped())


@pytest.mark.parametrize("size", ["tiny", "small", "lab"])
@pytest.mark.parametrize("name", sorted(RECORDED))
def test_fingerprints_stay(name, size):
    options = tuple(f"{option}=true" for option in load(name).options)
    prints = fingerprints(load(name, size=size, overrides=options))
    text = json.dumps(prints, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == RECORDED[name][size]
