"""PRECODE: the changed model, its gradient against autograd's, and the four who attack it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from lmleak import attack, grant, load_batches, load_model, observe, score, select
from lmleak.attacks._codes import codes, given
from lmleak.attacks._objective import Layout, Objective
from lmleak.defenses import install
from lmleak.errors import LmleakError, SelectionError
from lmleak.gradients.losses import model_losses
from lmleak.gradients.observe import ClientGradients
from lmleak.measures import measure

PRECODE = {"kind": "precode", "size": 32}


@pytest.fixture(scope="module")
def plain():
    return load_model("mlp", config={"image_size": 8, "hidden": [256, 256]}, device="cpu")


@pytest.fixture(scope="module")
def defended(plain):
    return install(plain, PRECODE)


def seen(victim, defense=PRECODE, size=1, **chosen):
    batch = load_batches(victim, "photos", limit=size, batch_size=size)[0]
    return observe(victim, batch, select(victim, **chosen), defense, seed=7), batch


def test_the_gradient_is_that_of_the_published_loss(defended):
    """The slow twin: everything written out by hand, with the same draw."""
    observation, batch = seen(defended, size=3)
    module = copy.deepcopy(defended.module)
    encode, decode = module.linear_bottleneck.encode, module.linear_bottleneck.decode
    h = batch.inputs["pixel_values"].flatten(1)
    for layer in module.hidden:
        h = layer(h).relu()
    mu, raw = encode(h).chunk(2, 1)
    sigma = torch.nn.functional.softplus(raw)
    code = _code_of(defended, batch)
    eps = ((code - mu) / sigma).detach()
    logits = torch.nn.functional.linear(decode(mu + eps * sigma), module.linear.weight, module.linear.bias)
    kl = 0.5 * (mu**2 + sigma**2 - 1 - (sigma**2).log()).sum(1) / math.log(2)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels) + 1e-3 * kl.mean()
    names = [entry.parameter for entry in observation.entries]
    found = torch.autograd.grad(loss, [module.get_parameter(name) for name in names])
    for name, own in zip(names, found, strict=True):
        torch.testing.assert_close(observation.gradients[name], own, rtol=1e-3, atol=1e-6)


def _code_of(victim, batch):
    """The code that the client draws at this seed."""
    from lmleak.gradients.observe import client_mode

    drawn = []
    decode = victim.module.linear_bottleneck.decode
    handle = decode.register_forward_pre_hook(lambda _, args: drawn.append(args[0]))
    with client_mode(victim, 7), torch.no_grad():
        victim.module(**batch.inputs)
    handle.remove()
    return drawn[0]


def test_clipped_gradients_have_the_divergence_too(defended):
    batch = seen(defended, size=3)[1]
    client = ClientGradients(defended, batch, select(defended).entries, 7)
    mean, total = client.mean(), client.clipped_sum(1e9)
    for name, own in mean.items():
        torch.testing.assert_close(total[name] / 3, own, rtol=1e-3, atol=1e-6)


def test_draws_are_the_clients_own_and_repeatable(defended):
    batch = seen(defended)[1]
    selection = select(defended)
    one, again, other = (observe(defended, batch, selection, PRECODE, seed=seed) for seed in (1, 1, 2))
    name = "linear.weight"
    assert torch.equal(one.gradients[name], again.gradients[name])
    assert not torch.allclose(one.gradients[name], other.gradients[name], rtol=1e-2)


def test_new_modules_are_selectable_and_the_old_names_stay(plain, defended):
    before = {name for name, _ in plain.module.named_parameters()}
    after = {name for name, _ in defended.module.named_parameters()}
    assert after - before == {f"linear_bottleneck.{a}.{b}" for a in ("encode", "decode") for b in ("weight", "bias")}
    assert before <= after
    chosen = select(defended, target_modules=["*bottleneck*"])
    assert chosen.numel == 256 * 64 + 64 + 32 * 256 + 256
    assert {entry.module for entry in select(defended, components=["head"]).entries} == {"linear"}
    assert not hasattr(plain.module, "linear_bottleneck")
    batch = seen(plain, None)[1]
    assert not torch.equal(plain.module(**batch.inputs).logits, defended.module(**batch.inputs).logits)


@pytest.mark.parametrize(
    ("before", "names"),
    [
        (None, ["classifier_bottleneck"]),
        (["intermediate.dense"], [f"bert.encoder.layer.{i}.intermediate.dense_bottleneck" for i in range(3)]),
        (r"bert\.encoder\.layer\.1\.attention\.self\.query", ["bert.encoder.layer.1.attention.self.query_bottleneck"]),
    ],
)
def test_stands_before_what_is_named_in_a_text_model(tiny_bert, before, names):
    defense = PRECODE | {"before": before}
    victim = install(tiny_bert, defense)
    found = [name for name, _ in victim.module.named_modules() if name.endswith("_bottleneck")]
    assert found == names
    batch = load_batches(victim, "sample", limit=1, max_length=6)[0]
    chosen = select(victim, target_modules=["*_bottleneck.*"])
    gradients = observe(victim, batch, chosen, defense).gradients
    assert all(bool(gradient.any()) for gradient in gradients.values())


def test_errors_say_what_to_do(plain, tiny_bert):
    with pytest.raises(SelectionError, match=r"defense\.before.*liner"):
        install(plain, PRECODE | {"before": ["liner"]})
    with pytest.raises(SelectionError, match="linear layers only"):
        install(tiny_bert, PRECODE | {"before": ["LayerNorm"]})
    batch = seen(plain, None)[1]
    with pytest.raises(LmleakError, match=r"install\("):
        observe(plain, batch, select(plain), PRECODE)


def test_the_four_attackers(defended):
    observation, batch = seen(defended)
    known = grant(defended, batch, labels=True)
    before = seen(defended, layers=[0, 1])[0]
    fields = {"kind": "inverting_gradients", "knowledge": known, "steps": 120}
    full, partial, solved = (
        attack(what, defended, **fields, noise=noise)
        for what, noise in ((observation, "own"), (before, "own"), (observation, "solved"))
    )
    ssim = [score(made, batch.reference, ["ssim"])["ssim"] for made in (full, partial, solved)]
    assert full.status == "no_signal" or ssim[0] < 0.3
    assert ssim[1] > 0.7
    assert ssim[2] > 0.9
    assert score(attack(before, defended, "analytic"), batch.reference, ["psnr"])["psnr"] > 100


def test_the_code_is_read_from_the_decoder(defended):
    observation, batch = seen(defended)
    found = codes(observation, defended)
    drawn = _code_of(defended, batch)
    torch.testing.assert_close(found["linear_bottleneck"].float(), drawn, rtol=1e-4, atol=1e-5)
    # With that code in place, anybody's draw gives the client's gradient.
    with given(defended, found):
        other = observe(defended, batch, select(defended), PRECODE, seed=99)
    for name, own in observation.gradients.items():
        torch.testing.assert_close(other.gradients[name], own, rtol=1e-3, atol=1e-5)
    assert defended.module.linear_bottleneck.given is None


def test_codes_that_cannot_be_read(plain, defended):
    assert "no bottleneck" in codes(seen(plain, None)[0], plain)
    assert "mixed" in codes(seen(defended, size=2)[0], defended)
    assert "not both observed" in codes(seen(defended, layers=[0])[0], defended)
    made = attack(seen(defended, size=2)[0], defended, "inverting_gradients", noise="solved")
    assert made.status == "not_applicable"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matching_words_counts_the_divergence(tiny_bert, reduction):
    """No distance at the truth: with the client's draw, what an attack matches is the client's whole loss."""
    victim = install(tiny_bert, PRECODE | {"kl_weight": 10.0})
    batch = load_batches(victim, "sample", limit=2, batch_size=2, max_length=6)[0]
    chosen = select(victim, target_modules=["*_bottleneck.*"])
    losses = model_losses(victim.module, batch.inputs, batch.labels, victim.task, reduction)
    own = torch.autograd.grad(losses.sum(), [victim.module.get_parameter(e.parameter) for e in chosen.entries])
    observation = replace(
        observe(victim, batch, chosen, PRECODE),
        gradients={e.name: g for e, g in zip(chosen.entries, own, strict=True)},
        reduction=reduction,
    )
    lengths = tuple(batch.inputs["attention_mask"].sum(1).tolist())
    objective = Objective(victim, observation, Layout(lengths), "cosine")
    embeds = victim.module.get_input_embeddings()(batch.inputs["input_ids"])[None]
    assert float(objective(embeds, batch.labels[None]).detach()) < 1e-4


def test_measures_count_the_divergence(plain):
    """Where it is nearly all of the loss, a thousand times its weight is a thousand times the sensitivity."""
    found = []
    for weight in (1e4, 1e7):
        victim = install(plain, PRECODE | {"kl_weight": weight})
        batch = seen(victim)[1]
        chosen = select(victim, target_modules=["hidden.0"], parameters="weight")
        found.append(measure(victim, batch, chosen, "sensitivity", draws=4, seed=1).rows["hidden.0"]["sensitivity"])
    assert found[1] / found[0] == pytest.approx(1000, rel=1e-2)
