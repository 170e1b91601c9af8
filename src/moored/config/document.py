"""YAML text to plain values with the line of every key, and back: no aliases, no tags.

What the values are for is not known here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from moored.config.section import Key, dotted_key
from moored.utils.errors import UserError

MAX_DEPTH = 20
# YAML 1.2's core schema: `yes`, `on` and 2024-01-01 are text, and 1e-3 is a number.
_RESOLVERS: Sequence[tuple[str, str, list[str]]] = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  replaced, not shared


class _Dumper(yaml.SafeDumper):
    # The same rules both ways, so that the text "1e-3" is quoted and comes back as text.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML would write these line breaks as they are and read them as spaces.
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class Document:
    """Plain values built from YAML, with the line of every key.

    Args:
        file: what its messages call the text.

    Attributes:
        lines: of every key and list entry.
        problems: what is wrong without making the rest unreadable, one line each.
        top_line: of the first value.
    """

    def __init__(self, file: str):
        self.file = file
        self.lines: dict[Key, int] = {}
        self.problems: list[str] = []
        self.top_line = 1

    def parse(self, text: str) -> Any:
        """The values; raises UserError, in one line, for what is not plain YAML."""
        unprintable = _Loader.NON_PRINTABLE.search(text)
        if unprintable:
            line = text.count("\n", 0, unprintable.start()) + 1
            code = ord(unprintable.group())
            raise UserError(f"{self.file}:{line}: not text (the character U+{code:04X}): remove it")
        loader = _Loader(text)
        try:
            # Aliases and tags are refused as events, before anything could be expanded.
            depth = 0
            for event in yaml.parse(text, Loader=_Loader):
                depth += isinstance(event, yaml.CollectionStartEvent)
                depth -= isinstance(event, yaml.CollectionEndEvent)
                self._refuse(event, depth)
            node = loader.get_single_node()
            if node is None:
                return None
            self.top_line = node.start_mark.line + 1
            return self._build(node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            problem = " ".join(str(error.problem or error.context).split())
            if "single document" in str(error.context):
                problem = "a second document starts here: one recipe per file (remove `---`)"
            elif "'\\t'" in problem:
                problem = "a tab indents this line: YAML is indented with spaces"
            raise UserError(f"{self.file}:{line}: not valid YAML: {problem}") from None
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.file}: not valid YAML: {reason}") from None
        finally:
            loader.dispose()

    def _refuse(self, event: yaml.Event, depth: int) -> None:
        mark = event.start_mark
        line = mark.line + 1 if mark else 1
        if depth > MAX_DEPTH:
            raise UserError(f"{self.file}:{line}: nested too deeply to be a recipe")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError(
                f"{self.file}:{line}: anchors and aliases (& and *) are not allowed: "
                "write the value out, or quote it if it is text"
            )
        tag = getattr(event, "tag", None)
        if tag:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(
                f"{self.file}:{line}: the tag {shown} is not allowed: write a plain value, "
                "in quotes if it is text"
            )

    def _build(self, node: yaml.Node, key: Key) -> Any:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            values: list[Any] = []
            for index, child in enumerate(node.value):
                self.lines[(*key, index)] = child.start_mark.line + 1
                values.append(self._build(child, (*key, index)))
            return values
        return self._scalar(node.tag.rpartition(":")[2], str(node.value), line, key)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, child in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.file}:{line}: a key is a plain name, not a structure")
                continue
            name = str(key_node.value)
            here = (*key, name)
            if name in values:
                first = self.lines[here]
                self.problems.append(
                    f"{self.file}:{line}: {dotted_key(here)}: given twice, first on line {first}: "
                    "keep one"
                )
                continue
            self.lines[here] = line
            values[name] = self._build(child, here)
        return values

    def _scalar(self, tag: str, text: str, line: int, key: Key) -> Any:
        if tag == "null":
            return None
        if tag == "bool":
            return text.lower() == "true"
        if tag == "int" and len(text) <= 40:
            return int(text)
        if tag in ("int", "float"):
            lowered = text.lower()
            if lowered.endswith(("inf", "nan")):
                return math.nan if "nan" in lowered else float(lowered.replace(".inf", "inf"))
            return float(text)
        if re.search("[\0\ud800-\udfff]", text):
            self.problems.append(
                f"{self.file}:{line}: {dotted_key(key)}: holds a character that no file can: "
                "remove the \\0 or \\ud800-style escape"
            )
            return ""
        return text


def dump(data: Mapping[str, Any]) -> str:
    """YAML that `read` gives back as the same values."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
