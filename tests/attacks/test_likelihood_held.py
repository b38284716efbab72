"""Held output gradients against dense ones, inputs in products against rows, and what they put first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak import load_batches, observe, select
from lmleak.attacks._likelihood_held import PRICE, Inputs, held, stood
from lmleak.attacks._likelihood_moves import Moves, Space
from lmleak.attacks._likelihood_score import Candidate, Scorer
from lmleak.attacks._objective import frozen
from lmleak.attacks._rowspace import known_input
from lmleak.attacks._text import put, special_frame
from lmleak.defenses import gaussian
from lmleak.gradients.observe import cut
from lmleak.models._input import InputLayer
from lmleak.records import Knowledge
from tests.attacks.test_likelihood import MODELS, batch_of, make
from tests.attacks.test_likelihood_relax import scorer_of, space_of

__all__ = ["make"]

AT = (11, 40, 60, 90, 72, 33, 12)
#: two words swapped, one replaced, one out and another in elsewhere
OTHERS = ((11, 40, 90, 60, 72, 33, 12), (11, 40, 60, 90, 72, 85, 12), (11, 60, 90, 72, 85, 33, 12))
STOOD = ([0, 1, 3, 2, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 1, 5, 6])


def block_output(victim, ids):
    """Output of layer 0 with its graph, by the model's own list of layers, and the logits."""
    seen = []
    base = victim.module.base_model
    layer = (base.h if hasattr(base, "h") else base.encoder.layer)[0]
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    logits = victim.module(**batch_of(victim, ids.tolist()).inputs).logits
    handle.remove()
    return seen[0], logits


def dense(victim, entries, value):
    return torch.autograd.grad(value, [victim.module.get_parameter(e.parameter) for e in entries])


def scaled(scorer, gradients):
    """Nats of gradients [entries], the factor that suits best."""
    product = sum(float((scorer.targets[name] * g).sum()) for name, g in gradients.items())
    square = sum(float(g.square().sum()) for g in gradients.values())
    return 0.5 * max(product, 0.0) ** 2 / square / scorer.noise**2


def deltas_of(victim, at):
    out, logits = block_output(victim, torch.tensor([at.tokens]))
    if logits.dim() == 2:
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([at.label]))
    else:
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(at.tokens[1:]))
    return torch.autograd.grad(loss, out)[0][0]


@pytest.mark.parametrize("model", list(MODELS))
def test_changes_are_priced_as_dense_gradients_with_the_layers_output_gradients_moved(make, model):
    victim = make(model)
    scorer, at = scorer_of(victim, scope="selection", layers=[0], parameters="weight"), Candidate(AT, 1)
    with frozen(victim.module):
        one = held(scorer, space_of())
        around = one.around(at)
        spent = scorer.evaluations
        found = one.nats(around, [Candidate(row, 1) for row in OTHERS])
    assert scorer.evaluations == pytest.approx(spent + PRICE * len(OTHERS))
    assert not any(m._forward_hooks for m in victim.module.modules())
    deltas = deltas_of(victim, at)
    # A language model's loss is the mean over its tokens on both sides, up to a factor that scaling takes off.
    scale = float((around.deltas * deltas).sum() / deltas.square().sum())
    torch.testing.assert_close(around.deltas, scale * deltas, rtol=1e-8, atol=1e-10)
    for value, row, places in zip(found.tolist(), OTHERS, STOOD, strict=True):
        out, _ = block_output(victim, torch.tensor([row]))
        own = dense(victim, one.entries, (out[0] * deltas[places]).sum())
        parts = dict(zip((e.name for e in one.entries), own, strict=True))
        assert value == pytest.approx(scaled(scorer, {e.name: cut(parts[e.name], e) for e in one.entries}), rel=1e-8)


