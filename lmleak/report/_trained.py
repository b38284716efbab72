"""What each defense costs, as a plain table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmleak.report import _words


def print_trained(lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints lines of `runs.utility.summary`: scores with their range over seeds, and the whole training's epsilon."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=10_000)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("defense", "accuracy, %", "MCC, %", "ε of the run", "seeds", "CPU s"):
        table.add_column(column, justify="left" if column == "defense" else "right", no_wrap=True)
    named = _words.labels(line["defense"] for line in lines)
    several = len({_words.key(line["model"]) for line in lines}) > 1
    for line in lines:
        label = named[_words.key(line["defense"])] + (f", {line['model'].get('weights')}" if several else "")
        spent = (line["privacy"] or {}).get("epsilon")
        row = [label, _shown(line["accuracy"]), _shown(line["mcc"]), _words.number(spent), str(len(line["seeds"]))]
        table.add_row(*(Text(_words.visible(value)) for value in (*row, _words.cpu(line["seconds"]))))
    if lines:
        majority = lines[0]["majority"]
        table.add_row("always the commonest label", f"{100 * majority['accuracy']:.1f}", "0.0", "", "", "")
    console.print(table)
    console.print("Means over seeds, with their range in brackets.")
    for words in dict.fromkeys((line["privacy"] or {}).get("statement") for line in lines):
        if words:
            console.print(Text(_words.visible(f"privacy: {words}")))


def _shown(score: Mapping[str, float]) -> str:
    return f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]".replace("-", "−")
