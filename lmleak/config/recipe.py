"""The recipe: one mapping that says everything a study needs, resolved to plain dicts with every default filled."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr

from lmleak.config.schema import ROOM_OF, Grants, Problem, Select, block, check, short, unknown
from lmleak.config.source import Key, Source, dotted, dump
from lmleak.config.train import read_train
from lmleak.errors import LmleakError, did_you_mean

BLOCKS = ("model", "data", "defense", "attack")
CELL_FIELDS = ("model", "data", "train", "select", "defense", "attack", "metrics", "measures", "knowledge", "seed")
FIELDS = (*CELL_FIELDS, "sweep", "controls", "utility", "name")
#: what a study can be measured against; `lmleak.runs.controls` does them
CONTROLS = ("wrong_update", "no_gradient", "replay")
METRICS = ("rouge", "token_accuracy", "exact_match")


class Recipe(BaseModel):
    """A validated recipe. Make one with `load_recipe`; each block holds `kind` and all fields of that kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: dict[str, Any]
    train: dict[str, Any] | None = None  #: what the model is trained on first
    data: dict[str, Any]
    select: dict[str, Any]
    defense: dict[str, Any]
    attack: dict[str, Any]
    metrics: list[dict[str, Any]]
    measures: list[dict[str, Any]] = []  #: of the release, before any attack
    knowledge: dict[str, Any]
    seed: int
    sweep: list[dict[str, list[Any]]] = []  #: products of axes; their union is the set of cells
    controls: list[str] = []  #: of CONTROLS; each adds a cell beside every cell
    utility: dict[str, Any] | None = None  #: what `lmleak utility` trains; no cell's result depends on it

    _source: Source | None = PrivateAttr(None)

    @property
    def id(self) -> str:
        """12 hex digits that change whenever anything that can change a result does. The name is not such a thing."""
        return digest(self._said({"name", "utility"} | (set() if self.controls else {"controls"})))

    def _said(self, left_out: set[str]) -> dict[str, Any]:
        """Its fields; one that a recipe may lack is not among them where it does."""
        return self.model_dump(exclude=left_out | (set() if self.train else {"train"}))

    def place(self, *key: str | int) -> str:
        """Where a key stands: `path:line:col`, or the override that set it."""
        return self._source.place(key) if self._source else self.name

    def __eq__(self, other: object) -> bool:
        """Equal where everything it says is equal, wherever it was read from."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    def has(self, key: Key) -> bool:
        """Whether the recipe's text has this very key."""
        return self._source is not None and key in self._source.places

    def explain(self, error: LmleakError, field: str) -> str:
        """Puts a place before the message of an error that another room raised about block `field`.

        It is the place of the value that the message names, in the block or in a sweep over it; else the block's own.
        """
        message, inside = str(error), (field,)
        # Messages often open with the field they are about: `model.weights: ...`, `layers: ...`.
        opening = re.match(r"(\w+(?:\.\w+)*): ", message)
        if opening:
            path = tuple(opening[1].removeprefix(f"{field}.").split("."))
            if path[0] in Select.model_fields if field == "select" else opening[1].startswith(f"{field}."):
                inside, message = (field, *path), message[opening.end() :]
        named = []
        for key, value, real in self._leaves(field):
            found = re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.]*\w)", message)
            if found and real[: len(inside)] == inside:
                named.append((found.start(), -len(found[0]), key))
        # The first value that is named is the one at fault; suggestions and what there is come after it.
        key = min(named, key=lambda one: one[:2])[2] if named else inside
        return f"{self.place(*key)}: {dotted(key)}: {message}"

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
        fields = self._said({"sweep"} if self.utility else {"sweep", "utility"})
        if self.sweep:
            fields["sweep"] = self.sweep[0] if len(self.sweep) == 1 else self.sweep
        return dump(fields)

    def _leaves(self, field: str) -> Iterator[tuple[Key, Any, Key]]:
        """Strings and numbers of a block and of sweeps over it: key in the text, value, key in the block."""
        source = self._source
        if source is None:
            return
        for key in source.places:
            value = source.value
            for part in key:
                value = value[part]
            real = key
            if key and key[0] == "sweep":
                at = next((i for i, part in enumerate(key[1:], 1) if isinstance(part, str)), len(key))
                real = (*str(key[at]).split("."), *key[at + 2 :]) if at < len(key) else ()
            if real[:1] == (field,) and isinstance(value, str | int) and str(value):
                yield key, value, real


