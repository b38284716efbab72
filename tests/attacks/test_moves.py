"""Reorderings are permutations and leave the frame in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.attacks._moves import reorder, shuffle


@pytest.mark.parametrize("move", [reorder, shuffle])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(first=st.integers(0, 2), body=st.integers(0, 8), behind=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_a_move_is_a_permutation_that_keeps_the_frame(move, first, body, behind, seed):
    last, width = first + body, first + body + behind
    order = move(first, last, width, torch.Generator().manual_seed(seed)).tolist()
    assert sorted(order) == list(range(width))
    assert order[:first] == list(range(first))
    assert order[last:] == list(range(last, width))


def test_every_kind_of_move_occurs():
    draw = torch.Generator().manual_seed(0)
    found = {tuple(reorder(1, 5, 6, draw).tolist()) for _ in range(400)}
    swap, one, span, prefix = (0, 4, 2, 3, 1, 5), (0, 2, 3, 1, 4, 5), (0, 3, 4, 1, 2, 5), (0, 4, 1, 2, 3, 5)
    assert {swap, one, span, prefix} <= found


def test_a_seed_gives_the_same_moves():
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert [reorder(0, 7, 7, one).tolist() for _ in range(9)] == [reorder(0, 7, 7, two).tolist() for _ in range(9)]
