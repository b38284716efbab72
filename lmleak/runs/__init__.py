"""Running a recipe and reading what came of it. The same call again is the resume."""

from __future__ import annotations

from lmleak.runs.execute import RunResult, run
from lmleak.runs.results import cell_lines, load_results, read_reconstructions, read_results, rescore, to_json

__all__ = [
    "RunResult",
    "cell_lines",
    "load_results",
    "read_reconstructions",
    "read_results",
    "rescore",
    "run",
    "to_json",
]
