"""Measures on the page and in the table."""

from __future__ import annotations

import csv
import io

import pytest

from lmleak import report, runs

RECIPE = {
    "name": "measured",
    "model": {
        "kind": "bert",
        "weights": "random",
        "tokenizer": "bytes",
        "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    },
    "data": {"kind": "sample", "limit": 2, "max_length": 6},
    "select": {"components": ["attn_query", "attn_key"], "layers": [0]},
    "attack": "span",
    "measures": ["noise_to_signal", {"kind": "dp_distinguishability", "substitutes": 2, "sentences": 1}],
    "sweep": {"defense": ["none", {"kind": "dp_sgd", "noise_multiplier": 0.1, "steps": 9, "sample_rate": 0.1}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.run(RECIPE, run_dir=tmp_path_factory.mktemp("runs") / "measured", quiet=True).path


def test_a_cell_line_has_means_by_module_and_an_interval_over_all(folder):
    clean, noised = runs.results.cell_lines(folder)
    assert "adds no Gaussian noise" in clean["measures"]["noise_to_signal"]["reason"]
    found = noised["measures"]["dp_distinguishability"]
    assert found["all"]["presence"]["n"] == 2
    assert set(found["modules"]) == {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key")}
    stored = runs.read_results(folder)
    tokens = [line["measures"]["dp_distinguishability"]["details"].get("tokens") for line in stored]
    assert [bool(one) for one in tokens] == [False, False, True, True]


def test_the_table_and_the_page_show_them(folder):
    text = io.StringIO()
    report.print_table(report.compare([folder]), text)
    assert "noise_to_signal" in text.getvalue()
    assert "token_nearest" in text.getvalue()
    page = report.write([folder]).read_text(encoding="utf-8")
    assert "What can be known, before any attack" in page
    assert "a token against its nearest substitute" in page
    assert "adds no Gaussian noise" in page
    assert "bert.encoder.layer.0.attention.self.key" in page


def test_a_training_run_is_stated_under_the_table_and_on_the_page(tmp_path):
    defense = [{"kind": "dp_sgd", "epsilon": epsilon, "steps": 20} for epsilon in (1.0, 8.0)]
    made = runs.run({**RECIPE, "measures": [], "sweep": {"defense": defense}}, run_dir=tmp_path / "run", quiet=True)
    text = io.StringIO()
    report.print_table(report.compare([made.path]), text)
    assert text.getvalue().count("privacy: This single release") == 2
    assert "A training run of 20 steps at this noise" in text.getvalue()
    page = report.write([made.path]).read_text(encoding="utf-8")
    assert "Whole training run" in page
    assert "epsilon 8" in page
    assert "σ –" not in page


def test_the_csv_says_what_is_promised_and_what_was_measured(folder):
    report.write(folder)
    clean, noised = csv.DictReader((folder / "cells.csv").open(encoding="utf-8"))
    assert not clean["epsilon"] + clean["training.epsilon"] + clean["dp_distinguishability.presence"]
    told = runs.read_results(folder)[-1]["privacy"]
    for name in ("noise_multiplier", "max_grad_norm", "epsilon", "mu", "rdp_epsilon"):
        assert float(noised[name]) == told[name]
    for name in ("steps", "sample_rate", "epsilon", "rdp_epsilon"):
        assert float(noised[f"training.{name}"]) == told["training"][name]
    line = runs.results.cell_lines(folder)[1]
    for kind, measured in line["measures"].items():
        for name, value in measured["all"].items():
            assert float(noised[f"{kind}.{name}"]) == value["mean"]
