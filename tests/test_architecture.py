"""The rules of the layout, read from the syntax trees: wings, duties, sizes."""

import ast
import functools
import graphlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from opdctl.config import registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opdctl"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(PACKAGE))


@functools.cache
def tree_of(path):
    """A file's syntax tree, and all nodes of it."""
    tree = ast.parse(path.read_text())
    return tree, list(ast.walk(tree))


@functools.cache
def imports(path, top_only=False):
    """(module, line) of every import; at module level only if asked."""
    tree, nodes = tree_of(path)
    return list(imports_among(tree.body if top_only else nodes))


def imports_among(nodes):
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
    assert not offenders(outside("cli/console.py"), {"rich"})
    assert not offenders(outside("cli/app.py", "cli/file_commands.py", "cli/options.py"), {"typer"})
    assert not offenders(outside("recipe/resolution.py"), {"omegaconf"})
    assert not offenders(outside("rollout/data/"), {"datasets", "pyarrow"})
    assert not offenders(FILES, {"vllm", "peft"}, top_only=True)
    assert not offenders(outside("models/"), {"peft"})


def test_modules_that_declare_a_config_import_no_torch():
    heavy = {"torch", "transformers", "numpy", "reasoning_gym", "math_verify", "datasets"}
    marks = ("class Config", "\n    revision = ")  # every stage kind and every member
    declaring = [f for f in FILES if any(m in f.read_text() for m in marks)]
    assert len(declaring) > 25
    assert not offenders(declaring, heavy, top_only=True)
    light = [f for f in FILES if wing_of(module_of(f)) in LIGHT and f.name != "warm.py"]
    assert len(light) > 30
    assert not offenders(light, heavy, top_only=True)


# A wing is a folder of the package, or a module beside them; an import goes to a lower rank or
# stays in its own. A new wing gets a line here.
RANKS = {
    "types": 0,
    "errors": 0,
    "draws": 0,  # numpy only: what is random is a hash of its name
    "intervals": 0,
    "protocols": 0,
    "config": 1,
    "kernels": 1,
    "recipe": 2,
    "estimate": 2,
    "remote": 2,
    "run": 3,
    "models": 4,
    "evidence": 4,
    "scoring": 5,
    "rollout": 5,
    "loss": 6,
    "train": 7,
    "stages": 8,
    "checks": 8,
    "process": 9,
    "cli": 10,
    "__main__": 10,
}
LIGHT = {
    "types",
    "errors",
    "protocols",
    "config",
    "recipe",
    "estimate",
    "remote",
    "run",
    "process",
    "cli",
}
FUNCTION_LINES = 60


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def wing_of(module):
    return module.split(".")[0]


@functools.cache
def import_graph():
    """Module -> modules of the package it imports, at any depth of its code."""
    modules = {module_of(f): f for f in FILES if f != PACKAGE / "__init__.py"}
    return {
        name: {m.removeprefix("opdctl.") for m, _ in imports(f)} & modules.keys() - {name}
        for name, f in modules.items()
    }


def test_every_module_has_a_wing_and_imports_point_down():
    graph = import_graph()
    assert len(graph) > 200
    assert {wing_of(module) for module in graph} == RANKS.keys()
    upward = [
        f"{module} imports {imported}"
        for module, names in graph.items()
        for imported in sorted(names)
        if RANKS[wing_of(imported)] > RANKS[wing_of(module)]
    ]
    assert not upward


def test_no_circle_of_files():
    graphlib.TopologicalSorter(import_graph()).prepare()  # raises CycleError and names the circle


def test_members_are_reached_through_the_registry():
    folders = {f: folder.replace("/", ".") + "." for f, folder in registry.FOLDERS.items()}
    direct = [
        f"{module} imports {imported}"
        for module, names in import_graph().items()
        for family, folder in folders.items()
        for imported in sorted(names)
        if imported.startswith(folder)
        and not module.startswith((folder, "cli.skeletons."))  # a skeleton becomes a member
        # what a check looks at is shared with whoever runs checks: the rest of the wing, a worker
        and not (family == "preflight" and wing_of(module) in ("checks", "process", "cli"))
    ]
    assert not direct


def test_each_duty_stands_in_one_place():
    def using(*words):
        return {name_of(f) for f in FILES for w in words if w in f.read_text()}

    assert using("index_add_", "prediction_N = ", "prediction_N=") == {"models/packing.py"}
    assert using("clamp(min=1)") == {"train/update.py"}  # divides by a count of tokens
    assert using("save_file(") == {"models/tensor_file.py"}
    writers = {
        "run/rundir.py",
        "cli/report.py",
        "cli/catalogue.py",
        "cli/new.py",
        "process/streams.py",  # the null device
        "train/checkpoint.py",
        "train/metrics.py",
        "train/wal.py",
    }
    assert using(".write_text(", '"w"', '"a+b"', "'w'") <= writers


def test_no_function_is_longer_than_a_screen():
    long = [
        f"{name_of(f)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for f in FILES
        for node in tree_of(f)[1]
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert not long


def test_nothing_of_a_stranger_is_unpickled_or_executed():
    assert not offenders(FILES, {"pickle", "dill", "joblib", "marshal", "shelve"})
    calls = [
        (name_of(f), node.func)
        for f in FILES
        for node in tree_of(f)[1]
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
    entries = {name.split("/")[0] for name in sizes}
    assert len(entries) <= 23, sorted(entries)  # wings, and __init__ and __main__
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
    code = BLOCKED + f"sys.argv = {['opdctl', *command]!r}; from opdctl.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
