"""Modules that are frozen or kept back: their gradients are released as zeros (partial gradients, arXiv 2406.00999).

Freezing the embedding and the first layers is the common advice; Li, Xu & Dras (2024, arXiv 2406.00999) ask what the
other modules still give away. Zeros, because a defense keeps names and shapes: the observer knows from the defense's
public fields what was withheld. Modules are named in the dialect of `select`. What is not withheld is exact, so no
guarantee follows; and with `select`, the same question can be asked by observing less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lmleak.gradients.observe import ClientGradients
    from lmleak.records import Entry

REDUCTION = "mean"
IDENTITY: dict[str, Any] = {}  #: fields at which the release is the clean gradient
EXAMPLE = {"components": ["embedding"]}  #: fields at which the defense does its work


class Config(BaseModel):
    """Which modules; all that is given must hold. Nothing given withholds nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_modules: str | list[str] | None = Field(None, description="as in `select`")
    layers: int | str | list[int | str] | None = Field(None, description="as in `select`")
    components: list[str] | None = Field(None, description="as in `select`")


def release(config: Config, client: ClientGradients, generator: Generator) -> dict[str, Tensor]:
    """The batch's mean gradient with zeros where it is withheld, slices of fused weights included.

    Returns:
        Entry name -> tensor of the entry's shape.

    Raises:
        SelectionError: something that is to be withheld is not in the model.
    """
    mean = {name: tensor.clone() for name, tensor in client.mean().items()}
    fields = {name: value for name, value in config.model_dump().items() if value is not None}
    if not fields:
        return mean
    from lmleak.gradients import select

    for hidden in select(client.victim, **fields).entries:
        for entry in client.entries:
            if entry.parameter == hidden.parameter:
                _blank(mean[entry.name], entry, hidden)
    return mean


def _blank(tensor: Tensor, entry: Entry, hidden: Entry) -> None:
    """Zeros where the two entries of one parameter overlap, in place."""
    if hidden.part is None:
        tensor.zero_()
        return
    dim, start, stop = hidden.part
    offset = 0
    if entry.part is not None and entry.part[0] == dim:
        offset = entry.part[1]
    first, last = max(start - offset, 0), min(stop - offset, tensor.shape[dim])
    if first < last:
        tensor.narrow(dim, first, last - first).zero_()


def privacy(config: Config, batch_size: int) -> None:
    """No guarantee: what is not withheld is exact."""
    return None
