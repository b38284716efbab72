"""How scores of pictures are read: which end is good, when something counts as recovered, what the page says of it."""

from __future__ import annotations

import pytest

from lmleak import registry
from lmleak.report import _grade, _words


def test_the_report_and_the_metrics_agree_on_which_end_is_good():
    kinds = [k for k in registry.kinds("metrics") if hasattr(registry.load("metrics", k), "LOWER_IS_BETTER")]
    assert sorted(_grade.LOWER) == sorted(kinds)


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("psnr", 31.0, 12.0),
        ("ssim", 0.9, 0.1),
        ("mse", 1e-4, 0.05),
        ("fft2d", 1e-4, 0.05),
        ("lpips", 0.05, 0.7),
        ("label_accuracy", 0.5, 0.0),
        ("rouge1", 0.1, 0.0),
    ],
)
def test_good_is_darker_ranks_first_and_counts_as_recovered(metric, good, bad):
    assert _grade.worth(metric, good) > _grade.worth(metric, bad)
    assert 1 >= _grade.strength(metric, good) > _grade.strength(metric, bad)
    assert _grade.recovered(metric, good)
    assert not _grade.recovered(metric, bad)


def test_distances_are_shown_as_they_are():
    assert _words.percent(0.00042, "mse") == "0.00042"
    assert _words.percent(0.31, "lpips") == "0.31"
    assert _words.percent(31.04, "psnr") == "31.0"


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"components": ["conv"], "layers": [3]}, "the convolutions of layer 3"),
        ({"components": ["conv"], "layers": [0, 1]}, "the convolutions of layers 0–1"),
        ({"components": ["linear"]}, "the fully connected layers"),
        ({"components": ["patch_embedding"]}, "the patch embedding"),
        ({"components": ["position_embedding"], "layers": None}, "the position embeddings"),
        ({"components": ["attn_value"], "layers": [0]}, "one value matrix of layer 0"),
    ],
)
def test_parts_of_image_models_have_names(select, words):
    assert _words.seen(select) == words
