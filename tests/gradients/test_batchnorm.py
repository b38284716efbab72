"""BatchNorm in the client's mode: whose statistics normalise, whose are granted, and whom they must not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lmleak import grant, load_batches, load_model, observe, select
from lmleak.errors import LmleakError
from lmleak.gradients import batchnorm

SMALL = {"depth": 8, "width": 4, "image_size": 16}


@pytest.fixture(params=["eval", "train"])
def case(request):
    victim = load_model("resnet", config=SMALL, mode=request.param, dtype="float64", device="cpu")
    with torch.no_grad():
        for part in batchnorm.norms(victim.module).values():
            part.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    return victim, load_batches(victim, "photos", limit=3, batch_size=3)[0]


def test_the_release_is_in_the_clients_mode_and_moves_no_running_statistics(case):
    victim, batch = case
    before = {name: tensor.clone() for name, tensor in victim.module.state_dict().items()}
    seen = observe(victim, batch, select(victim))
    grant(victim, batch, bn_statistics=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in victim.module.state_dict().items())
    assert all(part.track_running_stats for part in batchnorm.norms(victim.module).values())
    victim.module.train(victim.mode == "train")
    loss = F.cross_entropy(victim.module(**batch.inputs).logits, batch.labels)
    truth = torch.autograd.grad(loss, list(victim.module.parameters()))
    for (name, _), gradient in zip(victim.module.named_parameters(), truth, strict=True):
        torch.testing.assert_close(seen.gradients[name], gradient)


def test_granted_statistics_are_those_of_the_batch(case):
    victim, batch = case
    inputs = {}
    victim.module.blocks[1].bn2.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].detach()))
    granted = grant(victim, batch, bn_statistics=True).bn_statistics
    assert list(granted) == [name for name, _ in victim.module.named_modules() if "bn" in name]
    mean, variance = granted["blocks.1.bn2"]
    rows = inputs["x"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(variance, rows.var(1, unbiased=False))
    assert grant(victim, batch).bn_statistics is None


def test_a_guarantee_for_single_samples_is_refused_where_they_are_mixed(case):
    victim, batch = case
    defense = {"kind": "dp_sgd", "noise_multiplier": 1.0}
    if victim.mode == "eval":
        assert observe(victim, batch, select(victim), defense).privacy["epsilon"] > 0
    else:
        with pytest.raises(LmleakError, match=r"model\.mode: 'train' lets BatchNorm mix"):
            observe(victim, batch, select(victim), defense)
