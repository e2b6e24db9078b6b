"""The project's front: one version everywhere, and the proof that a change moved no number."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import same
from opdctl import __version__

ROOT = Path(__file__).parent.parent


def test_version_is_printed_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['opdctl', '--version']; "
        "from opdctl.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"opdctl {__version__}\n"), done.stderr


def test_every_file_names_the_same_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert project["version"] == str(citation["version"]) == __version__
    assert changelog.split("\n## ")[1].startswith(f"{__version__} ")
    assert project["license"] == citation["license"] == "Apache-2.0"


def small_run(folder, loss=0.5, weights=b"w", fingerprint="f"):
    """The files of a run with one stage."""
    stage = folder / "stages" / "sft"
    (stage / "output").mkdir(parents=True)
    (stage / "output" / "model.safetensors").write_bytes(weights)
    row = {"step": 1, "attempt": 1, "loss": loss, "seconds": len(folder.name)}
    (stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (stage / "stage.json").write_text(json.dumps({"compute": {"train_tokens": 3}}))
    (folder / "run.json").write_text(json.dumps({"fingerprints": {"sft": fingerprint}}))
    return folder


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({}, 0, "equal: 1 stages\n"),
        ({"loss": 0.25}, 1, "different: sft\n"),
        ({"weights": b"x"}, 1, "different: sft/output/model.safetensors\n"),
        ({"fingerprint": "g"}, 1, "different: fingerprints in run.json\n"),
    ],
)
def test_two_runs_are_compared(change, code, said, tmp_path, capsys):
    before, after = small_run(tmp_path / "before"), small_run(tmp_path / "later", **change)
    assert same.main(before, after) == code
    assert capsys.readouterr().out.startswith(said[:-1])