@pytest.mark.parametrize("model", list(MODELS))
def test_words_are_priced_as_rows_of_their_inputs_under_held_gradients(make, model):
    victim = make(model)
    scorer = scorer_of(victim, scope="selection", layers=[0], parameters="weight")
    at, space = Candidate(AT, 1), space_of()
    with frozen(victim.module):
        one = held(scorer, space)
        words = one.around(at).words
    out, _ = block_output(victim, torch.tensor([AT]))
    deltas = deltas_of(victim, at)
    own = dict(zip((e.name for e in one.entries), dense(victim, one.entries, (out[0] * deltas).sum()), strict=True))
    own = {e.name: cut(own[e.name], e) for e in one.entries}
    layer, place = known_input(victim), 3
    x = layer.rows(torch.tensor(AT), torch.arange(len(AT)), dtype=torch.float64)
    for column in (0, 17, 42):
        row = layer.rows(space.words[column], torch.tensor(place), dtype=torch.float64)
        changed = dict(own)
        for e in one.read:
            # Inputs are independent, so the output gradients are what turns them into the gradient.
            conv = e.shape[0] == x.shape[1] and model.startswith("gpt2")
            gradient = own[e.name].T if conv else own[e.name]
            delta = (gradient @ torch.linalg.pinv(x))[:, place]
            more = torch.outer(delta, row - x[place])
            changed[e.name] = own[e.name] + (more.T if conv else more)
        assert float(words[place, column]) == pytest.approx(scaled(scorer, changed), rel=1e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", [True, False])
def test_inputs_in_products_are_those_of_their_rows(norm, positions):
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64)  # noqa: E731
    table, places, weight, bias = normal(50, 8), normal(9, 8), normal(8), normal(8)
    layer = InputLayer(table, places if positions else None, norm, weight, bias if norm == "layer" else None, 1e-5)
    words = torch.arange(10, 40)
    a, b, x = normal(4, 8), normal(4, 8), normal(4, 8)
    found = Inputs(layer, words).beside(a, b, x)
    for place in range(4):
        beside = layer.rows(words, torch.tensor(place), dtype=torch.float64) - x[place]
        expected = beside @ a[place], beside @ b[place], beside.square().sum(1)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got[place], want, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8).flatmap(lambda a: st.tuples(st.just(a), st.permutations(a))))
@settings(deadline=None, max_examples=60)
def test_words_that_are_only_moved_keep_what_was_theirs(pair):
    at, other = pair
    places = stood(at, other)
    assert sorted(places) == list(range(len(at)))
    assert [at[i] for i in places] == list(other)
    assert all(places[i] == i for i in range(len(at)) if at[i] == other[i])


def test_new_words_take_the_places_left():
    assert [stood(AT, row) for row in OTHERS] == [list(places) for places in STOOD]


def test_nothing_is_held_where_layer_0_is_not_seen_or_the_rest_says_more(make):
    scorer = scorer_of(make("bert"), scope="selection", layers=[1])
    assert held(scorer, space_of()) is None
    scorer = scorer_of(make("bert"), scope="selection", layers=[0, 1])
    low = [e for e in scorer.entries if e.layer == 0]
    for name in (e.name for e in low):
        scorer.targets[name].mul_(100)
    assert held(scorer, space_of()) is not None
    for name in (e.name for e in low):
        scorer.targets[name].mul_(1e-6)
    assert held(scorer, space_of()) is None
    scorer.noise = 1e3  # neither says anything
    assert held(scorer, space_of()) is None
    assert held(scorer.part(low), space_of()) is not None


def test_the_true_order_comes_first_and_the_true_word_among_the_first(minilm):
    """By the slope the true order is 190th of 265, the true word 18th to 340th of 384."""
    batch = load_batches(minilm, "sample", max_length=13)[6]
    truth, label = tuple(batch.inputs["input_ids"][0].tolist()), int(batch.labels[0])
    release = {"kind": "dp_sgd", "noise_multiplier": 0.003, "max_grad_norm": 1.0, "clip_scope": "selection"}
    seen = observe(minilm, batch, select(minilm, components="layer", layers=0), release)
    scorer, words = Scorer(minilm, seen, gaussian(seen.defense)), torch.arange(1000, 25000)
    space = Space(words, torch.ones(len(words)), special_frame(minilm, Knowledge()), (len(truth),), (label,))
    moves = Moves(space, scorer.table, 64, 1)
    swapped = list(truth)
    swapped[3], swapped[8] = swapped[8], swapped[3]
    with frozen(minilm.module):
        one = held(scorer, space)
        around = one.around(Candidate(tuple(swapped), label))
        orders = [*moves.reordered(around.at), *moves.carried(around.at)]
        assert orders[int(one.nats(around, orders).argmax())].tokens == truth
        assert Candidate(truth, label) in one.changes(around, moves, [])
        around = one.around(Candidate(put(truth, 6, 2224), label))
        rivals = [truth, *(put(truth, 6, word) for word in range(2000, 2200))]
        nats = one.nats(around, [Candidate(row, label) for row in rivals])
        assert int((nats > nats[0]).sum()) < 10
