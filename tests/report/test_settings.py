"""Settings side by side: paired whiskers, tokens by d', the join with utility, and a page that has all of it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import folders
import pytest

from lmleak import report
from lmleak.errors import LmleakError
from lmleak.report import _compare, _figures, _plane, _settings, _store, _study
from lmleak.report._write import page
from lmleak.runs.utility import folder_of

SIGMAS = (0.001, 0.01, 0.1)
EPSILON = {0.001: 504_264.0, 0.01: 5_425.0, 0.1: 92.0}
ATTACKS = [{"kind": "matching", "steps": 60}, {"kind": "likelihood", "budget": 500}]


def defense(sigma: float) -> dict:
    return {"kind": "dp_sgd", "noise_multiplier": sigma, "max_grad_norm": 1.0, "clip_scope": "model", "delta": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    kinds = [{"kind": "none"}, *map(defense, SIGMAS)]
    measures = [
        {"kind": "dp_distinguishability", "substitutes": 100},
        {"kind": "reconstruction_bound", "candidates": 30_000},
    ]
    made = folders.recipe({"defense": kinds, "attack": ATTACKS}, measures=measures)

    def level(axes, batch):
        sigma = axes["defense"].get("noise_multiplier", 0.0)
        strong = axes["attack"]["kind"] == "likelihood"
        if sigma == 0.1 and strong:
            return ("no_signal", None, "noise alone may do that")
        return ("ok", max(0.0, 0.9 - 0.05 * batch - (20 if strong else 60) * sigma), None)

    def privacy(axes):
        sigma = axes["defense"].get("noise_multiplier")
        return sigma and {
            "epsilon": EPSILON[sigma], "rdp_epsilon": 1.1 * EPSILON[sigma], "mu": 1 / sigma, "delta": 1e-5,
            "noise_multiplier": sigma, "max_grad_norm": 1.0, "clip_scope": "model", "batch_size": 1,
            "unit": "one sample", "adjacency": "add or remove one sample", "statement": "Said.",
        }  # fmt: skip

    run = folders.write(root / "dp", made, level, 6, privacy=privacy)
    draw = random.Random(0)
    path = run / "results-0.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [json.loads(line) for line in (run / "reconstructions-0.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, text in zip(lines, texts, strict=True):
        if not line["privacy"]:
            continue
        sigma = line["privacy"]["noise_multiplier"]
        own = [0.1 / sigma * 2 ** draw.uniform(-2, 2) for _ in range(8)]
        row = {"token_nearest": sorted(own)[4], "token_weakest": min(own)}
        line["measures"] = {
            "dp_distinguishability": {"rows": {"*": row}, "reason": None, "details": {"tokens": [own]}},
            "reconstruction_bound": {"rows": {"*": {"guaranteed": 1.0, "here": min(1.0, 0.02 / sigma)}}, "reason": None,
                                     "details": {}},
        }  # fmt: skip
        if line["status"] != "ok":
            line["guess"] = {"token_accuracy": 0.0, "rouge1": 0.0}
        text["reference"]["tokens"] = [list(range(8))]
        text["reconstruction"]["tokens"] = [[i if d > 7 else 99 for i, d in enumerate(own)]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "reconstructions-0.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts), encoding="utf-8")
    trained = root / "quickstart-utility"
    trained.mkdir()
    use = [({"kind": "none"}, 0.7), (defense(0.01) | {"sample_rate": 0.06, "steps": 96}, 0.68), (defense(0.1), 0.55)]
    rows = [
        {"key": f"{i}{seed}", "model": {"weights": "x"}, "defense": block, "seed": seed,
         "accuracy": level + 0.01 * seed, "mcc": 0.3, "majority": {"accuracy": 0.5, "mcc": 0.0},
         "privacy": None, "seconds": 3.0}
        for i, (block, level) in enumerate(use) for seed in range(3)
    ]  # fmt: skip
    (trained / "utility-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def cells(folder):
    return _study.places([_store.read(folder)])


def test_panels_hold_every_level_and_whiskers_are_paired(cells):
    (panel,) = _settings.panels(cells, "token_accuracy")
    assert [point.epsilon for point in next(iter(panel.attacks.values()))] == [92.0, 5_425.0, 504_264.0, None]
    matching = panel.attacks["matching"]
    # Batches differ by 0.05 each, the setting takes 0.6 of all of them: only a paired interval is that narrow.
    point = next(p for p in matching if p.epsilon == 5_425.0)
    assert point.ends is not None
    assert point.ends[1] - point.ends[0] < 0.01
    assert point.score == pytest.approx(0.9 - 0.125 - 0.6)
    assert panel.bound == [(92.0, pytest.approx(0.2)), (5_425.0, 1.0), (504_264.0, 1.0)]


def test_a_refusal_counts_as_nothing_read(cells):
    refused = next(p for p in cells if p.status == "no_signal")
    assert _settings.level(refused, "token_accuracy")["mean"] == 0


def test_tokens_are_counted_by_their_own_distance(cells):
    tokens = _settings.promised(cells)
    for rows in tokens.values():
        assert sum(one.count for one in rows) == 3 * 6 * 8
        assert all(one.hits == (one.count if one.d > 7 else 0) for one in rows)


def test_wilson_holds_what_it_says():
    # Coverage of the exact binomial at n = 20: never far below 95 % between 0.1 and 0.9.
    for share in (0.1, 0.3, 0.5, 0.9):
        held = sum(
            math.comb(20, k) * share**k * (1 - share) ** (20 - k)
            for k in range(21)
            if _figures.wilson(k, 20)[0] <= share <= _figures.wilson(k, 20)[1]
        )
        assert held > 0.93
    assert _figures.wilson(0, 5)[0] == 0
    assert _figures.wilson(5, 5)[1] == 1


def test_utility_is_joined_by_what_noises_not_by_what_is_accounted(folder, cells):
    trained = _compare.trained_of([_store.read(folder)])
    found = _figures.choices(cells, trained, "token_accuracy", "accuracy")
    assert [round(c.utility["mean"], 2) for c in found] == [0.71, 0.69, 0.56]
    assert [c.best for c in found] == [True, True, True]
    assert found[1].attack == "likelihood"
    assert found[1].leak["mean"] == pytest.approx(0.9 - 0.125 - 0.2)
    assert not _figures.choices(cells, [{**trained[0], "defense": defense(0.3)}], "token_accuracy", "accuracy")


def test_utility_joins_where_noise_was_calculated_from_an_epsilon(folder, cells):
    from lmleak.defenses._calibration import noise_for_epsilon

    trained = _compare.trained_of([_store.read(folder)])
    under = {"kind": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": None, "epsilon": 20.0, "delta": 1e-5}
    sigma = noise_for_epsilon(20.0, 1e-5, 1.0, 1)
    place = next(p for p in cells if _settings.noise(p) == 0.1 and p.status == "ok")
    same = replace(place, setting={**place.setting, "defense": {**under, "noise_multiplier": sigma}})
    line = {**trained[0], "defense": under}
    assert [c.attack for c in _figures.choices([same], [line], "token_accuracy", "accuracy")] == [place.attack]
    assert not _figures.choices([place], [line], "token_accuracy", "accuracy")


def test_a_defense_beaten_on_both_sides_is_no_choice():
    one = ("a", {"mean": 0.6}, {"mean": 0.5}, "x")
    assert _figures._beats(("b", {"mean": 0.7}, {"mean": 0.5}, "x"), one[1:3])
    assert not _figures._beats(("b", {"mean": 0.7}, {"mean": 0.6}, "x"), one[1:3])
    assert not _figures._beats(one, one[1:3])


def test_axes_map_ends_and_name_powers():
    across = _plane.logarithmic(1.0, 100.0, 10.0, 30.0)
    assert [across(v) for v in (0.1, 1.0, 10.0, 100.0, 1e9)] == pytest.approx([10, 10, 20, 30, 30])
    assert _plane.powers(0.05, 2e6) == [
        (0.1, "0.1"), (1.0, "1"), (10.0, "10"), (100.0, "100"), (1e3, "1k"), (1e4, "10k"), (1e5, "100k"), (1e6, "1M")
    ]  # fmt: skip


def test_the_page_has_every_figure_and_says_the_parity(folder, tmp_path):
    out = report.write([folder], tmp_path / "compare.html")
    text = out.read_text(encoding="utf-8")
    for said in ("Settings side by side", "against ε", "What d&#39; promised", "By module and noise",
                 "The smallest cell has 6 batches",
                 "Leakage against utility", "Budget parity", "ε by RDP", "always the commonest label"):  # fmt: skip
        assert said in text or said.replace("&#39;", "'") in text, said
    assert (tmp_path / "compare.csv").read_text(encoding="utf-8").startswith("run,cell,status")
    assert "NaN" not in text


def test_one_setting_is_no_comparison(tmp_path):
    alone = folders.write(tmp_path / "run", folders.recipe({}), lambda axes, batch: ("ok", 0.5, None), 2)
    assert "Settings side by side" not in page([_store.read(alone)])


def test_utility_is_named_by_folder_or_recipe(folder):
    root = folder.parent
    assert folder_of("quickstart", root) == folder_of(str(root / "quickstart-utility"), root)
    with pytest.raises(LmleakError, match="lmleak utility other"):
        folder_of("other", root)
