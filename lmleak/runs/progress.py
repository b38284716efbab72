"""What a person sees on stderr while a run works: cells done, time left, the best text so far. Rank 0 only."""

from __future__ import annotations

import shutil
import sys
import time
import unicodedata
from typing import Any

#: Seconds between two plain lines; a log of a night's run stays readable.
_PLAIN_EVERY = 5.0


class Progress:
    """Draws with rich on a terminal, prints a line now and then elsewhere, nothing where `quiet`."""

    def __init__(self, cells: int, units: int, done_cells: int, done_units: int, *, quiet: bool = False):
        self._cells, self._units = cells, units
        self.cells, self.units = done_cells, done_units
        self._at_start, self._start = done_units, time.monotonic()
        self._best: tuple[float, str] = (-1.0, "")
        self._quiet, self._printed = quiet, 0.0
        self._live: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()

    def text(self, text: str) -> None:
        """The attack's best text of the unit at hand."""
        if self._live:
            self._live.update(self._line(text))

    def unit(self, scores: dict[str, float | None] | None, texts: tuple[str, ...]) -> None:
        """A unit of this rank ended."""
        value = next((value for value in (scores or {}).values() if value is not None), None)
        if value is not None and value > self._best[0] and texts:
            self._best = value, texts[0]
        self.draw()

    def draw(self) -> None:
        """Shows the present state, if it is time to."""
        if self._live:
            self._live.update(self._line())
        elif not self._quiet and time.monotonic() - self._printed > _PLAIN_EVERY:
            self._printed = time.monotonic()
            print(self._plain(), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        if self._live:
            self._live.console.print(safe(text), markup=False, highlight=False)
        else:
            print(safe(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Gives the terminal back."""
        if self._live:
            self._live.stop()

    def _line(self, text: str = "") -> Any:
        from rich.text import Text

        return Text(self._plain(text), overflow="ellipsis", no_wrap=True)

    def _plain(self, text: str = "") -> str:
        made = self.units - self._at_start
        left = (time.monotonic() - self._start) / made * (self._units - self.units) if made else None
        parts = [f"{self.cells}/{self._cells} cells", f"{self.units}/{self._units} batches"]
        parts += [f"{_clock(left)} left"] if left is not None and self.units < self._units else []
        if text:
            parts.append(f"now: {safe(text)}")
        elif self._best[1]:
            parts.append(f"best {self._best[0]:.2f}: {safe(self._best[1])}")
        line = "  ".join(parts)
        width = shutil.get_terminal_size((110, 24)).columns - 1
        return line if len(line) <= width else f"{line[: width - 3]}..."


def safe(text: str) -> str:
    """Recovered text may hold terminal commands; control and format characters become a middle dot."""
    return "".join(char if unicodedata.category(char)[0] != "C" else "\u00b7" for char in text)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
