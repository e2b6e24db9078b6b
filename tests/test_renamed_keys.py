"""Keys by their old names: read as the new ones, said once, and finished stages stay finished."""

import re

import pytest

from hostile import command
from opdctl.config.schema import with_role
from opdctl.errors import RecipeError
from opdctl.recipe.recipe import load
from opdctl.run.launch import read_recipe, reopen
from opdctl.run.plan import fingerprints, plan
from opdctl.run.rundir import RunDir
from running import DEMO, inside

OLD = {
    "watchdogs": "watch",
    "rollout_batch": "wave",
    "master_weights": "masters",
    "epochs": "updates_per_rollout",
}
NEW_KEYS = ("stages.t_math.epochs=2", "runtime.rollout_batch=7", "stages.sft.watchdogs.kl.most=3")
OLD_KEYS = (
    "stages.t_math.updates_per_rollout=2",
    "runtime.wave=7",
    "stages.sft.watch.kl.most=3",
)


def test_an_old_name_means_the_new_one():
    new, old = (load(str(DEMO), overrides=keys) for keys in (NEW_KEYS, OLD_KEYS))
    assert new.to_dict() == old.to_dict() and fingerprints(new) == fingerprints(old)
    assert new.stages["t_math"].epochs == 2 and new.runtime.rollout_batch == 7
    assert old.stages["sft"].watchdogs["kl"].most == 3
    assert sorted(str(note) for note in old.notes()) == [
        "runtime.wave: is called rollout_batch now",
        "stages.sft.watch: is called watchdogs now",
        "stages.t_math.updates_per_rollout: is called epochs now",
    ]
    assert not new.notes()


def test_the_later_of_both_names_counts():
    for first, second in (("wave", "rollout_batch"), ("rollout_batch", "wave")):
        keys = (f"runtime.{first}=3", f"runtime.{second}=5")
        assert load(str(DEMO), overrides=keys).runtime.rollout_batch == 5
    keys = ("stages.sft.watch.kl.most=3", "stages.sft.watchdogs.kl.action=stop")
    dog = load(str(DEMO), overrides=keys).stages["sft"].watchdogs["kl"]
    assert (dog.most, dog.action) == (3, "stop")


def test_a_problem_names_the_key_as_it_was_written():
    with pytest.raises(RecipeError, match=r"stages\.sft\.watch\.kl\.least"):
        load(str(DEMO), overrides=("stages.sft.watch.kl.least=1",))
    with pytest.raises(RecipeError, match=r"runtime\.wave: 0 is below 1"):
        load(str(DEMO), overrides=("runtime.wave=0",))


def test_fingerprints_hash_the_old_names():
    recipe = load(str(DEMO), overrides=("runtime.master_weights=float32",))
    assert with_role(recipe.runtime, "semantic")["masters"] == "float32"
    assert "updates_per_rollout" in with_role(recipe.stages["t_math"], "semantic")


def test_the_command_says_so_once(tmp_path):
    code, _, err = command("plan", DEMO, "runtime.wave=7")
    assert code == 0
    code, _, err = command("run", DEMO, "runtime.wave=7", "--dry-run")
    assert code == 0 and err.count("is called rollout_batch now") == 1


def test_a_run_of_before_is_read_and_its_stages_are_done(tmp_path):
    folder = tmp_path / "run"
    assert inside("run", DEMO, "--only", "t_math", "--out", folder).returncode == 0
    run, path = RunDir(folder), folder / "resolved.yaml"
    text = path.read_text()
    for new, old in OLD.items():
        text, count = re.subn(rf"^(\s*){new}:", rf"\1{old}:", text, flags=re.M)
        assert count
    path.write_text(text)  # as the program wrote it before the keys were renamed
    actions = {p.name: p.action for p in plan(read_recipe(run), run)}
    assert {actions[name] for name in ("base", "sft", "t_math")} == {"skip"}
    recipe, changes = reopen(run, ("runtime.wave=9", "stages.sft.watchdogs.kl.most=2"))
    assert recipe.runtime.rollout_batch == 9 and len(changes) == 2
    assert not recipe.notes(), "what the program wrote is not held against anyone"
