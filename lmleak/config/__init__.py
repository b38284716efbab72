"""Recipes: YAML with places, overrides, sweeps, cells."""

from __future__ import annotations

from lmleak.config.library import find, packaged
from lmleak.config.loading import load_recipe
from lmleak.config.recipe import Recipe
from lmleak.config.sweep import Cell, cells

__all__ = ["Cell", "Recipe", "cells", "find", "load_recipe", "packaged"]
