"""`compare`: each cell's own line with the run and a paired difference beside it, and the table for people."""

from __future__ import annotations

import io
from pathlib import Path

import folders
import pytest

from lmleak import report
from lmleak.runs import results

DP = {"kind": "dp_sgd", "noise_multiplier": 0.01, "max_grad_norm": 1.0, "clip_scope": "model", "delta": 1e-5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = folders.recipe({"select.layers": [[0], [1]], "defense": [DP, {"kind": "none"}]})

    def level(axes, batch):
        # Batches differ much, settings by 0.2 throughout: only a paired interval sees that.
        return ("ok", (0.2 if axes["defense"]["kind"] == "none" else 0.0) + 0.07 * batch, None)

    return folders.write(tmp_path / "run", made, level, 10)


def test_lines_are_the_cells_own(folder: Path) -> None:
    lines = report.compare([folder])
    assert [{k: v for k, v in line.items() if k not in ("run", "difference")} for line in lines] == list(
        results.cell_lines(folder)
    )
    assert {line["run"] for line in lines} == {"run"}


def test_difference_is_to_the_undefended_twin_and_paired(folder: Path) -> None:
    lines = report.compare([folder])
    for defended, plain in (lines[0:2], lines[2:4]):
        assert plain["difference"] is None
        assert defended["difference"]["to"] == plain["cell"]
        found = defended["difference"]["scores"]["rouge1"]
        assert found["mean"] == pytest.approx(-0.2)
        assert found["high"] - found["low"] < 1e-9
        assert found["n"] == 10


def test_difference_reaches_across_runs(tmp_path: Path) -> None:
    plain = folders.write(tmp_path / "a", folders.recipe({}), lambda axes, batch: ("ok", 0.9, None), 4)
    other = folders.write(tmp_path / "b", folders.recipe({}, defense=DP), lambda axes, batch: ("ok", 0.4, None), 4)
    lines = report.compare([plain, other])
    assert lines[1]["difference"]["run"] == "a"
    assert lines[1]["difference"]["scores"]["rouge1"]["mean"] == pytest.approx(-0.5)


def test_table_is_plain_where_no_terminal_reads_it(folder: Path) -> None:
    text = io.StringIO()
    report.print_table(report.compare([folder]), text)
    lines = [line for line in text.getvalue().splitlines() if "DP-SGD" in line or "no defense" in line]
    assert "\x1b" not in text.getvalue()
    assert len(lines) == 4
    assert "−20 [−20, −20]" in text.getvalue()


def test_table_of_nothing_and_of_failures(tmp_path: Path) -> None:
    text = io.StringIO()
    report.print_table([], text)
    failed = folders.write(
        tmp_path / "run", folders.recipe({}), lambda axes, batch: ("failed", None, "boom [red]x[/]"), 2
    )
    report.print_table(report.compare([failed]), text)
    assert "no cells" in text.getvalue()
    assert "boom [red]x[/]" in text.getvalue()
