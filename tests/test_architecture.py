"""The direction of imports and the size of files, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmleak

PACKAGE = Path(lmleak.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = (
    "errors seeds records registry config models data gradients defenses attacks measures metrics utility runs report"
)
ORDER = {name: i for i, name in enumerate([*ROOMS.split(), "_arguments", "cli", "__main__"])}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_rooms_above_it_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    assert path.stem not in ("utils", "util", "common", "core", "base", "helpers")
    if room(path) == "__init__":
        return
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{name}" for name in names]
        for parts in (name.split(".") for name in names):
            if parts[0] == "lmleak" and len(parts) > 1 and parts[1] in ORDER:
                assert ORDER[parts[1]] <= ORDER[room(path)], f"line {node.lineno}: {room(path)} imports {parts[1]}"


def test_every_room_is_in_the_order() -> None:
    assert {room(path) for path in FILES} - {"__init__"} <= set(ORDER)
