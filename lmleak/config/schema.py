"""Schemas of a recipe's blocks: `select` and `knowledge` are fixed, a `{kind: ...}` block is its kind's own Config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lmleak import registry
from lmleak.config.source import Key
from lmleak.errors import LmleakError, did_you_mean

ROOM_OF = {"model": "models", "data": "data", "defense": "defenses", "attack": "attacks"}


MAX_LAYERS = 10_000  # an upper bound on what a range may fill memory with


class Problem(NamedTuple):
    """One fault: where in the recipe, what, and whether the key itself or its value is at fault."""

    key: Key
    what: str
    about: Literal["key", "value"] = "value"


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


_RANGE = re.compile(r"\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*")


def _layers(value: Any) -> tuple[int | str, ...]:
    """`3`, `"3-5"`, `"-3--1"` or `"3-5,7"` -> block indices; a range such as `"3--1"` waits for the model's depth."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    out: list[int | str] = []
    for part in value.split(",") if isinstance(value, str) else [""]:
        match = _RANGE.fullmatch(part)
        if not match:
            shown = repr(value) if isinstance(value, str) else short(value)
            raise ValueError(f"{shown} is not a layer: write 0, -1 for the last, '3-5' or '0,3-5'")
        first, last = int(match[1]), int(match[2] if match[2] is not None else match[1])
        if (first < 0) != (last < 0):
            out.append(f"{first}-{last}")
        elif last < first:
            raise ValueError(f"'{part.strip()}' runs backwards; did you mean '{last}-{first}'?")
        elif last - first > MAX_LAYERS:
            raise ValueError(f"'{part.strip()}' is a range of {last - first + 1} layers")
        else:
            out += range(first, last + 1)
    return tuple(out)


def _flat(value: list[tuple[int | str, ...]]) -> list[int | str]:
    """Each once and in order, so that `[1, 0]` and `"0-1"` are the same cell."""
    return sorted({layer for part in value for layer in part}, key=lambda layer: (isinstance(layer, str), layer))


Names = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)]


class Select(BaseModel):
    """Which modules' gradients are observed. Nothing given means all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_modules: str | list[str] | None = None  #: string: regex or all / all-linear; list: names, suffixes, globs
    exclude_modules: str | list[str] = []
    layers: (
        Annotated[
            list[Annotated[Any, BeforeValidator(_layers)]],
            BeforeValidator(_as_list),
            Field(min_length=1),
            AfterValidator(_flat),
        ]
        | None
    ) = None
    components: Annotated[Names, Field(min_length=1)] | None = None
    parameters: Literal["all", "weight", "bias"] = "all"


class Grants(BaseModel):
    """What the threat model grants beyond weights, tokenizer and batch size (records.Knowledge holds the values)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: bool = False
    lengths: bool = False
    special_tokens: bool = True
    bn_statistics: bool = False


def check(schema: type[BaseModel], fields: Mapping[str, Any], key: Key) -> tuple[dict[str, Any], list[Problem]]:
    """Validates `fields` by `schema`, strictly: `limit: "5"` is an error, not 5.

    Returns:
        the fields with defaults filled, and the problems with keys below `key`.
    """
    try:
        # By way of JSON, because strict Python mode refuses a list where the schema says tuple.
        made = schema.model_validate_json(json.dumps(fields, default=str), strict=True)
        return made.model_dump(mode="json"), []
    except ValidationError as error:
        return dict(fields), _problems(error, schema, fields, key)
    except LmleakError as error:
        return dict(fields), [Problem(key, str(error))]


def block(room: str, raw: Any, key: Key) -> tuple[dict[str, Any], list[Problem]]:
    """Resolves a `{kind: ...}` block by the kind's Config."""
    if not isinstance(raw, Mapping):
        return {}, [Problem(key, f"should be a kind or a mapping with a kind, not {short(raw)}")]
    kind = raw.get("kind")
    if not isinstance(kind, str):
        what = "is missing" if kind is None else f"should be a name, not {short(kind)}"
        return {}, [Problem((*key, "kind"), f"{what} (there are: {', '.join(registry.kinds(room))})")]
    resolved, problems = _resolved(room, json.dumps(raw, default=str))
    return dict(resolved), [problem._replace(key=(*key, *problem.key)) for problem in problems]


@lru_cache(4096)
def _resolved(room: str, raw: str) -> tuple[dict[str, Any], list[Problem]]:
    """Cached, because a 1,000-cell sweep repeats a handful of blocks."""
    fields = json.loads(raw)
    kind = fields.pop("kind")
    try:
        schema = registry.load(room, kind).Config
    except LmleakError as error:
        return {}, [Problem(("kind",), str(error))]
    except ImportError as error:
        return {}, [Problem(("kind",), f"'{kind}' cannot be imported: {error}")]
    made, problems = check(schema, fields, ())
    return {"kind": kind, **made}, problems


def compact(room: str, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved block without the fields that have their default value: what a table shows."""
    kind, fields = resolved["kind"], {k: v for k, v in resolved.items() if k != "kind"}
    defaults = registry.load(room, kind).Config.model_fields
    return {"kind": kind} | {k: v for k, v in fields.items() if defaults[k].get_default(call_default_factory=True) != v}


def short(value: Any) -> str:
    """A value as JSON, cut to a length that fits a message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown(name: str, known: list[str], what: str) -> str:
    """`unknown key`, with the nearest known one, or all of them where none is near."""
    near = did_you_mean(name, known)
    return f"unknown key of {what}{near}" if near else f"unknown key of {what} (keys: {', '.join(known) or 'none'})"


def _problems(error: ValidationError, schema: type[BaseModel], fields: Mapping[str, Any], key: Key) -> list[Problem]:
    found: dict[Key, Problem] = {}
    for fault in error.errors(include_url=False):
        loc = _real(fault["loc"], fields)
        inner = (*key, *loc)
        if fault["type"] == "extra_forbidden":
            inner = (*key, *fault["loc"])
            known = list(schema.model_fields)
            found[inner] = Problem(inner, unknown(str(fault["loc"][-1]), known, "this block"), "key")
        elif fault["type"] == "missing":
            inner = (*key, *fault["loc"])
            found[inner] = Problem(inner, "is missing")
        elif inner in found:  # the other arms of a union
            before = found[inner]
            found[inner] = before._replace(what=f"{before.what}; or {_what(fault)}")
        else:
            found[inner] = Problem(inner, _what(fault))
    return list(found.values())


def _real(loc: tuple[str | int, ...], fields: Any) -> tuple[str | int, ...]:
    """The part of a pydantic location that exists in the recipe: pydantic adds the names of union arms."""
    out: list[str | int] = []
    for part in loc:
        try:
            fields = fields[part]
        except (KeyError, IndexError, TypeError):
            break
        out.append(part)
    return tuple(out)


def _what(fault: Mapping[str, Any]) -> str:
    text = fault["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if fault["type"] == "value_error":
        return text
    if fault["type"] == "string_type" and isinstance(fault["input"], int | float):
        return f"{text}, not {short(fault['input'])}; put it in quotes"
    near = ""
    if fault["type"] == "literal_error":
        near = did_you_mean(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
    return f"{text}, not {short(fault['input'])}{near}"
