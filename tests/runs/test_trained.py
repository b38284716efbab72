"""Training before a study: a sweep axis like any other, done once and kept by content."""

from __future__ import annotations

import pytest
import torch

from lmleak import load_batches, load_model, measures, runs
from lmleak.config import cells, load_recipe
from lmleak.errors import RecipeError
from lmleak.utility import _fit, fitted, score

RECIPE = {
    "name": "trained",
    "model": {
        "kind": "bert",
        "weights": "random",
        "tokenizer": "bytes",
        "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    },
    "train": {"data": {"kind": "sample", "limit": 24, "max_length": 12}, "lr": 1e-2, "batch_size": 8},
    "data": {"kind": "sample", "limit": 1, "max_length": 6},
    "select": {"components": ["attn_query"], "layers": [0]},
    "attack": "span",
    "measures": ["spectrum"],
    "sweep": {"train.epochs": [0, 2]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMLEAK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trained"


def test_trained_and_fresh_models_are_cells_of_one_study_and_training_is_not_repeated(tmp_path, cache, monkeypatch):
    done = runs.run(RECIPE, run_dir=tmp_path / "one", quiet=True)
    assert done.exit_code == 0
    fresh, trained = (line["measures"]["spectrum"]["rows"]["*"]["norm"] for line in runs.read_results(done.path))
    assert fresh != trained
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(_fit, "_train", lambda *_: pytest.fail("trained again"))
    again = runs.run(RECIPE, run_dir=tmp_path / "two", quiet=True)
    assert [line["measures"]["spectrum"]["rows"] for line in runs.read_results(again.path)] == [
        line["measures"]["spectrum"]["rows"] for line in runs.read_results(done.path)
    ]


def test_cells_that_differ_in_their_attack_alone_share_their_measures(tmp_path, monkeypatch):
    called, real = [], measures.measure
    monkeypatch.setattr(measures, "measure", lambda *args, **fields: called.append(fields) or real(*args, **fields))
    noised = {"kind": "gaussian_noise", "std": 1e-3}
    settings = [["none", "span"], ["none", "embedding_rows"], [noised, "span"]]
    sweep = {"sweep": [{"defense": [d], "attack": [a]} for d, a in settings]}
    recipe = {**RECIPE, "train": None, "data": {**RECIPE["data"], "limit": 2}} | sweep
    done = runs.run({name: value for name, value in recipe.items() if value is not None}, run_dir=tmp_path, quiet=True)
    assert [fields["defense"]["kind"] for fields in called] == ["none"] * 2 + ["gaussian_noise"] * 2
    norms = [line["measures"]["spectrum"]["rows"]["*"]["norm"] for line in runs.read_results(done.path)]
    assert norms[:2] == norms[2:4]
    assert [fields["seed"] for fields in called[2:]] == [fields["seed"] for fields in called[:2]]


def test_training_learns_and_leaves_the_given_model_and_the_global_rng_alone(tiny_bert):
    before = {name: p.clone() for name, p in tiny_bert.module.state_dict().items()}
    records = load_batches(tiny_bert, "sample", limit=48, max_length=12)
    rng = torch.random.get_rng_state()
    block = {"epochs": 12, "batch_size": 16, "lr": 3e-3}
    made = fitted(tiny_bert, lambda: records, block, seed=0)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(p, before[name]) for name, p in tiny_bert.module.state_dict().items())
    assert not made.module.training
    assert score(made, records)["accuracy"] > score(tiny_bert, records)["accuracy"] + 0.2
    kept = fitted(tiny_bert, lambda: pytest.fail("trained again"), block, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(made.module.parameters(), kept.module.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "mlp"])
def test_language_models_and_image_models_are_trained_too(kind):
    if kind == "gpt2":
        config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
        victim = load_model("gpt2", weights="random", task="causal-lm", tokenizer="bytes", config=config, device="cpu")
        records = load_batches(victim, "sample", limit=8, max_length=20)
    else:
        victim = load_model("mlp", config={"image_size": 8, "hidden": [8]}, num_labels=10, device="cpu")
        records = load_batches(victim, "photos", limit=4)
    made = fitted(victim, lambda: records, {"epochs": 1, "batch_size": 4, "lr": 1e-2}, seed=0)
    assert "trained 1 epochs" in made.weights
    assert any(not torch.equal(p, q) for p, q in zip(made.module.parameters(), victim.module.parameters(), strict=True))


def test_a_recipe_without_training_keeps_its_cells_and_one_with_it_survives_the_round_trip(tmp_path):
    plain = {key: value for key, value in RECIPE.items() if key not in ("train", "sweep")}
    assert "\ntrain:" not in load_recipe(plain).to_yaml()
    recipe = load_recipe(RECIPE)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml")
    assert again.id == recipe.id
    assert [cell.id for cell in cells(again)] == [cell.id for cell in cells(recipe)]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"epochs": 1}, "train.data: is missing"),
        ({"data": "sample", "epochs": -1}, "train.epochs"),
        ({"data": "sample", "epoch": 1}, "epoch.*did you mean 'epochs'"),
        (3, "train: should be a mapping"),
    ],
)
def test_bad_blocks_are_named(train, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({**RECIPE, "sweep": {}, "train": train})
