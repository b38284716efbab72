"""GradInversion: its objective term by term, what seeds agree on, and the same pictures on two processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import shift

from lmleak import attack, grant, load_batches, load_model, observe, select
from lmleak.attacks._pixels import Matcher
from lmleak.attacks._pixels_group import Consensus, assigned, registered
from lmleak.attacks.gradinversion import Config, _Group
from lmleak.gradients import batchnorm

SMALL = {"kind": "resnet", "config": {"depth": 8, "width": 4, "image_size": 16}, "device": "cpu"}
FIELDS = {"steps": 6, "seeds": 3, "warmup": 2, "group_from": 0.3, "group_every": 2}


def case(**more):
    victim = load_model(**SMALL | more)
    batch = load_batches(victim, "photos", limit=2, batch_size=2)[0]
    return victim, batch, observe(victim, batch, select(victim))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_objective_is_the_sum_of_its_terms(mode):
    victim, batch, seen = case(dtype="float64", mode=mode)
    known = grant(victim, batch, bn_statistics=True).bn_statistics
    config = Config(seeds=1, gradient=0.3, tv=0.2, l2=0.1, bn=0.05, group=0.7)
    group = _Group(config, Matcher(victim, seen), victim, batch.reference.labels, known, torch.Generator())
    draw = torch.Generator().manual_seed(1)
    pixels, centre = torch.randn(2, 1, 2, 3, 16, 16, generator=draw, dtype=torch.float64)
    with group.matcher.ready():
        value = group.objective(pixels, centre).item()
    # Slow and obvious, on a module that may be spoiled.
    inputs = {}
    module = victim.module.train(mode == "train")
    for name, part in batchnorm.norms(module).items():
        part.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    x = pixels[0]
    own = torch.autograd.grad(F.cross_entropy(module(x).logits, batch.labels), list(module.parameters()))
    gradient = sum((a - b).norm() for a, b in zip(own, seen.gradients.values(), strict=True))
    statistics = 0
    for name, (mean, variance) in known.items():
        rows = inputs[name].transpose(0, 1).flatten(1)
        statistics += (rows.mean(1) - mean).norm() + (rows.var(1, unbiased=False) - variance).norm()
    rough = (x[..., 1:] - x[..., :-1]).norm() + (x[..., 1:, :] - x[..., :-1, :]).norm()
    rough += (x[..., 1:, 1:] - x[..., :-1, :-1]).norm() + (x[..., 1:, :-1] - x[..., :-1, 1:]).norm()
    truth = 0.3 * gradient + 0.05 * statistics + 0.2 * rough + 0.1 * x.norm() + 0.7 * (x - centre[0]).norm()
    assert value == pytest.approx(truth.item(), rel=1e-6)


def test_the_same_pictures_for_the_same_seed_and_nothing_moves():
    victim, batch, seen = case(mode="train")
    before = {name: tensor.clone() for name, tensor in victim.module.state_dict().items()}
    state = torch.random.get_rng_state()
    known = grant(victim, batch, labels=True, bn_statistics=True)
    fields = FIELDS | {"bn_statistics": "exact"}
    found, again = (attack(seen, victim, "gradinversion", knowledge=known, seed=3, **fields) for _ in range(2))
    assert torch.equal(found.images, again.images)
    assert len(found.details["shifts"]) == 2
    other = attack(seen, victim, "gradinversion", knowledge=known, seed=4, **fields)
    assert not torch.equal(found.images, other.images)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in victim.module.state_dict().items())
    refused = attack(seen, victim, "gradinversion", knowledge=grant(victim, batch, labels=True), **fields)
    assert refused.status == "not_applicable"
    assert "knowledge.bn_statistics" in refused.reason


@pytest.fixture(scope="module")
def photos():
    victim = load_model("mlp", config={"image_size": 32, "hidden": [4]}, device="cpu")
    return load_batches(victim, "photos", limit=3, batch_size=3)[0].reference.images.double()


@pytest.mark.parametrize("how", ["shift", "flow"])
def test_registration_undoes_a_known_shift(photos, how):
    moves = [(2, -1), (0, 3), (-1, 0)]
    far = np.stack([shift(p, (0, *m), order=1, mode="nearest") for p, m in zip(photos, moves, strict=True)])
    far, truth = torch.from_numpy(far), photos
    moved, length = registered(far, truth, how)
    inner = (slice(None), slice(None), slice(5, -5), slice(5, -5))
    left = {"shift": 0.2, "flow": 0.5}[how]  # flow is smooth, and bends a little where nothing has moved
    assert float((moved - truth)[inner].square().mean()) < left * float((far - truth)[inner].square().mean())
    if how == "shift":
        assert length == pytest.approx((5**0.5 + 3 + 1) / 3, abs=0.3)


def test_seeds_are_pulled_to_their_mean_each_in_its_own_order(photos):
    truth = photos
    labels = (4, 7, 7)
    # The second seed has found the two pictures of label 7 the other way round.
    other = truth[[0, 2, 1]] + 0.1
    assert assigned(other, truth, labels).tolist() == [0, 2, 1]
    agreed = Consensus(labels, None)
    centres = agreed({0: truth, 5: other})
    torch.testing.assert_close(centres[0], truth + 0.05)
    torch.testing.assert_close(centres[5], other - 0.05)
    assert agreed.spread == pytest.approx(0.05)
    assert agreed.shifts == []


def on_two(path):
    from accelerate import PartialState

    torch.set_num_threads(1)
    victim, batch, seen = case()
    known = grant(victim, batch, labels=True)
    found = attack(seen, victim, "gradinversion", knowledge=known, seed=3, **FIELDS, across_processes=True)
    torch.save((found.images, found.details["objectives"]), f"{path}/{PartialState().process_index}.pt")


def test_two_processes_find_what_one_finds(tmp_path):
    from accelerate import debug_launcher

    debug_launcher(on_two, (str(tmp_path),), num_processes=2)
    victim, batch, seen = case()
    alone = attack(seen, victim, "gradinversion", knowledge=grant(victim, batch, labels=True), seed=3, **FIELDS)
    for rank in range(2):
        images, objectives = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(images, alone.images)
        assert objectives == alone.details["objectives"]
