"""`compare`: each cell's own line with the run and a paired difference beside it, and the table for people."""

from __future__ import annotations

import io
import json
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


def test_controls_give_gains_paired_by_batch(tmp_path: Path) -> None:
    made = folders.recipe({"select.layers": [[0]], "control": ["none", "wrong_update", "no_gradient", "replay"]})

    def level(axes, batch):
        if axes["control"] == "no_gradient":
            return ("no_signal", None, "its spectrum has no edge")
        return ("ok", {"none": 0.9, "wrong_update": 0.3}.get(axes["control"]), None)

    folder = folders.write(tmp_path / "run", made, level, 4)
    path = folder / "results-0.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["status"] == "no_signal":  # a refusal brought nothing back
            line["guess"] = dict.fromkeys(("rouge1", "exact_match"), 0.0)
        if line["cell"].endswith("3"):
            line |= {"scores": None, "details": {"replay": {"unexplained": 2e-13}}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    own, *controls = report.compare([folder])
    assert own["gain"]["wrong_update"]["scores"]["rouge1"]["mean"] == pytest.approx(0.6)
    assert own["gain"]["no_gradient"]["scores"]["rouge1"] == {"mean": 0.9, "low": 0.9, "high": 0.9, "n": 4}
    assert own["gain"]["no_gradient"]["status"] == "no_signal"
    assert not any("gain" in line for line in controls)
    text = io.StringIO()
    report.print_table([own, *controls], text)
    assert "exact_match over wrong_update" in text.getvalue()
    assert "at the true input unexplained 2e-13" in text.getvalue()


def test_a_cell_answered_in_part_is_shown_by_all_its_batches(tmp_path: Path) -> None:
    level = lambda axes, batch: ("ok", 1.0, None) if batch else ("budget_exhausted", None, "late")  # noqa: E731
    folder = folders.write(tmp_path / "run", folders.recipe({}), level, 4)
    path = folder / "results-0.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[0]["guess"] = {"exact_match": 0.0, "rouge1": 0.4}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (line,) = report.compare([folder])
    assert (line["scores"]["exact_match"]["mean"], line["scores_all"]["exact_match"]["mean"]) == (1.0, 0.75)
    text = io.StringIO()
    report.print_table([line], text)
    assert "ok 3/4" in text.getvalue()
    assert "75 [" in text.getvalue()
