"""Recipes by name: those shipped with the package, and any file by its path."""

from __future__ import annotations

from pathlib import Path

from lmleak.errors import RecipeError, did_you_mean

SUFFIXES = (".yaml", ".yml")


def packaged() -> dict[str, Path]:
    """Name -> file of the recipes that come with lmleak: `lmleak/recipes` when installed, `recipes` in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find(name: str) -> Path:
    """File of a recipe given by path or by name. A path wins over a name.

    Raises:
        RecipeError: neither; the message names the nearest recipe.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = packaged()
    if name in known:
        return known[name]
    if path.is_dir():
        raise RecipeError([f"{name}: is a folder, not a recipe"])
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        beside = [str(path.parent / other.name) for end in SUFFIXES for other in path.parent.glob(f"*{end}")]
        near = did_you_mean(str(path), beside) or did_you_mean(path.stem, known)
        raise RecipeError([f"{name}: no such file{near}"])
    near = did_you_mean(name, known) or f" (there are: {', '.join(known) or 'none'}; or give a path)"
    raise RecipeError([f"{name}: no recipe of this name{near}"])


def summary(path: Path) -> str:
    """First comment line of a recipe: the question it answers."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
