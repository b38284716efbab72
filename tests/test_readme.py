"""What the README says of the code is derived from the code.

python tests/test_readme.py     rewrites the README's tables
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lmleak import registry

README = Path(__file__).parents[1] / "README.md"
ROOMS = {"attacks": "Attack", "defenses": "Defense", "measures": "Measure, without any attack", "metrics": "Metric"}
TABLE = "<!-- {room}: written by tests/test_readme.py -->\n{body}\n<!-- end -->"


def table(room: str) -> str:
    rows = [f"| {ROOMS[room]} | |", "|---|---|"]
    rows += [f"| `{kind}` | {registry.summary(room, kind)} |" for kind in registry.kinds(room)]
    return TABLE.format(room=room, body="\n".join(rows))


@pytest.mark.parametrize("room", ROOMS)
def test_tables_are_those_of_the_code(room: str) -> None:
    assert table(room) in README.read_text(encoding="utf-8"), "run: python tests/test_readme.py"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "lmleak " in line.split("#")[0]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_its_commands_exist_and_their_overrides_are_valid(words: list[str]) -> None:
    from lmleak.cli import main
    from lmleak.config import cells, load_recipe

    verb, *rest = words[words.index("lmleak") + 1 :]
    assert verb in main.commands
    if verb == "run":
        assert cells(load_recipe(rest[0], rest[1:]))


def test_its_pictures_and_links_are_there() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        assert (README.parent / target).is_file(), target


def _rewrite() -> None:
    text = README.read_text(encoding="utf-8")
    for room in ROOMS:
        pattern = re.escape(TABLE.format(room=room, body="@")).replace("@", ".*?")
        text = re.sub(pattern, lambda _, room=room: table(room), text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _rewrite()
