"""Rank 0's view of the whole run, whoever does the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmleak.runs import folder as folders
from lmleak.runs import plan, store
from lmleak.runs.progress import Progress
from lmleak.runs.results import cell_line, to_json


@dataclass(frozen=True)
class RunResult:
    """How a run ended. A path-like object: `Path(run(...))` is the run folder."""

    path: Path
    status: str  #: done, failed (some unit), interrupted
    cells: int
    units: int  #: of all cells
    ran: int  #: units of this start; the others were done before
    failed: int  #: units

    @property
    def exit_code(self) -> int:
        """0 all done, 1 something failed, 130 interrupted."""
        return {"done": 0, "failed": 1}.get(self.status, 130)

    def __fspath__(self) -> str:
        return str(self.path)


class Watch:
    """Follows every rank's lines and prints cells as they are done."""

    def __init__(
        self,
        place: Path,
        facts: dict[str, Any],
        done: dict[tuple[str, int], dict[str, Any]],
        left: Sequence[plan.Unit],
        json_lines: bool,
        quiet: bool,
    ):
        self.place, self.facts, self.lines, self._json = place, facts, dict(done), json_lines
        self._cells = {cell["id"]: cell for cell in facts["cells"]}
        self._left: dict[str, set[int]] = {cell: set() for cell in self._cells}
        for unit in left:
            self._left[facts["cells"][unit.cell]["id"]].add(unit.batch)
        self._tail = store.Tail(place)
        self._tail.poll()
        self.units, self.ran = sum(cell["batches"] for cell in facts["cells"]), 0
        complete = [cell for cell, batches in self._left.items() if not batches]
        self.progress = Progress(len(self._cells), self.units, len(complete), self.units - len(left), quiet=quiet)
        for cell in complete:
            self._emit(cell)

    def poll(self) -> None:
        """Takes in what any rank has finished."""
        for line in self._tail.poll():
            cell, batch = line["cell"], line["batch"]
            waiting = self._left.get(cell, set())
            if batch not in waiting:
                continue
            waiting.discard(batch)
            self.lines[cell, batch] = line
            self.ran += 1
            self.progress.units += 1
            if line["status"] == "failed":
                self.progress.say(f"cell {cell} batch {batch} failed: {line['reason']}")
            if not waiting:
                self.progress.cells += 1
                self._emit(cell)

    def end(self, interrupted: bool) -> RunResult:
        """Closes run.json."""
        self.poll()
        failed = sum(line["status"] == "failed" for line in self.lines.values())
        missing = sum(map(len, self._left.values()))
        status = "interrupted" if interrupted else "failed" if failed or missing else "done"
        folders.write_facts(self.place, {**self.facts, "status": status, "finished": store.now()})
        self.progress.say(f"{status}: {self.progress.cells} of {len(self._cells)} cells, {failed} batches failed")
        self.progress.close()
        return RunResult(self.place, status, len(self._cells), self.units, self.ran, failed)

    def _emit(self, cell: str) -> None:
        if self._json:
            entry = self._cells[cell]
            units = [self.lines[cell, batch] for batch in range(entry["batches"])]
            print(to_json(cell_line(entry, self.facts, units)), flush=True)
