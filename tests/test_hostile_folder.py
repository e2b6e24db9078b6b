"""A command that is started in a folder of somebody else runs no code of that folder."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from opdctl.process import import_path

ROOT = Path(__file__).parents[1]
OWN = {"opdctl", "tests"}
PYTHONS = ("sys.executable", "self.python")


def fill_with_modules(folder):
    """Write a module for every name that Python or a package could import from a folder."""
    names = (set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())) - OWN
    run = f"open({str(folder / 'ran')!r}, 'a').write(__name__ + ' ')\nraise ImportError"
    for name in filter(str.isidentifier, names):
        (folder / f"{name}.py").write_text(run)


def opdctl(folder, *arguments, path=str(ROOT)):
    """Run the program as its console script does, in a folder; return its exit code and output."""
    script = "from opdctl.cli.app import main\nif __name__ == '__main__':\n    main()\n"
    program = folder.parent / "bin" / "opdctl"  # a script's own folder is on the path, not ours
    program.parent.mkdir(exist_ok=True)
    program.write_text(script)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_no_process_of_a_run_imports_from_the_working_directory(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    fill_with_modules(folder)
    shutil.copy(ROOT / "tests" / "demo.yaml", folder / "recipe.yaml")
    code, output = opdctl(folder, "run", "recipe.yaml", "--only", "base", "--out", "run")
    assert code in (0, 75), output
    assert (folder / "run" / "stages" / "base" / "stage.json").exists(), output
    assert not (folder / "ran").exists(), (folder / "ran").read_text()


def test_every_python_that_is_started_is_told_to_leave_it_out():
    commands = [
        [getattr(item, "value", None) for item in node.elts[1:2]]
        for path in (ROOT / "opdctl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) in PYTHONS
    ]
    assert len(commands) >= 4
    assert all(command in (["-P"], ["-I"]) for command in commands)


def test_the_working_directory_leaves_the_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), "/a"])
    monkeypatch.setenv("PYTHONPATH", ":/a:")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    import_path.close_working_directory()
    assert sys.path == ["/a"]
    assert os.environ["PYTHONPATH"] == "/a"
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_working_directory_that_is_named_stays(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/a"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    import_path.close_working_directory()
    assert sys.path == [str(tmp_path), "/a"]


def test_a_checkout_that_is_not_installed_starts_its_workers(monkeypatch):
    monkeypatch.chdir(import_path.ROOT)
    monkeypatch.setattr(sys, "path", [import_path.ROOT, "/a"])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    import_path.close_working_directory()
    assert os.environ["PYTHONPATH"] == import_path.ROOT
    assert sys.path == [import_path.ROOT, "/a"]
