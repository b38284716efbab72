"""Defenses without noise: each against its definition, written out plainly."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError

from lmleak.defenses import fedavg, prune, quantize, withhold
from lmleak.errors import SelectionError
from lmleak.gradients import select
from lmleak.gradients.observe import ClientGradients


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def released(module, client, **fields):
    return module.release(module.Config(**fields), client, generator())


def test_pruning_keeps_the_largest_values_of_each_tensor(client):
    out = released(prune, client, share=0.75)
    for name, clean in client.mean().items():
        kept = out[name] != 0
        assert int(kept.sum()) == round(0.25 * clean.numel())
        assert torch.equal(out[name][kept], clean[kept])
        assert clean.abs()[~kept].max() <= clean.abs()[kept].min()


def test_pruning_over_the_selection_compares_tensors(client):
    out = released(prune, client, share=0.9, scope="selection")
    clean = torch.cat([tensor.flatten() for tensor in client.mean().values()])
    flat = torch.cat([tensor.flatten() for tensor in out.values()])
    assert int((flat != 0).sum()) == round(0.1 * len(clean))
    assert clean.abs()[flat == 0].max() <= clean.abs()[flat != 0].min()


def test_pruning_all_but_one_value_keeps_one(client):
    assert all(int((tensor != 0).sum()) == 1 for tensor in released(prune, client, share=0.999999).values())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_int8_has_255_even_levels(client, rounding):
    for name, clean in client.mean().items():
        out = released(quantize, client, to="int8", rounding=rounding)[name]
        step = clean.abs().max() / 127
        levels = out / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
        assert levels.abs().max() <= 127 + 1e-9
        assert (out - clean).abs().max() <= step * (0.5 if rounding == "nearest" else 1) + 1e-12


def test_stochastic_rounding_is_right_in_the_mean(client):
    config = quantize.Config(to="int8", rounding="stochastic")
    draws = [quantize.release(config, client, generator(seed)) for seed in range(60)]
    for name, clean in client.mean().items():
        mean = torch.stack([draw[name] for draw in draws]).mean(0)
        step = clean.abs().max() / 127
        # A draw's deviation is half a step at most, so the mean's 1/15 of one; 5 of those, over some 1,000 values.
        assert (mean - clean).abs().max() < 5 * 0.5 * step / 60**0.5


def test_signs_have_one_magnitude(client):
    for name, clean in client.mean().items():
        out = released(quantize, client, to="sign")[name]
        assert torch.equal(out.sign(), clean.sign())
        torch.testing.assert_close(out.abs().max(), clean.abs().mean())


@pytest.mark.parametrize(("to", "digits"), [("bfloat16", 2**-8), ("float16", 2**-10)])
def test_half_precision_rounds_each_value(client, to, digits):
    for name, clean in client.mean().items():
        out = released(quantize, client, to=to)[name]
        assert out.dtype == clean.dtype
        assert not torch.equal(out, clean)
        torch.testing.assert_close(out, clean, rtol=digits, atol=6e-8)  # below 6e-5, float16 has fixed steps of 6e-8


def test_withheld_modules_are_zeros_and_the_others_as_they_were(victim, batch):
    client = ClientGradients(victim, batch, select(victim, components=["attn_query", "ffn_in"]).entries)
    out = released(withhold, client, layers=[0])
    for name, clean in client.mean().items():
        if "layer.0" in name:
            assert not out[name].any()
        else:
            assert torch.equal(out[name], clean)


def test_a_withheld_slice_is_cut_out_of_what_holds_it(tiny_gpt2):
    from lmleak import load_batches

    batch = load_batches(tiny_gpt2, "sample", limit=1, max_length=6)[0]
    whole = ClientGradients(tiny_gpt2, batch, select(tiny_gpt2, target_modules=["attn.c_attn"], layers=0).entries)
    out, clean = released(withhold, whole, components=["attn_key"]), whole.mean()
    name = next(name for name in clean if name.endswith("weight"))
    assert not out[name][:, 32:64].any()
    assert torch.equal(out[name][:, :32], clean[name][:, :32])
    assert torch.equal(out[name][:, 64:], clean[name][:, 64:])
    # And the other way round: slices of a weight that is withheld as a whole, or beside the withheld slice.
    parts = ClientGradients(
        tiny_gpt2, batch, select(tiny_gpt2, components=["attn_key", "attn_value"], layers=0).entries
    )
    assert not any(tensor.any() for tensor in released(withhold, parts, target_modules=["attn.c_attn"]).values())
    for name, tensor in released(withhold, parts, components=["attn_key"]).items():
        assert bool(tensor.any()) == ("attn_value" in name)


def test_what_is_to_be_withheld_must_exist(client):
    with pytest.raises(SelectionError, match=r"layer"):
        released(withhold, client, layers=[7])


@pytest.mark.parametrize(("steps", "size"), [(1, None), (3, None), (4, 2), (3, 1)])
def test_fedavg_is_what_an_optimizer_does(victim, batch, client, steps, size):
    module = copy.deepcopy(victim.module)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    rows = list(range(3))
    parts = [rows[i : i + (size or 3)] for i in range(0, 3, size or 3)]
    for step in range(steps):
        part = parts[step % len(parts)]
        inputs = {name: tensor[part] for name, tensor in batch.inputs.items()}
        optimizer.zero_grad()
        module(**inputs, labels=batch.labels[part]).loss.backward()
        optimizer.step()
    out = released(fedavg, client, steps=steps, lr=0.05, local_batch_size=size)
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, (start[name] - module.get_parameter(name)) / 0.05, rtol=1e-6, atol=1e-10)


def test_fedavg_that_diverges_says_so(client):
    with pytest.raises(ValueError, match="diverged"):
        released(fedavg, client, steps=5, lr=1e300)


@pytest.mark.parametrize(
    ("module", "fields"),
    [
        (prune, {"share": 1.0}),
        (prune, {"share": -0.1}),
        (quantize, {"to": "int4"}),
        (withhold, {"layer": 0}),
        (fedavg, {"steps": 0, "lr": 0.1}),
        (fedavg, {"steps": 1, "lr": 0.0}),
        (fedavg, {"steps": 1, "lr": 0.1, "local_batch_size": 0}),
    ],
)
def test_nonsense_is_refused(module, fields):
    with pytest.raises(ValidationError):
        module.Config(**fields)


@pytest.mark.parametrize("module", [prune, quantize, withhold, fedavg])
def test_none_claims_a_guarantee(module):
    assert module.privacy(module.Config(**module.EXAMPLE), 1) is None
