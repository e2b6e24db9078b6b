"""YAML text -> plain tree, with the line of every key and every duplicate key.

PyYAML alone keeps the last of two equal keys and says nothing.
"""

from __future__ import annotations

from typing import Any

import yaml

from opdctl.errors import Problem, UsageError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where it is built
MERGE = "tag:yaml.org,2002:merge"
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def parse(text: str, name: str) -> tuple[dict, dict[str, int], list[Problem]]:
    """The tree, ``{dotted key: line}``, and the duplicate keys.

    Raises:
        UsageError: not YAML, or not a mapping at the top.
    """
    loader = LOADER(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UsageError(f"{name}{line}: not YAML: {what}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{name}: a recipe is a mapping, with `name:` and `stages:` at the top")
    lines: dict[str, int] = {}
    problems: list[Problem] = []

    def read(node: yaml.Node, path: str, above: tuple[int, ...]) -> Any:
        if id(node) in above:
            problems.append(Problem(path, "refers to itself", "", f"{name}:{lines.get(path, 1)}"))
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            tree: dict[str, Any] = {}
            merged = [v for k, v in node.value if k.tag == MERGE]
            for key_node, value_node in node.value:
                if key_node.tag == MERGE:
                    continue
                key = str(getattr(key_node, "value", key_node))
                where = f"{path}.{key}" if path else key
                line = key_node.start_mark.line + 1
                if key in tree:
                    problems.append(
                        Problem(
                            where,
                            f"given twice, first in line {lines[where]}",
                            "keep one",
                            f"{name}:{line}",
                        )
                    )
                    continue
                lines[where] = line
                tree[key] = read(value_node, where, above)
            own = {k: v for k, v in lines.items() if k.startswith(path)} if merged else {}
            for value_node in merged:  # <<: *anchor, one level deep: own keys win
                below = read(value_node, path, above)
                for part in below if isinstance(below, list) else [below]:
                    if not isinstance(part, dict):
                        at = f"{name}:{value_node.start_mark.line + 1}"
                        problems.append(Problem(path, "<<: takes a mapping", "<<: *anchor", at))
                        continue
                    for key, value in part.items():
                        tree.setdefault(key, value)
            lines.update(own)
            return tree
        if isinstance(node, yaml.SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                lines[f"{path}.{i}"] = item.start_mark.line + 1
                items.append(read(item, f"{path}.{i}", above))
            return items
        try:
            return loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            what = getattr(error, "problem", None) or str(error)
            problems.append(Problem(path, what, "", f"{name}:{node.start_mark.line + 1}"))
            return None

    return read(node, "", ()), lines, problems


def parse_value(text: str) -> Any:
    """The value of ``key=value`` as YAML reads it.

    Raises:
        UsageError: not YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"override value {text!r} is not YAML", "quote it") from error


def dump(tree: Any) -> str:
    """YAML of a plain tree, keys in their order."""
    return yaml.dump(tree, Dumper=DUMPER, sort_keys=False, default_flow_style=False)
