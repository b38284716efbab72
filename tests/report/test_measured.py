"""Measures on the page and in the table."""

from __future__ import annotations

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
    "sweep": {"defense": ["none", {"kind": "dp_sgd", "noise_multiplier": 0.1}]},
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
