"""Code of a stranger: what a model brings, what an answer or a call says. None of it runs."""

import os
import shutil
import subprocess
import sys

import pytest
from test_hostile_files import config

from opdctl.errors import UsageError
from opdctl.rollout.data.reasoning_gym import ReasoningGym
from opdctl.rollout.environments.calculator import Calculator

REMOTE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
EVIL = "import pathlib\npathlib.Path('canary').touch()\nEvilConfig = Evil = None\n"


def test_code_of_a_model_runs_only_where_a_key_allows_it(good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    config(model_type="evil", auto_map=REMOTE)(folder)
    (folder / "evil.py").write_text(EVIL)
    code = f"""
import os
from opdctl.models.model import load
from opdctl.errors import UsageError
for allowed in (False, True):
    try:
        load({str(folder)!r}, trust_remote_code=allowed)
    except UsageError:
        print(allowed, os.path.exists("canary"))
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "m")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False False", "True True"], done.stderr


ATTACKS = [
    "[__import__('pathlib').Path('{}').touch()]",
    "__import__('pathlib').Path('{}').touch()",
    "[x for x in [open('{}', 'w')]]",
    "(lambda: open('{}', 'w'))()",
]


@pytest.mark.parametrize(
    "task", ["spiral_matrix", "binary_matrix", "string_insertion", "n_queens", "number_sorting",
             "countdown", "puzzle24", "gcd"]
)  # fmt: skip
def test_an_answer_is_never_executed(tmp_path, task):
    data = ReasoningGym(ReasoningGym.Config(kind="reasoning_gym", task=task, items=8), "d", 0)
    canary = tmp_path / "canary"
    for prompt in data.prompts("train"):
        for attack in ATTACKS:
            assert data.score(prompt, attack.format(canary)) == 0.0
        assert data.score(prompt, prompt.answer) == 1.0
    assert not canary.exists()


def test_a_scorer_that_would_execute_an_answer_is_refused():
    for task in ("polynomial_multiplication", "simple_integration", "intermediate_integration"):
        with pytest.raises(UsageError, match="would execute a model's answer"):
            ReasoningGym(ReasoningGym.Config(kind="reasoning_gym", task=task, items=2), "d", 0)
    parts = [{"name": n, "weight": 1, "config": {}} for n in ("gcd", "polynomial_multiplication")]
    keys = ReasoningGym.Config(
        kind="reasoning_gym", task="composite", items=2, config={"datasets": parts}
    )
    with pytest.raises(UsageError, match=r"reasoning-gym refuses|would execute a model's answer"):
        ReasoningGym(keys, "d", 0)


def test_a_call_is_never_executed(tmp_path):
    calculator, canary = Calculator(Calculator.Config()), tmp_path / "canary"
    for attack in [*ATTACKS, "9**9**9**9", "1" * 5000 + "*" + "1" * 5000, "(" * 5000, "1//0"]:
        assert calculator.reply(f"[{attack.format(canary)}]") == "error"
    assert calculator.reply("[2 * (3 + 4)]") == "14" and not canary.exists()