def digest(value: Any) -> str:
    """First 12 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def expand(data: Mapping[str, Any]) -> dict[str, Any]:
    """Writes short forms out: `attack: span` is `attack: {kind: span}`, and a block left out is its default."""
    out = {"defense": {"kind": "none"}, "select": {}, "knowledge": {}, "metrics": list(METRICS), "seed": 0, **data}
    out.setdefault("measures", [])
    for name in BLOCKS:
        if isinstance(out.get(name), str):
            out[name] = {"kind": out[name]}
    for name in ("metrics", "measures"):
        if isinstance(out[name], str | Mapping):
            out[name] = [out[name]]
        if isinstance(out[name], list):
            out[name] = [{"kind": item} if isinstance(item, str) else item for item in out[name]]
    return out


def resolve(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Validates everything but `sweep`.

    Args:
        data: an expanded recipe.

    Returns:
        the fields with all defaults, and every problem found.
    """
    problems = [Problem((key,), unknown(key, list(FIELDS), "a recipe"), "key") for key in data if key not in FIELDS]
    out: dict[str, Any] = {}
    for name in BLOCKS:
        if name not in data:
            problems.append(Problem((name,), "is missing"))
            continue
        out[name], found = block(ROOM_OF[name], data[name], (name,))
        problems += found
    for name, schema in (("select", Select), ("knowledge", Grants)):
        if not isinstance(data[name], Mapping):
            problems.append(Problem((name,), f"should be a mapping, not {short(data[name])}"))
            continue
        out[name], found = check(schema, data[name], (name,))
        problems += found
    if data.get("train") is not None:
        out["train"], found = read_train(data["train"])
        problems += found
    for name in ("metrics", "measures"):
        out[name], found = _several(name, data[name])
        problems += found
    out["seed"] = data["seed"]
    if type(out["seed"]) is not int or not 0 <= out["seed"] < 2**63:
        problems.append(Problem(("seed",), f"should be a whole number from 0 on, not {short(out['seed'])}"))
    return out, problems


def read_controls(raw: Any) -> tuple[list[str], list[Problem]]:
    """Names of controls, each once; one name may stand without its list."""
    if raw is None:
        return [], []
    names = [raw] if isinstance(raw, str) else raw
    if not isinstance(names, list):
        return [], [Problem(("controls",), f"should be a list of {', '.join(CONTROLS)}, not {short(raw)}")]
    problems = []
    for i, name in enumerate(names):
        key = ("controls",) if isinstance(raw, str) else ("controls", i)
        if name not in CONTROLS:
            near = did_you_mean(str(name), CONTROLS) or f" (there are: {', '.join(CONTROLS)})"
            problems.append(Problem(key, f"no control {short(name)}{near}"))
        elif name in names[:i]:
            problems.append(Problem(key, f"'{name}' is given twice"))
    return names, problems


def check_name(name: Any) -> list[Problem]:
    """The name becomes part of a folder's name."""
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        return []
    return [Problem(("name",), f"should be letters, digits, '_', '-' and '.', not {short(name)}")]


def _several(name: str, raw: Any) -> tuple[list[dict[str, Any]], list[Problem]]:
    if not isinstance(raw, list) or (name == "metrics" and not raw):
        return [], [Problem((name,), f"should be a list of {name}, not {short(raw)}")]
    out: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for i, item in enumerate(raw):
        made, found = block(name, item, (name, i))
        problems += found
        if not found and made in out:
            problems.append(Problem((name, i), f"'{made['kind']}' is given twice"))
        out.append(made)
    return out, problems
