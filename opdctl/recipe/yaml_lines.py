"""The reader of YAML text: a plain tree, the line of every key, and every duplicate key.

PyYAML alone keeps the last of two equal keys and says nothing. A recipe is text of a stranger: its
size, its depth and what its aliases unfold to are bounded, tags that make objects are refused, and
a leaf is text, a number, true or false, or nothing. A number that two versions of YAML read in two
ways is refused.
"""

from __future__ import annotations

from typing import Any

import yaml

from opdctl.errors import Problem, UsageError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where it is built
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
TAG = "tag:yaml.org,2002:"
MERGE = f"{TAG}merge"
PLAIN = {TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
LONGEST, DEEPEST, MOST = 2**21, 32, 50_000  # characters, levels, values; with aliases unfolded
LONGEST_KEY, LARGEST = 100, 2**63


def parse(text: str, name: str) -> tuple[dict, dict[str, str], list[Problem]]:
    """Return the tree, ``{dotted key: "name:line"}``, and duplicate keys and values not plain.

    Raises:
        UsageError: not YAML, not a mapping at the top, or too much of it.
    """
    tree, lines, problems = _Reader(name).read(text)
    if not isinstance(tree, dict):
        raise UsageError(f"{name}: a recipe is a mapping, with `name:` and `stages:` at the top")
    return tree, lines, problems


def parse_value(text: str) -> Any:
    """Return the value of ``key=value`` as YAML reads it.

    Raises:
        UsageError: not YAML, or not plain values.
    """
    tree, _, problems = _Reader(f"override value {text[:80]!r}").read(text)
    if problems:
        where = f"{problems[0].path}: " if problems[0].path else ""
        raise UsageError(f"override value {text[:80]!r}: {where}{problems[0].message}", "quote it")
    return tree


def dump(tree: Any) -> str:
    """Return the YAML of a plain tree, keys in their order."""
    return yaml.dump(tree, Dumper=DUMPER, sort_keys=False, default_flow_style=False)


class _Reader:
    """A reader of one text."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.nodes = self.characters = 0

    def read(self, text: str) -> tuple[Any, dict[str, str], list[Problem]]:
        if len(text) > LONGEST:
            raise UsageError(f"{self.name}: longer than {LONGEST} characters", "is it a recipe?")
        try:
            text.encode()  # an argument that is not UTF-8 has characters that are none
            self._bound(text)
            self.loader = LOADER(text)
            node = self.loader.get_single_node()
        except UnicodeEncodeError:
            raise UsageError(f"{self.name}: not UTF-8", "write it in UTF-8") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            message = getattr(error, "problem", None) or str(error).split("\n")[0]
            if "maximum nesting" in message:  # PyYAML 6.0.4 scans ahead to a limit of its own
                message = f"{self.name}{line}: nested deeper than {DEEPEST} levels"
                raise UsageError(message) from error
            hint = "quote what YAML reads as its own: a colon, a bracket, a tab"
            raise UsageError(f"{self.name}{line}: not YAML: {message}", hint) from error
        tree = None if node is None else self._node(node, "", (), False)
        return tree, self.lines, self.problems

    def _bound(self, text: str) -> None:
        """Refuse too deep a text, by its events: the composer would call itself for every level."""
        depth = 0
        for event in yaml.parse(text, Loader=LOADER):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                line = event.start_mark.line + 1
                raise UsageError(f"{self.name}:{line}: nested deeper than {DEEPEST} levels")

    def _at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _node(self, node: yaml.Node, path: str, above: tuple[int, ...], merged: bool) -> Any:
        self.nodes += 1
        self.characters += len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        if self.nodes > MOST or self.characters > LONGEST:
            hint = "write less, or a matrix in place of aliases"
            raise UsageError(f"{self._at(node)}: its aliases unfold to too much", hint)
        if id(node) in above:
            self.problems.append(Problem(path, "refers to itself", "", self._at(node)))
            return None
        if node.tag not in PLAIN:
            message = (
                f"a value tagged {node.tag.removeprefix(TAG)!r} is not text, a number or a truth"
            )
            self.problems.append(Problem(path, message, "quote it", self._at(node)))
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above, merged)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                self._place(f"{path}.{i}", item, merged)
                items.append(self._node(item, f"{path}.{i}", above, merged))
            return items
        try:
            value = self.loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            message = getattr(error, "problem", None) or str(error)
            self.problems.append(Problem(path, message, "", self._at(node)))
            return None
        item = path.rpartition(".")[2].isdecimal()
        plain = isinstance(node, yaml.ScalarNode) and not node.style
        if plain and _is_ambiguous(node.value, value, item):
            message = f"{node.value} is {value!r:.40} in one version of YAML, and not in another"
            hint = "write it out, or quote it"
            self.problems.append(Problem(path, message, hint, self._at(node)))
            return None
        if isinstance(value, int) and abs(value) >= LARGEST:
            self.problems.append(Problem(path, "a whole number too large", "", self._at(node)))
            return None
        return value

    def _mapping(self, node, path: str, above: tuple[int, ...], merged: bool) -> dict:
        tree: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                continue
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else ""
            where = f"{path}.{key}" if path else key
            if not key or not key.isprintable() or len(key) > LONGEST_KEY:
                message = f"{key!r:.80}: a key is up to {LONGEST_KEY} printable characters"
                self.problems.append(Problem(path, message, "", self._at(key_node)))
                continue
            if key in tree:
                at = self.lines[where].rpartition(":")[2]
                self.problems.append(
                    Problem(
                        where, f"given twice, first in line {at}", "keep one", self._at(key_node)
                    )
                )
                continue
            self._place(where, key_node, merged)
            tree[key] = self._node(value_node, where, above, merged)
        for value_node in (v for k, v in node.value if k.tag == MERGE):  # own keys win
            below = self._node(value_node, path, above, True)
            for part in below if isinstance(below, list) else [below]:
                if not isinstance(part, dict):
                    hint = "<<: *anchor"
                    place = self._at(value_node)
                    self.problems.append(Problem(path, "<<: takes a mapping", hint, place))
                    continue
                for key, value in part.items():
                    tree.setdefault(key, value)
        return tree

    def _place(self, where: str, node: yaml.Node, merged: bool) -> None:
        """Note the line of a key: its own, before that of one merged in."""
        if merged:
            self.lines.setdefault(where, self._at(node))
        else:
            self.lines[where] = self._at(node)


def _is_ambiguous(text: str, value: Any, item: bool) -> bool:
    """Return True if YAML 1.1, which PyYAML reads, and YAML 1.2 take a plain scalar differently.

    010 is 8 and 1:30 is 90 in YAML 1.1. As an item of a list, ``no`` is false there and a word in
    1.2; as the value of a key of truth it is false to every reader.
    """
    if isinstance(value, bool):
        return item and text.lower() not in ("true", "false")
    if not isinstance(value, int | float):
        return False
    digits = text.lstrip("+-").replace("_", "")
    return ":" in text or (digits.isdecimal() and int(digits) != abs(value))
