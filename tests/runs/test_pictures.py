"""A study of images in the words of a study of text: run, stored, scored again, resumed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmleak.config import load_recipe
from lmleak.errors import RunError
from lmleak.report import compare
from lmleak.runs import load_results, rescore, run
from lmleak.runs.results import read_reconstructions, read_results

RECIPE = {
    "name": "pictures",
    "model": {
        "kind": "vit",
        "device": "cpu",
        "config": {
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "initializer_range": 0.1,
        },
    },
    "data": {"kind": "photos", "limit": 2},
    "select": {"components": ["attn_query"], "layers": [0]},
    "attack": {"kind": "span"},
    "metrics": ["psnr", "ssim"],
    "sweep": {"select.layers": [[0], [1]]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures") / "run"
    assert run(RECIPE, run_dir=place, quiet=True).failed == 0
    return place


def test_the_first_block_is_read_and_the_second_refused(folder):
    lines = read_results(folder)
    assert [line["status"] for line in lines] == ["ok", "ok", "not_applicable", "not_applicable"]
    assert all(line["scores"]["psnr"] > 50 for line in lines[:2])
    assert load_results(folder)["psnr"].notna().sum() == 2


def test_images_are_stored_as_they_were_and_score_the_same_again(folder):
    before = [line["scores"] for line in read_results(folder)]
    for line in read_reconstructions(folder)[:2]:
        images = load_file(folder / line["images"])
        assert images["reference"].shape == images["reconstruction"].shape == (1, 3, 16, 16)
        assert images["reference"].dtype == torch.float32
    assert rescore(folder) == 4
    assert [line["scores"] for line in read_results(folder)] == before
    # What is on disk is what is scored.
    path = folder / read_reconstructions(folder)[0]["images"]
    kept = load_file(path)
    save_file(kept | {"reconstruction": torch.zeros_like(kept["reference"])}, path)
    rescore(folder)
    assert read_results(folder)[0]["scores"]["psnr"] < 30
    save_file(kept, path)
    rescore(folder)
    assert read_results(folder)[0]["scores"] == before[0]


def test_a_line_cannot_name_a_file_elsewhere(folder, tmp_path):
    (path,) = folder.glob("reconstructions-*.jsonl")
    text = path.read_text()
    first = json.loads(text.splitlines()[0])["images"]
    path.write_text(text.replace(first, "images/../../x.safetensors", 1))
    with pytest.raises(RunError, match="not in images"):
        rescore(folder)
    path.write_text(text)


def test_the_same_command_again_does_nothing(folder):
    lines = read_results(folder)
    run(RECIPE, run_dir=folder, quiet=True)
    assert read_results(folder) == lines


def test_one_recipe_asks_of_sentences_and_of_pictures(tmp_path):
    """`model` and `data` are all that differs; both are answered."""
    text = load_recipe("first_block", ["data.limit=1", "model.device=cpu"])
    image = load_recipe("first_block", [f"model={json.dumps(RECIPE['model'])}", "data={kind: photos, limit: 1}"])
    same = [{k: v for k, v in r.model_dump().items() if k not in ("model", "data")} for r in (text, image)]
    assert same[0] == same[1]
    for recipe, metric, other in ((text, "exact_match", "psnr"), (image, "psnr", "exact_match")):
        place = tmp_path / metric
        assert run(recipe, run_dir=place, quiet=True).failed == 0
        scores = [line["scores"] for line in read_results(place) if line["status"] == "ok"]
        assert len(scores) >= 2
        assert all(s[metric] >= 1 and s[other] is None for s in scores)
        assert compare([place])[0]["scores"][metric]["mean"] >= 1
