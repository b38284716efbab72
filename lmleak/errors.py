"""Errors a user can act on: each names the place and the way out. Standard library only.

The command line prints `str(error)` and exits with `error.exit_code`; a traceback appears only under LMLEAK_DEBUG=1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmleakError(Exception):
    """Bad input of any kind: raised before anything ran, so nothing is lost. Catch this one to catch them all."""

    exit_code = 2


class RecipeError(LmleakError):
    """A recipe or an override is wrong. `problems` holds one `path:line:col: dotted.key: what` line for each fault."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class SelectionError(LmleakError):
    """A pattern, layer or component selects nothing, or something that cannot be observed on its own."""


class ModelError(LmleakError):
    """The model, its weights or its tokenizer cannot be had, or do not fit together."""


class DataError(LmleakError):
    """The data cannot be read, is empty, or its labels do not fit the task."""


class RunError(LmleakError):
    """A run folder is in use, belongs to another recipe, or is damaged."""


class MissingExtra(LmleakError):
    """An optional dependency is not installed; the message says `pip install 'lmleak[NAME]'`."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest known word, or the empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
