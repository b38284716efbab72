"""One int in the recipe, and every random number follows from it without touching the global generators.

A seed names its purpose, `derive(seed, "attack", batch.index)`, never the cell: all settings of a sweep then meet the
same batches and the same noise draws, so that their scores are paired; the order or number of processes cannot matter.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BITS = 63  # torch.Generator.manual_seed takes a signed 64-bit integer


def derive(seed: int, *parts: str | int | bool | None) -> int:
    """A seed in [0, 2**63) that depends on `seed` and on every part, the same on every platform.

    Args:
        seed: the recipe's seed, or one already derived.
        parts: what the seed is for, e.g. `"attack", 3`. `1` and `"1"` give different seeds.

    Returns:
        the first 63 bits of the SHA-256 of the arguments as JSON.

    Raises:
        TypeError: a part is not JSON-serialisable.
    """
    text = json.dumps([int(seed), *parts], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big") >> (64 - _BITS)


def generator(seed: int, *parts: str | int | bool | None, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch.Generator on `device`, seeded with `derive(seed, *parts)`.

    Raises:
        TypeError: a part is not JSON-serialisable.
    """
    import torch

    fresh = torch.Generator(device=device)
    fresh.manual_seed(derive(seed, *parts))
    return fresh


def drawn(source: torch.Generator) -> int:
    """A seed below 2**31 drawn from a generator, for libraries that take a number."""
    import torch

    return int(torch.randint(2**31, (1,), generator=source))
