"""The import rules and the size budget, read from the syntax trees."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from opdctl.config import registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opdctl"
FILES = sorted(PACKAGE.rglob("*.py"))
FAMILIES = tuple(f for f in registry.FAMILIES if f not in ("stages", "claims"))


def name_of(path):
    return str(path.relative_to(PACKAGE))


def imports(path, top_only=False):
    """(module, line) of every import; at module level only if asked."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)


def offenders(files, forbidden, top_only=False):
    return [
        f"{name_of(f)}:{line} imports {module}"
        for f in files
        for module, line in imports(f, top_only)
        if module.split(".")[0] in forbidden or module in forbidden
    ]


def outside(*allowed):
    return [f for f in FILES if not any(name_of(f).startswith(a) for a in allowed)]


def test_heavy_libraries_stay_in_their_place():
    assert not offenders(outside("console.py"), {"rich"})
    assert not offenders(outside("cli.py"), {"typer"})
    assert not offenders(outside("resolution.py"), {"omegaconf"})
    assert not offenders(outside("data/"), {"datasets", "pyarrow"})
    assert not offenders(FILES, {"vllm", "peft"}, top_only=True)
    assert not offenders(outside("nets/"), {"peft"})


def test_modules_that_declare_a_config_import_no_torch():
    heavy = {"torch", "transformers", "numpy", "reasoning_gym", "math_verify", "datasets"}
    marks = ("class Config", "\n    revision = ")  # every stage kind and every member
    declaring = [f for f in outside("core/") if any(m in f.read_text() for m in marks)]
    assert len(declaring) > 25
    assert not offenders(declaring, heavy, top_only=True)
    top = [f for f in PACKAGE.glob("*.py") if f.name not in ("warm.py", "__main__.py")]
    assert not offenders(top, heavy, top_only=True)


def test_imports_point_down():
    stages = {f"opdctl.{f}" for f in (*FAMILIES, "stages")}

    def below(files, forbidden):
        return [
            f"{name_of(f)}:{line} imports {module}"
            for f in files
            for module, line in imports(f)
            if any(module == p or module.startswith(p + ".") for p in forbidden)
        ]

    kernels = [f for f in FILES if name_of(f).startswith("kernels/")]
    upper = {f"opdctl.{f.stem}" for f in PACKAGE.glob("*.py") if f.stem != "errors"}
    assert len(kernels) > 5 and not below(kernels, stages | upper | {"opdctl.core"})
    core = [f for f in FILES if name_of(f).startswith("core/")]
    assert not below(core, stages)
    for family in FAMILIES:
        own = [f for f in FILES if name_of(f).startswith(family + "/")]
        assert not below(own, stages - {f"opdctl.{family}"})
    stage_files = [f for f in FILES if name_of(f).startswith("stages/")]
    assert not below(stage_files, stages - {"opdctl.stages"})
    low = [PACKAGE / n for n in ("errors.py", "types.py", "schema.py", "settings.py")]
    upper = ("recipe", "plan", "rundir", "console", "report", "verdicts", "cli", "runner", "worker")
    assert not below(low, {f"opdctl.{n}" for n in (*upper, "core", "stages")})
    middle = [PACKAGE / n for n in ("recipe.py", "plan.py", "rundir.py", "registry.py")]
    assert not below(middle, {f"opdctl.{n}" for n in upper[3:]})


def test_each_duty_stands_in_one_place():
    def using(*words):
        return {name_of(f) for f in FILES for w in words if w in f.read_text()}

    assert using("index_add_", "prediction_N = ", "prediction_N=") == {"models/packing.py"}
    assert using("clamp(min=1)") == {"train/update.py"}  # divides by a count of tokens
    assert using("save_file(") == {"train/checkpoint.py"}
    writers = {
        "rundir.py",
        "report.py",
        "catalogue.py",
        "train/checkpoint.py",
        "train/loop.py",
        "train/metrics.py",
        "train/wal.py",
    }
    assert using(".write_text(", '"w"', '"a+b"', "'w'") <= writers


def test_nothing_of_a_stranger_is_unpickled_or_executed():
    assert not offenders(FILES, {"pickle", "dill", "joblib", "marshal", "shelve"})
    calls = [
        (name_of(f), node.func)
        for f in FILES
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.Call)
    ]
    names = {(f, c.id) for f, c in calls if isinstance(c, ast.Name)}
    attributes = {(f, c.attr) for f, c in calls if isinstance(c, ast.Attribute)}
    assert not {(f, n) for f, n in names if n in ("eval", "exec", "compile", "__import__")}
    assert not {(f, n) for f, n in attributes if n in ("system", "popen", "unsafe_load")}
    assert not [f for f in FILES if "torch.load(" in f.read_text()]


def test_size_budget():
    sizes = {name_of(f): len(f.read_text().splitlines()) for f in FILES}
    assert max(sizes.values()) <= 400, max(sizes, key=sizes.get)
    assert statistics.median(sizes.values()) <= 120
    assert sum(name.count("/") == 0 or name.startswith("core/") for name in sizes) <= 50
    assert not [n for n in sizes if Path(n).stem in ("utils", "helpers", "common")]
    text = "".join(f.read_text() for f in FILES)
    assert text.isascii()


BLOCKED = "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None; "


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["ls"],
        ["ls", "recipes"],
        ["ls", "stages"],
        ["ls", "methods"],
        ["show", "opd"],
        ["show", "mimo"],
        ["plan", "recipes/mimo.yaml"],
        ["validate", "recipes/mimo.yaml"],
        ["plan", "mimo", "--json"],
        ["run", "mimo", "--dry-run"],
    ],
)
def test_read_commands_run_with_torch_blocked(command):
    code = BLOCKED + f"sys.argv = {['opdctl', *command]!r}; from opdctl.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
