"""Pictures by division: one exactly, a batch where neurons are passed by one picture alone."""

from __future__ import annotations

import pytest
import torch

from lmleak import attack, load_batches, load_model, observe, score, select


@pytest.fixture(scope="module")
def mlp():
    return load_model("mlp", config={"image_size": 8, "hidden": [512]}, device="cpu")


def seen(victim, size=1, defense=None, **chosen):
    batch = load_batches(victim, "photos", limit=size, batch_size=size)[0]
    return observe(victim, batch, select(victim, **(chosen or {"layers": [0]})), defense), batch


def test_one_picture_from_the_first_layer_alone(mlp):
    observation, batch = seen(mlp)
    made = attack(observation, mlp, "analytic")
    assert score(made, batch.reference, ["psnr"])["psnr"] > 120
    # The slow twin: one neuron's quotient.
    weight, bias = observation.gradients["hidden.0.weight"], observation.gradients["hidden.0.bias"]
    row = int(bias.abs().argmax())
    alone = mlp.processor.plain((weight[row] / bias[row]).reshape(1, 3, 8, 8))
    assert torch.allclose(made.images, alone, atol=1e-5)


def test_pictures_of_a_batch_that_have_neurons_of_their_own(mlp):
    observation, batch = seen(mlp, size=3)
    made = attack(observation, mlp, "analytic")
    assert len(made.images) == 3
    assert score(made, batch.reference, ["psnr"])["psnr"] > 80


def test_rounded_gradients_are_read_less_well(mlp):
    observation, batch = seen(mlp, defense={"kind": "quantize", "to": "float16"})
    assert 40 < score(attack(observation, mlp, "analytic"), batch.reference, ["psnr"])["psnr"] < 110


def refused(observation, victim, status, words):
    made = attack(observation, victim, "analytic")
    assert made.status == status
    assert words in made.reason


def test_refuses(mlp, tiny_bert):
    refused(seen(mlp, components=["head"])[0], mlp, "not_applicable", "hidden.0")
    refused(seen(mlp, layers=[0], parameters="weight")[0], mlp, "not_applicable", "bias")
    refused(seen(mlp, defense={"kind": "gaussian_noise", "std": 1.0})[0], mlp, "no_signal", "noise")
    conv = load_model("convnet", config={"image_size": 8}, device="cpu")
    refused(seen(conv)[0], conv, "not_applicable", "reads the pixels")


def test_a_batch_that_shares_every_neuron_has_no_answer():
    narrow = load_model("mlp", config={"image_size": 8, "hidden": [3]}, device="cpu")
    refused(seen(narrow, size=4)[0], narrow, "no_signal", "no two neurons")
