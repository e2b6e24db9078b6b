"""The file of tested versions: whole, plain, and what every command of a stranger installs by."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_architecture import ROOT

LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = [line for line in LINES if not line.startswith("#")]
INSTALL = re.compile(r"pip install .*\"torch==.*")


def test_each_line_is_a_name_and_a_version():
    """No index, no path, no range: the file says the same on every machine."""
    plain = re.compile(r"[A-Za-z0-9][\w.-]*==[0-9][\w.]*")
    assert [line for line in PINS if not plain.fullmatch(line)] == []
    names = [canonicalize_name(line.split("==")[0]) for line in PINS]
    assert len(set(names)) == len(names) and not {"torch", "opdctl", "pip"} & set(names)


def test_what_the_package_and_its_tests_need_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {canonicalize_name(n): v for n, v in (line.split("==") for line in PINS)}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for need in map(Requirement, wanted):
        if need.name != "torch":
            assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need


def test_the_commands_install_the_tested_versions_and_newest_does_not():
    lines = {}
    for name in ("README.md", ".ci/run", ".ci/newest"):
        lines[name] = INSTALL.findall((ROOT / name).read_text())
    assert [len(each) for each in lines.values()] == [2, 1, 1]
    for line in lines["README.md"] + lines[".ci/run"]:
        assert "-c constraints.txt" in line
    assert "-c " not in lines[".ci/newest"][0]
    assert len(set(re.findall(r"torch==[\w.]+", str(lines)))) == 1
    assert re.findall(r"triton==[\w.]+", str(lines)) == [p for p in PINS if "triton" in p]
