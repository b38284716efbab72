"""What every metric of images keeps, and scikit-image's own values as the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import metrics as skimage_metrics

from lmleak import registry
from lmleak.metrics import score
from lmleak.records import Reconstruction, Reference

KINDS = [kind for kind in registry.kinds("metrics") if hasattr(registry.load("metrics", kind), "IMAGES")]
DRAW = torch.Generator().manual_seed(0)
TRUTH = Reference(images=torch.rand(3, 3, 16, 16, generator=DRAW), labels=(0, 1, 2))
NEAR = (TRUTH.images + 0.05 * torch.randn(3, 3, 16, 16, generator=DRAW)).clamp(0, 1)
BEST = {"psnr": 150.0, "ssim": 1.0, "mse": 0.0}


def value(kind, images, truth=TRUTH, **more):
    return score(Reconstruction(images=images, **more), truth, [kind])[kind]


def better(kind, a, b):
    return a < b if kind == "mse" else a > b


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_answer_scores_best(kind):
    best = value(kind, TRUTH.images.clone())
    assert best == pytest.approx(BEST[kind])
    for worse in (NEAR, None, TRUTH.images[:1], TRUTH.images[:, :, :8], torch.full_like(NEAR, math.nan)):
        assert better(kind, best, value(kind, worse))
        assert math.isfinite(value(kind, worse))


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_surplus_answers_do_not_count(kind):
    assert value(kind, NEAR.flip(0)) == pytest.approx(value(kind, NEAR))
    wrong = torch.zeros(3, 3, 16, 16)
    assert value(kind, torch.cat([wrong, TRUTH.images])) == value(kind, wrong)
    known = value(kind, torch.cat([wrong, TRUTH.images]), confidence=(0.1,) * 3 + (0.9,) * 3)
    assert known == pytest.approx(BEST[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_no_such_score_and_images_have_none_of_text(kind):
    assert value(kind, None, Reference(texts=("a b",), tokens=((1, 2),))) is None
    scores = score(Reconstruction(images=NEAR), TRUTH, ["rouge", "token_accuracy", "exact_match"])
    assert set(scores.values()) == {None}


def test_values_are_those_of_scikit_image():
    x, y = TRUTH.images[:1].double().numpy(), NEAR[:1].double().numpy()
    truth = Reference(images=TRUTH.images[:1])
    peak = skimage_metrics.peak_signal_noise_ratio(x, y, data_range=1.0)
    assert value("psnr", NEAR[:1], truth) == pytest.approx(peak)
    alike = skimage_metrics.structural_similarity(x[0], y[0], channel_axis=0, data_range=1.0)
    assert value("ssim", NEAR[:1], truth) == pytest.approx(alike)
    assert value("mse", NEAR[:1], truth) == pytest.approx(np.mean((x - y) ** 2))


def test_tiny_pictures_have_an_ssim():
    truth = Reference(images=TRUTH.images[:, :, :4, :5])
    assert value("ssim", truth.images, truth) == pytest.approx(1.0)
    assert value("ssim", NEAR[:, :, :4, :5], truth) < 1
