"""Pictures sought by matching: exact where nothing else can have that gradient, restarts alone or together alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lmleak import attack, load_batches, load_model, observe, score, select
from lmleak.attacks._pixels_terms import Box, total_variation
from lmleak.records import Knowledge

MLP = {"kind": "mlp", "config": {"image_size": 8, "hidden": [400]}, "device": "cpu"}


def case(dtype="float32", size=1, seed=0, **more):
    victim = load_model(**MLP | more, dtype=dtype)
    batch = load_batches(victim, "photos", limit=size, batch_size=size, seed=seed)[0]
    return victim, batch, observe(victim, batch, select(victim))


def test_a_wide_first_layer_gives_the_picture_away_and_its_label_is_read():
    victim, batch, seen = case()
    found = attack(seen, victim, "inverting_gradients", steps=200)
    assert found.status == "ok"
    assert found.labels == batch.reference.labels
    assert score(found, batch.reference, ("psnr",))["psnr"] > 55
    assert found.confidence[0] > 0.9


def test_restarts_in_one_batch_take_the_steps_of_restarts_by_themselves():
    victim, batch, seen = case("float64")
    wanted = Knowledge(labels=batch.reference.labels)
    together = attack(seen, victim, "inverting_gradients", knowledge=wanted, steps=8, restarts=3, seed=4)
    # Restart r starts from the r-th part of one generator's draw.
    from lmleak.attacks._pixels import Matcher
    from lmleak.attacks.inverting_gradients import Config, _adam, _Problem
    from lmleak.seeds import generator

    draws = torch.randn(3, *batch.inputs["pixel_values"].shape, generator=generator(4, "attack")).double()
    ends = []
    for start in draws:
        matcher = Matcher(victim, seen, 1)
        box = Box(victim.processor, start)
        problem = _Problem(Config(steps=8), matcher, box, tuple(start.shape))
        with matcher.ready():
            pixels, _ = _adam(problem, start[None], batch.labels, lambda text: None)
            ends.append((problem.values(pixels, batch.labels, False).item(), pixels[0]))
    best = min(range(3), key=lambda i: ends[i][0])
    assert together.details["restart"] == best
    assert together.details["objective"] == pytest.approx(ends[best][0])
    torch.testing.assert_close(together.images, victim.processor.plain(ends[best][1]).float())


def test_dlg_seeks_labels_that_cannot_be_read():
    victim, batch, whole = case()
    seen = observe(victim, batch, select(victim, layers=[0]))
    refused = attack(seen, victim, "inverting_gradients", steps=5)
    assert refused.status == "not_applicable"
    assert "labels unknown" in refused.reason
    fields = {"distance": "l2", "optimizer": "lbfgs", "tv": 0.0, "steps": 40}
    found = attack(seen, victim, "inverting_gradients", **fields)
    assert found.status == "ok"
    assert found.labels == batch.reference.labels
    # With all gradients the label is read off the head's, and the picture is exact.
    found = attack(whole, victim, "inverting_gradients", **fields)
    assert score(found, batch.reference, ("psnr",))["psnr"] > 60


def test_pixels_stay_in_the_box_and_total_variation_is_that_of_a_loop():
    victim, batch, _ = case()
    box = Box(victim.processor, batch.inputs["pixel_values"])
    pixels = torch.randn(2, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 9
    box.clamp_(pixels)
    assert pixels.min() == -1
    assert pixels.max() == 1
    for own, value in zip(pixels, total_variation(pixels), strict=True):
        across = [abs(row[x + 1] - row[x]) for row in own.reshape(-1, 4).tolist() for x in range(3)]
        down = [abs(row[y + 1] - row[y]) for row in own.transpose(2, 3).reshape(-1, 5).tolist() for y in range(4)]
        assert float(value) == pytest.approx(sum(across) / len(across) + sum(down) / len(down), rel=1e-5)


def test_refuses_text_zeros_and_what_only_noise_explains():
    victim, batch, seen = case()
    zero = replace(seen, gradients={name: torch.zeros_like(g) for name, g in seen.gradients.items()})
    known = Knowledge(labels=batch.reference.labels)
    assert attack(zero, victim, "inverting_gradients", knowledge=known, steps=2).status == "no_signal"
    text = load_model("bert", weights="random", tokenizer="bytes", config={"num_hidden_layers": 1, "hidden_size": 12})
    sentence = load_batches(text, "sample", limit=1)[0]
    found = attack(observe(text, sentence, select(text)), text, "inverting_gradients")
    assert (found.status, found.reason) == ("not_applicable", "seeks pictures, and this model reads text")
