"""Keyword arguments of the Python interface -> a kind's Config, with the recipe's kind of error message."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from lmleak.errors import LmleakError, did_you_mean


def validated(schema: type[BaseModel], fields: dict[str, Any], block: str, error: type[LmleakError]) -> Any:
    """Builds `schema` from `fields`; every fault is named in one `error`, `block.field: what`, with a suggestion."""
    try:
        return schema(**fields)
    except ValidationError as found:
        problems = []
        for fault in found.errors():
            name = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "extra_forbidden":
                hint = did_you_mean(name, schema.model_fields) or f" (there are: {', '.join(schema.model_fields)})"
                problems.append(f"{block}.{name}: unknown field{hint}")
            else:
                given = "" if fault["type"] == "missing" else f", not {fault['input']!r}"
                problems.append(f"{block}.{name}: {fault['msg']}{given}")
        raise error("\n".join(problems)) from None
