"""DP-SGD does what its epsilon claims: per-sample clipping, noise of the stated size on the attacked gradient."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pydantic import ValidationError

from lmleak.defenses import dp_sgd, gaussian_noise
from lmleak.defenses._noise import add_normal
from lmleak.gradients import select
from lmleak.gradients.observe import observe

SCOPES = ("model", "selection", "per_layer")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def microbatches(victim, batch) -> list[dict[str, torch.Tensor]]:
    """The obvious way: one sample, one loss, one backward. Nothing of lmleak's gradient code."""
    out = []
    for i in range(len(batch.labels)):
        inputs = {name: tensor[i : i + 1] for name, tensor in batch.inputs.items()}
        loss = victim.module(**inputs, labels=batch.labels[i : i + 1]).loss
        parameters = dict(victim.module.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        out.append(dict(zip(parameters, grads, strict=True)))
    return out


def norm(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bound", [0.05, 1.0, 1e6])
def test_clipping_equals_the_microbatch_oracle(victim, batch, client, scope, bound):
    names = [entry.name for entry in client.entries]
    expected = dict.fromkeys(names, 0.0)
    for sample in microbatches(victim, batch):
        whole = norm(sample.values()) if scope == "model" else norm(sample[name] for name in names)
        for name in names:
            length = norm([sample[name]]) if scope == "per_layer" else whole
            limit = bound / math.sqrt(len(names)) if scope == "per_layer" else bound
            expected[name] = expected[name] + sample[name] * min(1.0, float(limit / length))
    config = dp_sgd.Config(max_grad_norm=bound, noise_multiplier=0.0, clip_scope=scope)
    released = dp_sgd.release(config, client, generator())
    for name in names:
        torch.testing.assert_close(released[name], expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_sample_moves_the_release_by_at_most_the_bound(victim, batch, scope):
    # The sensitivity that epsilon rests on, over everything that is released.
    bound = 0.05
    entries = select(victim).entries
    config = dp_sgd.Config(max_grad_norm=bound, noise_multiplier=0.0, clip_scope=scope)
    three = dp_sgd.release(config, dp_client(victim, batch, entries, slice(None)), generator())
    two = dp_sgd.release(config, dp_client(victim, batch, entries, slice(0, 2)), generator())
    moved = norm(three[name] - two[name] for name in three)
    assert 0 < moved <= bound


def dp_client(victim, batch, entries, rows):
    from lmleak.gradients.observe import ClientGradients
    from lmleak.records import Batch

    inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
    return ClientGradients(victim, Batch(inputs, batch.labels[rows], batch.reference), entries)


@pytest.mark.parametrize(("bound", "sigma"), [(1.0, 0.5), (0.1, 2.0), (3.0, 0.01)])
def test_noise_has_the_stated_deviation(client, bound, sigma):
    noisy = dp_sgd.Config(max_grad_norm=bound, noise_multiplier=sigma)
    still = dp_sgd.Config(max_grad_norm=bound, noise_multiplier=0.0)
    clean = dp_sgd.release(still, client, generator())
    draws = []
    for seed in range(20):
        released = dp_sgd.release(noisy, client, generator(seed))
        draws += [(released[name] - clean[name]).flatten() / (sigma * bound) for name in clean]
    noise = torch.cat(draws)
    # 4.5 standard errors on each side: 7e-6 to fail by chance, were the seeds not fixed.
    assert abs(noise.mean()) < 4.5 / math.sqrt(len(noise))
    assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / len(noise))
    assert noise.abs().max() > 3.5


def test_noise_is_independent_between_tensors(victim, batch, client):
    config = dp_sgd.Config(max_grad_norm=1.0, noise_multiplier=1.0)
    still = dp_sgd.Config(max_grad_norm=1.0, noise_multiplier=0.0)
    clean, noisy = (dp_sgd.release(c, client, generator()) for c in (still, config))
    query = [name for name in clean if name.endswith("query.weight")]
    first, second = ((noisy[name] - clean[name]).flatten() for name in query)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4.5 / math.sqrt(len(first))


@pytest.mark.parametrize("sigma", [1e-4, 0.01, 0.1, 1.0])
def test_what_is_observed_is_the_noised_gradient(victim, batch, sigma):
    # The published study read the clean gradient at every sigma: noise must reach what the attack sees.
    selection = select(victim, components=["attn_query"], layers=0)
    block = {"kind": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": sigma}
    clean = observe(victim, batch, selection, {**block, "noise_multiplier": 0.0})
    seen = observe(victim, batch, selection, block)
    for name, tensor in seen.gradients.items():
        assert torch.all(tensor != clean.gradients[name])
    assert seen.privacy["noise_multiplier"] == sigma
    assert seen.reduction == "sum"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype_meets_the_same_draw(dtype):
    zero = torch.zeros(4, 5)
    noised = add_normal(zero.to(dtype), 0.5, generator(3))
    assert noised.dtype == dtype
    torch.testing.assert_close(noised.float(), add_normal(zero, 0.5, generator(3)), rtol=1e-2, atol=1e-3)


def test_privacy_of_one_release():
    stated = dp_sgd.privacy(dp_sgd.Config(max_grad_norm=0.7, noise_multiplier=1.0), 4)
    assert stated["epsilon"] == pytest.approx(4.377, abs=1e-3)
    assert stated["rdp_epsilon"] >= stated["epsilon"]
    assert (stated["mu"], stated["delta"], stated["max_grad_norm"]) == (1.0, 1e-5, 0.7)
    assert "single release of a batch of 4 samples" in stated["statement"]
    assert "4.38" in stated["statement"]
    json.dumps(stated, allow_nan=False)


def test_privacy_without_noise_is_none_and_says_so():
    stated = dp_sgd.privacy(dp_sgd.Config(noise_multiplier=0.0), 1)
    assert stated["epsilon"] is stated["rdp_epsilon"] is stated["mu"] is None
    assert "Clipped only" in stated["statement"]
    json.dumps(stated, allow_nan=False)


@pytest.mark.parametrize("scope", ["selection", "per_layer"])
def test_a_guarantee_of_the_selection_alone_says_so(scope):
    config = dp_sgd.Config(noise_multiplier=1.0, clip_scope=scope)
    assert "this selection alone" in dp_sgd.privacy(config, 1)["statement"]
    assert "this selection alone" not in dp_sgd.privacy(dp_sgd.Config(noise_multiplier=1.0), 1)["statement"]


def test_unclipped_noise_never_claims_an_epsilon():
    assert gaussian_noise.privacy(gaussian_noise.Config(std=10.0), 1) is None


@pytest.mark.parametrize(
    ("config", "fields", "says"),
    [
        (dp_sgd.Config, {"noise_multiplier": -0.1}, "clipping only"),
        (dp_sgd.Config, {"noise_multiplier": math.inf}, "inf"),
        (dp_sgd.Config, {"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "above 0, not 0.0"),
        (dp_sgd.Config, {"noise_multiplier": 1.0, "max_grad_norm": math.nan}, "above 0, not nan"),
        (dp_sgd.Config, {"noise_multiplier": 1.0, "delta": 1.0}, "between 0 and 1, not 1.0"),
        (dp_sgd.Config, {"noise_multiplier": 1.0, "delta": 0.0}, "between 0 and 1, not 0.0"),
        (dp_sgd.Config, {"noise_multiplier": 1.0, "clip_scope": "layer"}, "per_layer"),
        (dp_sgd.Config, {"noise_multiplier": "1"}, "valid number"),
        (dp_sgd.Config, {"noise_multiplier": True}, "valid number"),
        (dp_sgd.Config, {"noise_multiplier": 1.0, "epsilon": 3.0}, "epsilon"),
        (gaussian_noise.Config, {"std": -1.0}, "0 or more, not -1.0"),
        (gaussian_noise.Config, {"std": 1.0, "epsilon": 3.0}, "epsilon"),
    ],
)
def test_nonsense_is_refused_in_plain_words(config, fields, says):
    with pytest.raises(ValidationError) as caught:
        config(**fields)
    assert says in str(caught.value)
