"""Reads and writes YAML 1.2 core scalars with the line and column of every key. No tags, no code, no silent duplicates.

PyYAML does the syntax; the values are made here, because its own constructor follows YAML 1.1 (`no` is False, `1e-4` a
string, `12:30` a number in base 60) and lets the second of two equal keys win.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from lmleak.errors import RecipeError

Key = tuple[str | int, ...]

MAX_VALUES = 100_000  # a recipe has tens; aliases of aliases reach 10^9 in a ten-line file

_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Source:
    """A YAML document as plain Python values, and where each key and list entry stands."""

    name: str  #: path as the user wrote it, or another name for error messages
    value: Any
    places: Mapping[Key, str] = field(default_factory=dict)  #: key path -> "path:line:col"

    def place(self, key: Key) -> str:
        """Place of `key`, or of the nearest key around it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.places.get((), self.name)


def dotted(key: Key) -> str:
    """`("sweep", 0, "select.layers")` -> `sweep.0.select.layers`."""
    return ".".join(str(part) for part in key)


def scalar(text: str) -> Any:
    """Value of a plain YAML 1.2 core scalar: None, bool, int, float or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def parse(text: str, name: str, *, only_place: str | None = None) -> Source:
    """Parses one YAML document.

    Args:
        text: the document.
        name: stands before line and column in messages.
        only_place: stands in place of `name:line:col`, for text that is not a file (an override).

    Raises:
        RecipeError: syntax, duplicate keys, tags, merge keys, several documents; all that can be told at once.
    """
    reader = _Reader(text, name, only_place)
    try:
        node = yaml.compose(text, Loader=_Composer)
        value = None if node is None else reader.value(node, ())
    except yaml.MarkedYAMLError as error:
        place = reader.place(error.problem_mark or error.context_mark)
        what = error.problem or error.context or "not YAML"
        what = "only one document is allowed" if "single document" in str(error.context) else what
        raise RecipeError([f"{place}: not valid YAML: {what}"]) from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{only_place or name}: not valid YAML: {str(error).splitlines()[0]}"]) from error
    except RecursionError as error:
        raise RecipeError([f"{only_place or name}: nested too deeply"]) from error
    if reader.problems:
        raise RecipeError(reader.problems)
    return Source(name, value, reader.places)


def read(path: Path, name: str | None = None) -> Source:
    """Parses a file.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, or `parse` refuses it.
    """
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError([f"{name}: not UTF-8 text: {error.reason} at byte {error.start}"]) from error
    except OSError as error:
        raise RecipeError([f"{name}: {error.strerror or error}"]) from error
    return parse(text, name)


def dump(value: Any) -> str:
    """YAML that `parse` reads back to the same value: strings that YAML 1.2 takes for something else are quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to the node graph. `resolve` is asked only where the document gives no tag, so a tag shows itself."""

    def __init__(self, stream: str):
        Reader.__init__(self, stream)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is ScalarNode:
            return "plain" if implicit[0] else "quoted"
        return "seq" if kind is SequenceNode else "map"


class _Reader:
    """Nodes -> values, with places and problems gathered on the way."""

    def __init__(self, text: str, name: str, only_place: str | None):
        self.name, self.only_place = name, only_place
        self.places: dict[Key, str] = {}
        self.problems: list[str] = []
        self.open: set[int] = set()
        self.count = 0

    def place(self, mark: yaml.Mark | None) -> str:
        if self.only_place or mark is None:
            return self.only_place or self.name
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"

    def wrong(self, node: Node, key: Key, what: str) -> None:
        at = f"{dotted(key)}: " if key else ""
        self.problems.append(f"{self.place(node.start_mark)}: {at}{what}")

    def value(self, node: Node, key: Key) -> Any:
        self.places.setdefault(key, self.place(node.start_mark))
        self.count += 1
        if self.count > MAX_VALUES:
            raise RecipeError([f"{self.place(node.start_mark)}: more than {MAX_VALUES} values; aliases of aliases?"])
        if id(node) in self.open:
            self.wrong(node, key, "an alias may not stand inside its own anchor")
            return None
        if node.tag not in ("plain", "quoted", "seq", "map"):
            self.wrong(node, key, f"tags such as '{node.tag}' are not allowed")
            return None
        if isinstance(node, ScalarNode):
            return self.scalar(node, key)
        self.open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, key)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: ScalarNode, key: Key) -> Any:
        if node.tag == "quoted":
            return node.value
        try:
            return scalar(node.value)
        except ValueError:  # Python refuses integers of more than 4,300 digits
            self.wrong(node, key, f"a number of {len(node.value)} digits is too long")
            return None

    def mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, yaml.Mark] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, ScalarNode) or name_node.tag not in ("plain", "quoted"):
                self.wrong(name_node, key, "a key must be a plain word")
                continue
            name = name_node.value
            inner = (*key, name)
            if name == "<<":
                self.wrong(name_node, inner, "merge keys are not part of YAML 1.2; write the fields out")
                continue
            if name in first:
                again = f"duplicate key, already given at {self.place(first[name])}"
                self.wrong(name_node, inner, again)
                continue
            first[name] = name_node.start_mark
            self.places[inner] = self.place(name_node.start_mark)
            out[name] = self.value(value_node, inner)
        return out


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> ScalarNode:
    style = None if isinstance(scalar(value), str) and value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
