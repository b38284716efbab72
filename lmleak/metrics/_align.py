"""Which recovered sentence answers which reference of a batch: nobody asks an attack for the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lmleak.records import Reconstruction

T = TypeVar("T")


def answers(reconstruction: Reconstruction, items: Sequence[T], count: int, empty: T) -> list[T]:
    """Exactly `count` answers.

    Missing ones are empty. Of more than `count` only the most confident stay: the batch size is public, and an attack
    that lists the dictionary has recovered nothing.

    Args:
        reconstruction: whose `confidence`, where there is one a sequence, ranks `items`; else their order does.
        items: its tokens or texts.
        count: sentences of the reference.
        empty: stands for a missing answer.
    """
    order = list(range(len(items)))
    if len(reconstruction.confidence) == len(items):
        order.sort(key=lambda i: -reconstruction.confidence[i])
    kept = [items[i] for i in sorted(order[:count])]
    return kept + [empty] * (count - len(kept))


def align(references: Sequence[T], recovered: Sequence[T], similarity: Callable[[T, T], float]) -> list[T]:
    """Reorders `recovered` so that the total similarity to `references` is largest (Hungarian algorithm).

    Args:
        references: the truth, b of them.
        recovered: as many answers.
        similarity: of (reference, answer); larger is closer.

    Returns:
        the answer to each reference.
    """
    if len(references) <= 1:
        return list(recovered)
    from scipy.optimize import linear_sum_assignment

    table = [[similarity(reference, answer) for answer in recovered] for reference in references]
    _, columns = linear_sum_assignment(table, maximize=True)
    return [recovered[column] for column in columns]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the defined values, None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
