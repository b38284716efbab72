"""kind -> file, for built-in kinds and for those of other packages."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from lmleak import registry
from lmleak.config import load_recipe
from lmleak.errors import LmleakError

GUEST = '''"""A guest: an attack from another package (Nobody, 2026)."""
from typing import Literal
from pydantic import BaseModel, ConfigDict

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    strength: int = 3
'''


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An entry point `guest` of group lmleak.attacks, as an installed package would bring."""
    (tmp_path / "guest_attack.py").write_text(GUEST)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("guest", "guest_attack", "lmleak.attacks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    yield
    sys.modules.pop("guest_attack", None)


@pytest.mark.parametrize("room", [room for room in registry.ROOMS if room != "measures"])
def test_every_kind_has_a_line_and_a_schema_that_forbids_unknown_fields(room: str) -> None:
    assert registry.kinds(room)
    for kind in registry.kinds(room):
        assert registry.summary(room, kind).endswith("."), kind
        schema = registry.load(room, kind).Config
        assert (schema.model_config["extra"], schema.model_config["frozen"]) == ("forbid", True), kind


def test_private_files_are_not_kinds() -> None:
    assert "_rowspace" not in registry.kinds("attacks")
    with pytest.raises(LmleakError, match="no kind '_rowspace'"):
        registry.load("attacks", "_rowspace")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(LmleakError, match="did you mean 'span'"):
        registry.load("attacks", "spam")
    with pytest.raises(LmleakError, match="did you mean 'attacks'"):
        registry.kinds("atacks")


def test_a_kind_of_another_package_is_listed_without_being_imported(guest: None) -> None:
    assert registry.kinds("attacks")[-1] == "guest"
    assert registry.summary("attacks", "guest").startswith("A guest:")
    assert "guest_attack" not in sys.modules


def test_a_kind_of_another_package_works_in_a_recipe(guest: None) -> None:
    base = {"model": {"kind": "bert", "weights": "random"}, "data": "sample"}
    assert load_recipe(base | {"attack": "guest"}).attack == {"kind": "guest", "strength": 3}
    with pytest.raises(LmleakError, match=r"attack.strenth: unknown key of this block; did you mean 'strength'"):
        load_recipe(base | {"attack": {"kind": "guest", "strenth": 1}})
