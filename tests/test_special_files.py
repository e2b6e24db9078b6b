"""A pipe or a device in the place of a file is refused, and nothing waits for it."""

import json
import os
import shutil

import pytest

from hostile import command, in_child
from opdctl.config.files import open_regular, read_bytes
from opdctl.recipe.recipe import load
from opdctl.run.launch import new_run

RECIPE = """
name: r
data: {{sums: {{kind: jsonl, path: {path}, eval_share: 0.5}}}}
stages: {{it: {{kind: opd, student: {model}, teachers: {{sums: {model}}}}}}}
"""


def replace(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def answer(*arguments):
    """Return the exit code and the message of a command, or the bound that it met."""
    return in_child(lambda: json.dumps(command(*arguments)), seconds=20)


@pytest.fixture
def recipe(on_disk, tmp_path):
    model = shutil.copytree(on_disk / "s", tmp_path / "model")
    data = tmp_path / "sums.jsonl"
    shutil.copy(on_disk / "sums.jsonl", data)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(path=data, model=model))
    return path


def test_the_same_with_files_is_planned(recipe):
    code, _, err = json.loads(answer("plan", str(recipe)))
    assert code == 0, err


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "sums.jsonl",
        "model/config.json",
        "model/tokenizer.json",
        "model/model.safetensors",
        "model/generation_config.json",
        "model/chat_template.jinja",
    ],
)
def test_an_input_that_is_no_file_is_refused(recipe, name, kind):
    replace(recipe.parent / name, kind)
    code, _, err = json.loads(answer("plan", str(recipe)))
    assert code == 2, err
    assert name.partition("/")[2] in err or "no file" in err or "no recipe" in err


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["run.json", "resolved.yaml", "claims.json", "stages/it/stage.json"]
)
@pytest.mark.parametrize("words", [["status"], ["plan"], ["claims"], ["report"]])
def test_a_record_that_is_no_file_is_not_waited_for(recipe, words, name, kind):
    run = recipe.parent / "run"
    new_run(load(str(recipe)), recipe.read_text(), run)
    replace(run / name, kind)
    code, _, _ = json.loads(answer(*words, str(run)))
    assert code in (0, 2)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"text")
    assert read_bytes(tmp_path / "file") == b"text"
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
