"""Factor-scored distances against the obvious way: release twice, subtract, divide by the noise."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from lmleak import load_batches, select
from lmleak.gradients.observe import ClientGradients, observe
from lmleak.measures import _changes, _release, measure

SCOPES = ("model", "selection", "per_layer")


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def client(request, tiny_bert, tiny_gpt2):
    """A batch of two sentences of different length on a model in float64."""
    victim = {"bert": tiny_bert, "gpt2": tiny_gpt2}[request.param]
    victim = replace(victim, module=copy.deepcopy(victim.module).double())
    batch = load_batches(victim, "sample", batch_size=2, limit=2, max_length=7)[0]
    return victim, batch, select(victim, components=["attn_query", "ffn_out"], layers=[0, 2])


@pytest.fixture(scope="module")
def changes(client):
    victim, batch, selection = client
    return _changes.token_changes(victim, batch, 2, _changes.scope_of(victim, selection.entries))


def released(victim, batch, entries, defense) -> dict[str, torch.Tensor]:
    mechanism = _release.gaussian(defense)
    made = ClientGradients(victim, batch, entries)
    if mechanism.max_grad_norm is None:
        return made.mean()
    return made.clipped_sum(mechanism.max_grad_norm, mechanism.scope)


def swapped(victim, batch, row: int, place: int, token: int):
    """The batch with one token of one sentence exchanged, by hand."""
    ids, labels = batch.inputs["input_ids"].clone(), batch.labels.clone()
    special = set(victim.processor.all_special_ids)
    position = [i for i, t in enumerate(ids[row].tolist()) if t not in special][place]
    ids[row, position] = token
    if victim.task == "causal-lm":
        labels[row, position] = token
    return replace(batch, inputs={**batch.inputs, "input_ids": ids}, labels=labels)


def over_noise(a, b, names, std) -> float:
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in names)) / std


@pytest.mark.parametrize(
    "defense",
    [{"kind": "dp_sgd", "max_grad_norm": c, "noise_multiplier": 0.3, "clip_scope": s} for s in SCOPES for c in (0.2, 9)]
    + [{"kind": "gaussian_noise", "std": 0.02}],
    ids=lambda d: "-".join(str(v) for v in d.values()),
)
def test_distances_equal_brute_force(client, changes, defense):
    victim, batch, selection = client
    mechanism, _ = _release.noised(defense)
    release = _release.Release.of(mechanism, victim, batch, selection.entries)
    before = released(victim, batch, selection.entries, defense)
    for change in (changes[0], changes[-1]):
        inputs, labels = _changes.sample(batch, change.sample)
        position = _changes.own_positions(victim, inputs, labels)[change.place]
        tokens = _changes.nearest_tokens(victim, _changes.token_at(victim, inputs, labels, position), 2)
        moved = release.moved(change)
        for k, token in enumerate(tokens.tolist()):
            after = released(
                victim, swapped(victim, batch, change.sample, change.place, token), selection.entries, defense
            )
            for row, entries in _release.modules(selection.entries).items():
                expected = over_noise(before, after, [e.name for e in entries], mechanism.std)
                assert float(moved[row][k]) == pytest.approx(expected, rel=1e-5)


def test_a_change_of_a_thousandth_survives_float32(minilm):
    # |g - g'|^2 of float32 products would be rounding: 1e-7 of |g|^2 is as large as 1e-6 of |g - g'| squared.
    batch = load_batches(minilm, "sample", limit=1, max_length=5)[0]
    entries = select(minilm, components=["attn_query"], layers=[0]).entries
    change = _changes.token_changes(minilm, batch, 1, entries)[0]
    wide = replace(minilm, module=copy.deepcopy(minilm.module).double())
    exact = _changes.token_changes(wide, batch, 1, entries)[0]
    for name, apart in exact.apart.items():
        assert float(change.apart[name]) == pytest.approx(float(apart), rel=1e-3)


def test_rows_of_distinguishability_summarise_the_distances(client):
    victim, batch, selection = client
    defense = {"kind": "dp_sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.1}
    found = measure(victim, batch, selection, defense=defense, substitutes=5, sentences=2)
    assert [len(tokens) for tokens in found.details["tokens"]] == [len(t) for t in batch.reference.tokens]
    every = [d for tokens in found.details["tokens"] for d in tokens]
    row = found.rows["*"]
    assert row["token_weakest"] == pytest.approx(min(every))
    assert row["token_weakest"] <= row["token_nearest"] <= row["token_typical"]
    assert 0 < row["presence"] <= 10
    # Half the noise, twice the distance; and a part is told apart no better than the whole.
    half = measure(victim, batch, selection, defense={**defense, "noise_multiplier": 0.05}, substitutes=5, sentences=2)
    for name, values in found.rows.items():
        assert half.rows[name]["token_nearest"] == pytest.approx(2 * values["token_nearest"])
        assert values["presence"] <= row["presence"]


def test_noise_to_signal_is_that_of_the_release(client):
    victim, batch, selection = client
    block = {"kind": "dp_sgd", "max_grad_norm": 0.5, "noise_multiplier": 1.0}
    still = observe(victim, batch, selection, {**block, "noise_multiplier": 0.0}).gradients
    row = measure(victim, batch, selection, "noise_to_signal", defense=block).rows["*"]
    signal = math.sqrt(sum(float(t.square().sum()) for t in still.values()))
    assert row["signal"] == pytest.approx(signal)
    assert row["noise_to_signal"] == pytest.approx(0.5 * math.sqrt(selection.numel) / signal)


@pytest.mark.parametrize("scope", SCOPES)
def test_share_clipped_counts_samples_above_the_norm(client, scope):
    victim, batch, selection = client
    norms = ClientGradients(victim, batch, selection.entries).per_sample_norms(
        "model" if scope == "model" else "selection"
    )
    between = float(norms.mean())  # one of the two samples is above, one below
    block = {"kind": "dp_sgd", "noise_multiplier": 1.0, "clip_scope": scope, "max_grad_norm": between}
    clipped = measure(victim, batch, selection, "noise_to_signal", defense=block).rows["*"]["clipped"]
    assert 0 < clipped < 1 if scope == "per_layer" else clipped == 0.5


def test_bound_falls_with_noise_and_with_the_part_that_is_seen(client):
    victim, batch, selection = client
    before = 1.0
    for sigma in (0.05, 0.2, 1.0, 5.0):
        defense = {"kind": "dp_sgd", "noise_multiplier": sigma}
        rows = measure(victim, batch, selection, "reconstruction_bound", defense=defense, candidates=1000).rows
        assert rows["*"]["guaranteed"] <= before
        before = rows["*"]["guaranteed"]
        for row in rows.values():
            assert 1e-3 - 1e-12 <= row["equidistant"] <= row["here"] <= row["guaranteed"]
            assert row["here"] <= rows["*"]["here"]
    assert before < 0.01


def test_unclipped_noise_bounds_nothing_but_this_batch(client):
    victim, batch, selection = client
    found = measure(victim, batch, selection, "reconstruction_bound", defense={"kind": "gaussian_noise", "std": 10.0})
    assert found.rows["*"]["guaranteed"] == 1.0
    assert found.rows["*"]["here"] < 1e-3


@pytest.mark.parametrize("kind", ["dp_distinguishability", "reconstruction_bound"])
def test_without_noise_or_with_dropout_it_says_why(client, kind):
    victim, batch, selection = client
    silent = {"kind": "dp_sgd", "noise_multiplier": 0.0}
    assert "no noise" in measure(victim, batch, selection, kind, defense=silent).reason
    assert "no Gaussian noise" in measure(victim, batch, selection, kind).reason
    noisy = {"kind": "dp_sgd", "noise_multiplier": 1.0}
    assert "dropout" in measure(replace(victim, mode="train"), batch, selection, kind, defense=noisy).reason
