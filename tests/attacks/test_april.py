"""APRIL: exact where attention reads the embedding itself, by matching elsewhere, and the reason in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak import attack, grant, load_batches, load_model, observe, select
from lmleak.attacks.april import EXAMPLE
from lmleak.metrics import score

MODEL = EXAMPLE["model"]
COMPONENTS = ["position_embedding", "attn_query", "attn_key", "attn_value"]


def seen(victim, components=COMPONENTS, size=1):
    batch = load_batches(victim, "photos", limit=size, batch_size=size)[0]
    return observe(victim, batch, select(victim, components=components)), batch


def psnr(made, batch):
    return score(made, batch.reference, ["psnr"])["psnr"]


@given(
    patch=st.sampled_from([2, 4]),
    width=st.sampled_from([64, 80]),
    rows=st.integers(2, 3),
)
@settings(max_examples=4, deadline=None)
def test_exact_where_its_assumptions_hold(patch, width, rows):
    config = MODEL["config"] | {"patch_size": patch, "hidden_size": width, "image_size": patch * rows}
    victim = load_model("vit", first_attention="direct", config=config, dtype="float64", device="cpu")
    observation, batch = seen(victim)
    made = attack(observation, victim, "april", form="closed")
    assert made.status == "ok", made.reason
    # Softmax goes through float32, in the model and in its gradient.
    assert psnr(made, batch) > 80


def test_one_query_is_enough_there_too():
    victim = load_model(**MODEL, dtype="float64", device="cpu")
    observation, batch = seen(victim, ["attn_query"])
    made = attack(observation, victim, "span")
    assert made.status == "ok", made.reason
    assert psnr(made, batch) > 60


def test_a_norm_before_attention_is_refused_or_matched():
    victim = load_model("vit", config=MODEL["config"], device="cpu")
    observation, batch = seen(victim)
    made = attack(observation, victim, "april", form="closed")
    assert (made.status, made.images) == ("not_applicable", None)
    assert "a norm stands before" in made.reason
    unlabelled = attack(observation, victim, "april")
    assert unlabelled.status == "not_applicable"
    assert "labels are unknown" in unlabelled.reason
    known = grant(victim, batch, labels=True)
    first, last = (attack(observation, victim, "april", knowledge=known, steps=steps) for steps in (2, 150))
    assert last.status == "ok", last.reason
    assert last.details["form"] == "matching"
    assert psnr(last, batch) > 12
    assert last.details["cosine"] > first.details["cosine"]
    assert attack(observation, victim, "april", knowledge=known, steps=2).details == first.details


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"components": ["attn_query"]}, "needs the gradient of the position embedding"),
        ({"components": ["position_embedding", "attn_query"]}, "missing: attn_key, attn_value"),
        ({"size": 2}, "2 pictures"),
    ],
)
def test_what_is_missing_is_said(fields, words):
    victim = load_model(**MODEL, device="cpu")
    made = attack(seen(victim, **fields)[0], victim, "april", form="closed")
    assert (made.status, made.images) == ("not_applicable", None)
    assert words in made.reason


def test_noise_is_told():
    victim = load_model(**MODEL, device="cpu")
    observation, _ = seen(victim)
    draw = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in observation.gradients.items()}
    assert attack(replace(observation, gradients=noise), victim, "april").status == "no_signal"
    zero = {name: 0 * tensor for name, tensor in noise.items()}
    assert attack(replace(observation, gradients=zero), victim, "april").status == "no_signal"


def test_without_norm_and_skip_the_embedding_goes_through_attention_alone():
    """The slow twin of the model's change: attention written out by hand."""
    victim = load_model(**MODEL, dtype="float64", device="cpu")
    block = victim.family._blocks(victim.module)[0]
    z = torch.randn(1, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    read = {}
    handle = block.layernorm_after.register_forward_pre_hook(lambda _, args: read.setdefault("x", args[0]))
    block(z)
    handle.remove()
    module = dict(victim.module.named_modules())
    name = lambda c: next(v for k, v in module.items() if v in block.modules() and k.endswith(c))  # noqa: E731
    q, k, v = (name(c)(z).view(1, 5, 4, 16).transpose(1, 2) for c in ("q_proj", "k_proj", "v_proj"))
    mixed = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).reshape(1, 5, 64)
    assert torch.allclose(read["x"], name("o_proj")(mixed), atol=1e-6)
