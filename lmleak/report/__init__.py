"""One HTML page about one or more runs, and their cells side by side. Reads the store only."""

from __future__ import annotations

from lmleak.report._lines import print_table
from lmleak.report._write import compare, write

__all__ = ["compare", "print_table", "write"]
