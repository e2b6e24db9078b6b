"""The project's front: the version is one number everywhere."""

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from opdctl import __version__

ROOT = Path(__file__).parent.parent


def test_version_is_printed_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['opdctl', '--version']; "
        "from opdctl.cli import main; main()"
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
