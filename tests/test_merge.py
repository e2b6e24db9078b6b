"""Merged weights by hand, through the command."""

import pytest
import torch

from conftest import make_model
from opdctl.models.model import load, save
from opdctl.run.rundir import RunDir
from running import inside


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    for name, model in (
        *((f"m{i}", make_model(i)) for i in range(3)),
        ("wide", make_model(0, hidden=48)),
        ("other", make_model(0, alphabet="0123456789abcdefghijklmnopqrstuvwxyz =+;")),
    ):
        (folder / name).mkdir()
        save(model, folder / name)
    return folder


def merge(folders, out, *keys):
    return inside(
        *("stage", "merge", "--student", "./m0", "--out", out, "models.a=./m1", *keys), cwd=folders
    )


@pytest.mark.parametrize(
    ("keys", "weights"),
    [
        ((), (0, 1 / 3, 2 / 3)),
        (("method=task_arithmetic", "scale=0.4"), (1 - 0.4 * 3, 0.4, 0.8)),
    ],
)
def test_weights_by_hand(folders, tmp_path, keys, weights):
    done = merge(folders, tmp_path / "run", "models.b={model: ./m2, weight: 2}", *keys)
    assert done.returncode == 0, done.stderr
    merged = load(str(RunDir(tmp_path / "run").output("merge"))).net.state_dict()
    states = [load(str(folders / f"m{i}")).net.state_dict() for i in range(3)]
    for name, value in merged.items():
        expected = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        assert torch.allclose(value.double(), expected, atol=1e-6), name
    assert (merged["model.norm.weight"] != 0).any()


def test_what_cannot_be_merged(folders, tmp_path):
    for model, says in (("wide", "another shape"), ("other", "different tokenizers")):
        done = merge(folders, tmp_path / model, f"models.b=./{model}")
        assert done.returncode != 0 and says in done.stderr, done.stderr
    none = inside("stage", "merge", "--student", "./m0", "--dry-run", cwd=folders)
    assert none.returncode == 2 and "models: {math: stage:t_math}" in none.stderr
