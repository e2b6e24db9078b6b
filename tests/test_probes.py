"""What is asked whether it has an attribute: things of others, and nothing of our own.

A key or a hook that only some have is declared with a neutral value on the base of its family
(``config/settings.py``, ``protocols.py``), so whoever reads it need not ask. What is left is listed
here by file; a new file, or one more in a file, needs a reason.
"""

import ast
from pathlib import Path

import pytest

from opdctl.config.registry import member, shipped
from opdctl.config.schema import role_of, to_dict
from opdctl.config.settings import (
    ControllerConfig,
    ObjectiveConfig,
    SignalConfig,
    SourceConfig,
    StageConfig,
)

PACKAGE = Path(__file__).parent.parent / "opdctl"

# File -> how many times it asks, and of what.
PROBES = {
    "checks/preflight/template.py": (1, "a hint names a key if the stage kind has it"),
    "cli/catalogue.py": (1, "members that opdctl chooses itself have no keys"),
    "config/member_files.py": (4, "a stranger's class, before it is known to fit"),
    "config/schema.py": (4, "any dataclass is a Config: there is no base"),
    "models/chat/control_tokens.py": (1, "any dataclass is a Config: data of one's own too"),
    "models/chat/ends.py": (1, "generation configs of transformers"),
    "models/chat/rendering.py": (2, "tokenizers and generation configs of transformers"),
    "models/chat/templating.py": (5, "tokenizers of transformers"),
    "models/export.py": (1, "models of transformers"),
    "models/extrapolation.py": (1, "layers of peft"),
    "models/gradient_checkpointing.py": (1, "models of transformers, by version"),
    "models/hidden_layers.py": (1, "outputs of transformers"),
    "models/logits_check.py": (3, "configs of transformers"),
    "models/lora.py": (6, "models of transformers, layers and configs of peft"),
    "models/merging.py": (3, "layers of peft"),
    "models/model.py": (5, "models of transformers"),
    "models/weights_check.py": (1, "models of transformers"),
    "process/worker.py": (1, "any exception"),
    "recipe/graph.py": (1, "claims have no base"),
    "recipe/recipe.py": (1, "members that opdctl chooses itself have no keys"),
    "recipe/room.py": (2, "prompts of a stage, and environments, of two kinds"),
    "recipe/resolution.py": (1, "exceptions of omegaconf"),
    "recipe/yaml_lines.py": (5, "yaml as it was built, and its exceptions"),
    "remote/endpoint.py": (1, "exceptions of urllib"),
    "rollout/data/hf.py": (1, "columns of datasets"),
    "rollout/data/reasoning_gym.py": (1, "data sets of reasoning-gym"),
    "stages/opd.py": (2, "a hint names a key if the member has it"),
    "train/assemble.py": (2, "keys that weights and sources may have, to replace or to count"),
}


def asks(node):
    """True for ``hasattr``, ``has_key`` and a ``getattr`` with a default."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    name = node.func.id
    return name in ("hasattr", "has_key") or (name == "getattr" and len(node.args) == 3)


def test_only_things_of_others_are_asked_what_they_have():
    counted = {}
    for path in PACKAGE.rglob("*.py"):
        lines = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if asks(n)]
        if lines:
            counted[path.relative_to(PACKAGE).as_posix()] = lines
    more = {
        f"opdctl/{file}: lines {lines}, {PROBES.get(file, (0,))[0]} listed"
        for file, lines in counted.items()
        if len(lines) > PROBES.get(file, (0, ""))[0]
    }
    assert not more, "declare it on the base of its family, or list it with a reason"
    assert not PROBES.keys() - counted.keys()  # a line that is no longer needed


BASES = {
    "stages": StageConfig,
    "sources": SourceConfig,
    "controllers": ControllerConfig,
    "signals": SignalConfig,
    "objectives": ObjectiveConfig,
}


def test_the_keys_of_every_member_inherit_the_neutral_values_of_its_family():
    for family, base in BASES.items():
        for name in shipped(family):
            assert issubclass(member(family, name).Config, base), f"{family}/{name}"


def test_a_neutral_value_is_no_key():
    merge = member("stages", "merge").Config(kind="merge", student="a")
    assert merge.optim is None and merge.prompts is None and merge.sampling is None
    assert (merge.steps, merge.epochs, merge.minibatches) == (0, 1, 1)
    assert not merge.lora.rank and not merge.teachers and not merge.sources
    assert to_dict(merge).keys() == {"kind", "student", "models", "method", "scale"}
    assert role_of(merge, "optim.lr") == "semantic"
    with pytest.raises(TypeError):
        StageConfig.sources["mixture"] = {}  # all stages share it
