"""What every metric of images keeps, and scikit-image's own values as the oracle."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from skimage import metrics as skimage_metrics

from lmleak import registry
from lmleak.errors import DataError, LmleakError, MissingExtra
from lmleak.metrics import prepare, score
from lmleak.records import Reconstruction, Reference

# `lpips` needs a network that is downloaded: it has tests of its own below.
KINDS = [k for k in registry.kinds("metrics") if hasattr(registry.load("metrics", k), "IMAGES") and k != "lpips"]
DRAW = torch.Generator().manual_seed(0)
TRUTH = Reference(images=torch.rand(3, 3, 16, 16, generator=DRAW), labels=(0, 1, 2))
NEAR = (TRUTH.images + 0.05 * torch.randn(3, 3, 16, 16, generator=DRAW)).clamp(0, 1)
BEST = {"psnr": 150.0, "ssim": 1.0, "mse": 0.0, "fft2d": 0.0, "identification": 1.0}


def value(kind, images, truth=TRUTH, **more):
    return score(Reconstruction(images=images, **more), truth, [kind])[kind]


def better(kind, a, b):
    return a < b if hasattr(registry.load("metrics", kind), "LOWER_IS_BETTER") else a > b


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_answer_scores_best(kind):
    best = value(kind, TRUTH.images.clone())
    assert best == pytest.approx(BEST[kind])
    near = TRUTH.images.mean(0).expand(3, -1, -1, -1) if kind == "identification" else NEAR
    for worse in (near, None, TRUTH.images[:1], TRUTH.images[:, :, :8], torch.full_like(NEAR, math.nan)):
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


def test_magnitudes_are_those_of_a_plain_sum_and_blind_to_a_shift():
    x, y = TRUTH.images[:1, :, :5, :6], NEAR[:1, :, :5, :6]
    places = [np.exp(-2j * np.pi * np.outer(range(n), range(n)) / n) / math.sqrt(n) for n in (5, 6)]
    spectra = [np.abs(places[0] @ image[0].double().numpy() @ places[1]) for image in (x, y)]
    assert value("fft2d", y, Reference(images=x)) == pytest.approx(((spectra[0] - spectra[1]) ** 2).mean())
    assert value("fft2d", x.roll((1, 2), (2, 3)), Reference(images=x)) == pytest.approx(0)
    assert value("fft2d", y, Reference(images=x)) <= value("mse", y, Reference(images=x))


def test_a_picture_is_sought_among_the_batch_and_the_gallery(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    pixels = [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in (NEAR[0], *TRUTH.images)]
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / "a" / f"{i}.png")
    kind = {"kind": "identification", "gallery": {"kind": "image_folder", "path": str(tmp_path)}}
    one = Reference(images=TRUTH.images[:1])
    found = lambda images, truth=one, asked=kind: score(Reconstruction(images=images), truth, [asked])["identification"]  # noqa: E731
    assert found(TRUTH.images[:1]) == 1.0  # its own copy in the gallery does not count against it
    assert found(NEAR[:1]) == 0.0
    assert found(NEAR[:1], one, "identification") is None
    assert found(NEAR[:1], TRUTH, "identification") == pytest.approx(1 / 3)  # two references have no answer
    deep = kind | {"model": {"kind": "mlp", "config": {"image_size": 16, "hidden": [8]}, "device": "cpu"}}
    assert found(TRUTH.images[:1], one, deep) == 1.0
    assert found(NEAR[:1], one, deep) == 0.0
    with pytest.raises(DataError, match="'sample' holds no pictures"):
        found(NEAR[:1], one, {"kind": "identification", "gallery": {"kind": "sample"}})


def test_labels_are_counted_as_often_as_they_occur():
    for kind in (Reference(images=TRUTH.images, labels=(1, 3, 3, 7)), Reference(texts=("a",), labels=(1, 3, 3, 7))):
        for labels, share in [((7, 3, 1, 3), 1), ((1, 3, 7, 7), 0.75), ((3, 3), 0.5), ((), 0), ((1, 3, 7, 7, 3), 0.75)]:
            assert score(Reconstruction(labels=labels), kind, ["label_accuracy"]) == {"label_accuracy": share}
    assert score(Reconstruction(), Reference(texts=("a",)), ["label_accuracy"]) == {"label_accuracy": None}


def test_lpips_says_what_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    registry.load("metrics", "lpips")._network.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'lmleak\[lpips\]'"):
        prepare(["lpips"])

    class Broken:
        @staticmethod
        def LPIPS(**_):
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", Broken)
    with pytest.raises(LmleakError, match=r"weights of 'alex' cannot be had \(no network\).*checkpoints"):
        prepare(["lpips"])


def test_lpips_calls_the_network_on_rgb_from_minus_1_to_1(monkeypatch):
    module, seen = registry.load("metrics", "lpips"), []

    def network(x, y):
        seen.append((x, y))
        return (x - y).abs().mean()

    monkeypatch.setattr(module, "_network", lambda net: network)
    grey = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    truth = Reference(images=grey)
    assert value("lpips", grey, truth) == 0
    assert value("lpips", 1 - grey, truth) == pytest.approx(float((4 * grey - 2).abs().mean()), rel=1e-5)
    assert value("lpips", None, truth) == 1
    assert value("lpips", NEAR) is None
    assert seen[0][0].shape == (1, 3, 32, 32)
    torch.testing.assert_close(seen[0][0][0, 2], grey[0, 0] * 2 - 1)
