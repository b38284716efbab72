"""`lmleak utility`: every defense and seed once, resumed by the same call, told as a table."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lmleak.cli import main
from lmleak.config import load_recipe
from lmleak.errors import LmleakError, RecipeError
from lmleak.runs import utility as trained

RECIPE = {
    "name": "costs",
    "model": {
        "kind": "bert",
        "weights": "random",
        "tokenizer": "bytes",
        "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    },
    "data": "sample",
    "attack": "span",
    "utility": {
        "train": {"kind": "sample", "limit": 40, "max_length": 24},
        "holdout": 20,
        "epochs": 1,
        "batch_size": 10,
        "seeds": [0, 1],
    },
    "sweep": {"defense": [{"kind": "dp_sgd", "noise_multiplier": 1.0}], "attack": ["span", "subspace"]},
}


def test_every_defense_and_seed_is_trained_once(tmp_path):
    folder, lines = trained.utility(RECIPE, root=tmp_path)
    assert [(line["defense"]["kind"], line["seed"]) for line in lines] == [
        ("none", 0), ("none", 1), ("dp_sgd", 0), ("dp_sgd", 1)
    ]  # fmt: skip
    assert {(line["records"], line["tested_on"]) for line in lines} == {(40, 20)}
    assert lines[0]["privacy"] is None
    spent = lines[2]["privacy"]
    assert (spent["steps"], spent["sample_rate"]) == (4, 0.25)
    assert spent["epsilon"] <= spent["rdp_epsilon"]
    assert "Poisson" in spent["statement"]
    # The same call trains nothing; one more seed trains that one alone.
    said: list[str] = []
    assert trained.utility(RECIPE, root=tmp_path, said=said.append) == (folder, lines)
    assert not said
    _, more = trained.utility(RECIPE, ["utility.seeds=[0, 1, 2]"], root=tmp_path, said=said.append)
    assert len(more) == 6
    assert len(said) == 2
    found = trained.summary(more)
    assert [line["seeds"] for line in found] == [[0, 1, 2]] * 2
    low, mean, high = (found[0]["accuracy"][name] for name in ("low", "mean", "high"))
    assert low <= mean <= high
    assert json.loads((folder / trained.RESULTS).read_text().splitlines()[0])["mcc"] is not None


def test_the_command_prints_a_table_with_the_whole_trainings_epsilon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "costs.yaml"
    path.write_text(json.dumps({**RECIPE, "sweep": RECIPE["sweep"]}), encoding="utf-8")
    done = CliRunner().invoke(main, ["utility", str(path), "utility.seeds=[0]"])
    assert done.exit_code == 0, done.output
    for words in ("no defense", "DP-SGD σ 1", "MCC", "always the commonest label", "A training run of 4 steps"):
        assert words in done.output


def test_a_utility_block_changes_no_cell(tmp_path):
    plain = load_recipe({key: value for key, value in RECIPE.items() if key != "utility"})
    assert load_recipe(RECIPE).id == plain.id
    assert load_recipe(RECIPE) == load_recipe(load_recipe(RECIPE).model_dump())
    with pytest.raises(LmleakError, match="no `utility` block"):
        trained.utility(plain, root=tmp_path)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({}, r"utility\.train: is missing"),
        ({"train": "sample", "epoch": 3}, r"utility\.epoch: unknown key .*'epochs'"),
        ({"train": "sample", "epochs": 0}, r"utility\.epochs: .*greater than or equal to 1"),
        ({"train": {"kind": "sample", "lmit": 3}}, r"utility\.train\.lmit: unknown key .*'limit'"),
        ({"train": "sample", "select": {"layer": 1}}, r"utility\.select\.layer: unknown key .*'layers'"),
        (3, r"utility: should be a mapping"),
    ],
)
def test_its_faults_are_named_with_their_place(block, says):
    with pytest.raises(RecipeError, match=says):
        load_recipe({**RECIPE, "utility": block})
