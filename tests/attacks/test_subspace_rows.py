"""subspace on a feed-forward block's second matrix: inputs solved for one by one, words read off them."""

from __future__ import annotations

import pytest
import torch

from lmleak import attack, load_batches, observe, select
from lmleak.attacks._energy import Energy, site
from lmleak.attacks._subspace_rows import Rows, hidden
from lmleak.attacks._subspace_words import Model


@pytest.fixture(scope="module")
def block(minilm):
    """The observed matrix of layer 3, its block, and the true rows [n, d] before the norm's scale and shift."""
    batch = load_batches(minilm, "sample", max_tokens=9, limit=1)[0]
    seen = observe(minilm, batch, select(minilm, components="ffn_out", layers=3, parameters="weight"))
    energy = Energy(minilm, [site(minilm, seen, seen.entries[0])])
    with energy.attached():
        one = hidden(minilm, energy)
        z, x = one.sample(energy, batch.inputs["input_ids"])
    return seen, batch, one, z[0], x[0]


def test_a_block_is_its_norm_linear_map_and_activation(block):
    _, _, one, z, x = block
    torch.testing.assert_close(one.activations(z), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.unit(z), z, rtol=1e-3, atol=1e-3)
    assert one.outside(z).max() < 1e-5 < 1e-2 < one.outside(z.roll(1, 1)).min()


def test_residual_equals_the_plain_projection(block):
    _, _, one, z, _ = block
    z = z.roll(1, 1)
    left, share, slope = one.residual(z)
    x = torch.nn.functional.gelu((z * one.scale + one.shift) @ one.first.weight.T + one.first.bias).detach()
    span = torch.linalg.svd(one.basis, full_matrices=False).Vh
    torch.testing.assert_close(left, x - x @ span.T @ span, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(share, left.square().sum(1) / x.square().sum(1))
    before = z @ one.weight.T + one.bias
    torch.testing.assert_close(slope, (one.act(before + 1e-2) - one.act(before - 1e-2)) / 2e-2, rtol=1e-2, atol=1e-2)


def test_rows_near_the_true_ones_are_solved_for_and_no_others(block):
    _, _, one, z, _ = block
    draw = torch.Generator().manual_seed(0)
    rows = Rows(one)
    rows.extend(one.unit(z + 0.5 * torch.randn(z.shape, generator=draw)))
    assert rows.missing == 0
    away = torch.cdist(rows.solved, z)
    assert away.amin(1).max() < 0.1
    assert sorted(away.argmin(1).tolist()) == list(range(len(z)))
    assert rows.unexplained(one.activations(z)).max() < 1e-4


def test_words_and_places_are_read_off_rows_of_a_linear_model():
    draw = torch.Generator().manual_seed(0)
    table, places, turn = (torch.randn(*shape, generator=draw) for shape in ((50, 8), (6, 16), (8, 16)))
    words = torch.arange(5, 50)

    def rows(bodies):
        whole = torch.cat([torch.full((len(bodies), 1), 1), bodies, torch.full((len(bodies), 1), 2)], 1)
        noise = 0.05 * torch.randn(*whole.shape, 16, generator=draw)
        return places + table[whole] @ turn + noise

    bodies = words[torch.randint(len(words), (200, 4), generator=draw)]
    model = Model(rows(bodies), bodies, 1, table, words)
    truth = torch.tensor([[7, 30, 30, 44]])
    order = torch.tensor([3, 0, 5, 2, 4])  # one row is not known
    found, likely = model.read(rows(truth)[0][order])
    assert found.tolist() == order.tolist()
    at = (found > 0) & (found < 5)
    assert words[likely[at, 0]].tolist() == truth[0][found[at] - 1].tolist()
    torch.testing.assert_close(model.rows(2), places[2] + table[words] @ turn, rtol=0.1, atol=0.2)


def test_reads_a_sentence_off_a_deep_second_matrix(minilm, block):
    seen, batch, *_ = block
    result = attack(seen, minilm, "subspace")
    assert result.status == "ok", result.reason
    assert result.tokens == batch.reference.tokens
    assert result.details["rows"] > 0
