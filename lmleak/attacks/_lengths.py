"""How long the sentences are, where the threat model does not say."""

from __future__ import annotations

from lmleak.attacks._rowspace import known_input, matrix, row_space, weights
from lmleak.records import Observation, Victim


def lengths_from_rank(victim: Victim, observation: Observation) -> tuple[int, ...] | None:
    """Tokens of every sentence from the highest rank of an observed matrix; for a batch, its mean for each sentence.

    None where no spectrum has an edge (noise). The last layer's matrices have rank 1 and are outvoted by any other.
    For every sentence a rank is one short of the tokens for a key without rotary positions (softmax is
    shift-invariant), for a causal query (the first token attends to itself alone) and under a causal language model's
    loss (nothing is predicted from the last token).
    """
    b = observation.batch_size
    causal = victim.family.CAUSAL
    layer = known_input(victim)
    rotary = layer is not None and layer.position is None
    counts = []
    for entry in weights(observation):
        if entry.layer is None:
            continue
        space = row_space([matrix(victim.module, entry, observation.gradients[entry.name])])
        short = (
            (entry.component == "attn_key" and not rotary)
            + (entry.component == "attn_query" and causal)
            + (observation.task == "causal-lm")
        )
        counts.append(space.rank + short * b if space.rank else 0)
    total = max(counts, default=0)
    if not total:
        return None
    return tuple(total // b + (i < total % b) for i in range(b))
