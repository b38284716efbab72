from __future__ import annotations

import pytest
import torch

from lmleak.seeds import derive, generator


def test_a_seed_is_the_same_everywhere():
    # Written down: a change here changes every published number.
    assert derive(0, "attack", 3) == 5302523037297785688


def test_every_part_counts():
    parts = [(0,), (1,), (0, "a"), (0, "a", 1), (0, "a", "1"), (0, "a1"), (0, 1, "a")]
    seeds = [derive(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_part_that_has_no_stable_spelling_is_refused():
    with pytest.raises(TypeError):
        derive(0, object())


def test_generators_repeat_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    one, two = (torch.rand(4, generator=generator(7, "noise", 2)) for _ in range(2))
    other = torch.rand(4, generator=generator(7, "noise", 3))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
