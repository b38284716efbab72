"""What the page says and draws, from one cell to a thousand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import folders
import pytest

from lmleak import report
from lmleak.errors import RunError

NONE = {"kind": "none"}


def dp(sigma: float) -> dict:
    return {"kind": "dp_sgd", "noise_multiplier": sigma, "max_grad_norm": 1.0, "clip_scope": "model", "delta": 1e-5}


def html(folder: Path) -> str:
    return report.write(folder).read_text(encoding="utf-8")


def headline(text: str) -> str:
    return re.search(r"<h1>(.*?)</h1>", text, re.S)[1]


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (
            ("ok", 1.0, None),
            "Anyone who sees the gradient of one query matrix of layer 0 (0.65 % of the model) reads all 20",
        ),
        (("ok", 0.5, None), "No sentence was read word for word. At most 50 % of the words came back (ROUGE-1)"),
        (("ok", 0.0, None), "Nothing was recovered"),
        (("failed", None, "boom"), "The only cell failed: this run says nothing about leakage."),
        (("not_applicable", None, "dropout is on"), "The attack does not apply to what was observed"),
        (("no_signal", None, "zero gradient"), "No cell has a score: this run says nothing about leakage."),
    ],
)
def test_headline_is_what_the_data_says(tmp_path: Path, result: folders.Result, says: str) -> None:
    folder = folders.write(tmp_path / "run", folders.recipe({}), lambda axes, batch: result)
    assert headline(html(folder)).startswith(says)


def test_headline_counts_sentences_and_prefers_the_undefended(tmp_path: Path) -> None:
    made = folders.recipe({"defense": [dp(0.01), NONE]})

    def level(axes, batch):
        return ("ok", 1.0 if axes["defense"] == NONE and batch < 13 else 0.4, None)

    text = html(folders.write(tmp_path / "run", made, level))
    assert "reads 13 of 20 sentences word for word." in headline(text)
    assert "The attack reads none word for word with DP-SGD σ 0.01." in text


def test_heat_map_tells_zero_from_no_score_from_not_run(tmp_path: Path) -> None:
    made = folders.recipe({"select.components": [["attn_query"], ["ffn_out"]], "select.layers": [[0], [1]]})

    def level(axes, batch):
        if axes["select.components"] == ["ffn_out"]:
            return (
                ("not_applicable", None, "its inputs are no embeddings")
                if axes["select.layers"] == [0]
                else ("ok", 1.0, None)
            )
        return ("ok", 0.0, None)

    folder = folders.write(tmp_path / "run", made, level)
    lines = (folder / "results-0.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if '"cell": "000000000003"' not in line]  # ffn_out of layer 1 has not run
    (folder / "results-0.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    drawn = re.search(r'<svg class="map".*?</svg>', html(folder), re.S)[0]
    groups = re.findall(r'<g class="(cell[^"]*)"><title>(.*?)</title>(<rect.*?)</g>', drawn, re.S)
    assert [(kind, re.findall(r">([^<>]+)</text>", body)) for kind, _, body in groups] == [
        ("cell", ["0", "0.1s"]),
        ("cell", ["0", "0.1s"]),
        ("cell none not_applicable", ["n/a"]),
    ]
    assert all('class="h0"' in body for kind, _, body in groups[:2])
    assert "class=" not in groups[2][2]
    assert "its inputs are no embeddings" in groups[2][1]


def test_small_multiples_one_a_defense(tmp_path: Path) -> None:
    made = folders.recipe(
        {"select.components": [["attn_query"], ["attn_key"]], "select.layers": [[0], [1]], "defense": [NONE, dp(0.01)]}
    )
    text = html(folders.write(tmp_path / "run", made, lambda axes, batch: ("ok", 0.7, None), 2))
    first = re.search(r'<div class="pick pick1">.*?<div class="pick pick2">', text, re.S)[0]
    assert re.findall(r"<figcaption>(.*?)</figcaption>", first) == ["no defense", "DP-SGD σ 0.01"]
    assert first.count('<g class="cell">') == 8


def test_dp_section_states_the_guarantee_and_draws_it(tmp_path: Path) -> None:
    made = folders.recipe({"defense": [NONE, dp(0.01), dp(0.1), dp(1.0)]})
    epsilons = {0.01: 5426.0, 0.1: 91.8, 1.0: 4.38}

    def privacy(axes):
        sigma = axes["defense"].get("noise_multiplier")
        return sigma and {
            "epsilon": epsilons[sigma],
            "delta": 1e-5,
            "noise_multiplier": sigma,
            "max_grad_norm": 1.0,
            "clip_scope": "model",
            "unit": "one sample of the batch",
            "adjacency": "add or remove one sample",
        }

    text = html(folders.write(tmp_path / "run", made, lambda axes, batch: ("ok", 0.7, None), 3, privacy=privacy))
    chart = re.search(r'<svg class="chart".*?</svg>', text, re.S)[0]
    assert re.findall(r">(ε [^<]*)</text>", chart) == ["ε 5,426", "ε 91.8", "ε 4.38"]
    assert chart.count("<circle") == 4
    assert "add or remove one sample" in text
    assert "no privacy guarantee" not in text


def test_unclipped_noise_is_never_called_private(tmp_path: Path) -> None:
    made = folders.recipe({"defense": [NONE, {"kind": "gaussian_noise", "std": 1e-4}]})
    text = html(folders.write(tmp_path / "run", made, lambda axes, batch: ("ok", 0.7, None), 2))
    assert "no privacy guarantee" in text
    assert "ε and δ hold" not in text


def test_a_thousand_cells_fold_and_stay_small(tmp_path: Path) -> None:
    made = folders.recipe(
        {
            "select.components": [["attn_query"], ["attn_key"], ["ffn_in"], ["ffn_out"]],
            "select.layers": [[i] for i in range(25)],
            "defense": [NONE, *(dp(s / 1000) for s in range(1, 10))],
        }
    )
    words = ["word " * 5000, "x" * 20_000]
    path = report.write(
        folders.write(tmp_path / "run", made, lambda axes, batch: ("ok", 0.7, None), 1, words, lambda t, _, b: t[::-1])
    )
    assert path.stat().st_size < 3e6
    text = path.read_text(encoding="utf-8")
    assert "<details><summary>All 1,000 cells</summary>" in text
    assert len(text.split('<section id="cells">')[1].split("</section>")[0].split("<tr>")) == 1002
    assert "more words</i>" in text


def test_cells_without_an_answer_come_with_their_reason(tmp_path: Path) -> None:
    made = folders.recipe({"select.layers": [[0], [1]]})

    def level(axes, batch):
        return ("ok", 1.0, None) if axes["select.layers"] == [0] else ("failed", None, "out of memory")

    text = html(folders.write(tmp_path / "run", made, level))
    section = text.split('<section id="failures">')[1].split("</section>")[0]
    assert "layer 1" in section
    assert "out of memory" in section
    assert "layer 0" not in section


def test_a_defense_of_what_nobody_read_gets_no_credit(tmp_path: Path) -> None:
    made = folders.recipe({"defense": [NONE, dp(0.1)], "select.layers": [[0], [1]]})
    for leaking in (True, False):

        def level(axes, batch, leaking=leaking):
            return ("ok", 1.0 if leaking and axes["defense"] == NONE else 0.0, None)

        text = html(folders.write(tmp_path / str(leaking), made, level))
        assert ("reads none word for word with DP-SGD" in text) == leaking
        assert ("this run does not tell" in text) != leaking


def test_csv_holds_the_same_numbers(tmp_path: Path) -> None:
    folder = folders.write(
        tmp_path / "run",
        folders.recipe({"select.layers": [[0], [1]]}),
        lambda axes, batch: ("ok", batch / 10, None),
        10,
    )
    report.write(folder)
    rows = list(csv.DictReader((folder / "cells.csv").open(encoding="utf-8")))
    lines = report.compare([folder])
    assert [float(row["rouge1"]) for row in rows] == [line["scores"]["rouge1"]["mean"] for line in lines]
    assert [row["select.layers"] for row in rows] == ["[0]", "[1]"]


def test_several_runs_in_one_page(tmp_path: Path) -> None:
    first = folders.write(tmp_path / "a", folders.recipe({}), lambda axes, batch: ("ok", 1.0, None))
    second = folders.write(tmp_path / "b", folders.recipe({}), lambda axes, batch: ("ok", 0.0, None))
    path = report.write([first, second], tmp_path / "new" / "both.html")
    assert path == tmp_path / "new" / "both.html"
    text = path.read_text(encoding="utf-8")
    assert text.count("The same study again") == 2


def test_what_is_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        report.write(tmp_path)
    with pytest.raises(RunError, match="no run folder"):
        report.write([])


def test_seeds_are_told_apart_in_the_table_and_averaged_in_the_map(tmp_path: Path) -> None:
    def level(axes, batch):
        return ("ok", 1.0 if axes["seed"] else 0.0, None)

    text = html(folders.write(tmp_path / "run", folders.recipe({"seed": [0, 1]}), level, 4))
    drawn = re.search(r'<svg class="map".*?</svg>', text, re.S)[0]
    assert "mean of 2 cells" in drawn
    assert ">50</text>" in drawn
    assert "<th>seed</th>" in text


def test_a_run_without_a_finished_cell_says_so(tmp_path: Path) -> None:
    folder = folders.write(tmp_path / "run", folders.recipe({}), lambda axes, batch: ("ok", 1.0, None), 0)
    assert headline(html(folder)) == "This run holds no finished cell yet."


def test_cells_that_answered_in_part_are_listed(tmp_path: Path) -> None:
    def level(axes, batch):
        return ("ok", 1.0, None) if batch else ("no_signal", None, "the gradient is zero")

    section = html(folders.write(tmp_path / "run", folders.recipe({}), level, 4)).split('<section id="failures">')[1]
    assert "ok in part" in section
    assert "1 of 4 batches no_signal: the gradient is zero" in section


def test_heat_map_tells_the_ways_of_not_answering_apart(tmp_path: Path) -> None:
    made = folders.recipe({"select.layers": [[0], [1], [2], [3]]})
    statuses = ["ok", "not_applicable", "no_signal", "budget_exhausted"]

    def level(axes, batch):
        layer = axes["select.layers"][0]
        if layer == 0 and batch:
            return ("budget_exhausted", None, "late")
        return (statuses[layer], 1.0 if layer == 0 else None, None if layer == 0 else "why")

    folder = folders.write(tmp_path / "run", made, level, 4)
    path = folder / "results-0.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["status"] != "ok":
            came = 0.4 if line["status"] == "budget_exhausted" else 0.0
            line["guess"] = {"rouge1": came, "exact_match": 0.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = html(folder)
    drawn = re.findall(r'<svg class="map".*?</svg>', text, re.S)
    cells = [re.findall(r'<g class="(cell[^"]*)"><title>.*?</title>(.*?)</g>', one, re.S) for one in drawn]
    words = [[(kind, *re.findall(r">([^<>]+)</text>", body)) for kind, body in one] for one in cells]
    exact, rouge, seconds = words[0], words[1], words[-1]
    assert exact == [
        ("cell", "25", "0.1s"),  # one of four answered: not 100
        ("cell none not_applicable", "n/a"),
        ("cell none no_signal", "no", "signal"),
        ("cell none budget_exhausted", "budget", "(0)"),
    ]
    assert rouge[3] == ("cell none budget_exhausted", "budget", "(40)")
    assert seconds[0] == ("cell", "0.1s")
    assert seconds[3] == ("cell", "0.1s")
    assert [kind for kind, *_ in seconds[1:3]] == ["cell none not_applicable", "cell none no_signal"]
    assert '<path class="corner"' in drawn[0]
    assert headline(text) == (
        "Anyone who sees the gradient of one query matrix of layer 0 (0.65 % of the model) reads 1 of 4 sentences word "
        "for word."
    )


def test_controls_stand_beside_their_cell_and_are_no_finding(tmp_path: Path) -> None:
    made = folders.recipe({"control": ["none", "wrong_update"]})
    level = lambda axes, batch: ("ok", 0.0 if axes["control"] == "none" else 1.0, None)  # noqa: E731
    text = html(folders.write(tmp_path / "run", made, level, 4))
    assert "word for word" not in headline(text)
    section = text.split('<section id="controls">')[1].split("</section>")[0]
    assert "wrong_update" in section
    assert "−100" in section
