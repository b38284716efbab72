"""Data sources: one file per kind, named as in recipes. Each reads texts and labels; batching is the same for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmleak import registry

if TYPE_CHECKING:
    import torch

    from lmleak.records import Batch, Victim


def load_batches(victim: Victim, kind: str = "sample", *, seed: int = 0, **fields: Any) -> list[Batch]:
    """Reads a data source and cuts it into the client's batches.

    The order depends on `seed` and the source alone, so settings compared with one seed meet the same sentences.
    `limit` counts sentences before batching; an incomplete last batch is dropped. Position ids are always given,
    with the batch dimension; padding is on the right.

    Args:
        victim: whose tokenizer, task and device to use.
        kind: file of `lmleak.data`: sample, local, hub, cola, sst2, rotten_tomatoes; photos, image_folder, idx,
            hub_images.
        seed: of the order and of the masks.
        fields: the recipe's `data` block: split, batch_size, limit, shuffle, max_length, min_tokens, max_tokens, and
            the kind's own.

    Returns:
        batches whose inputs `input_ids`, `attention_mask`, `position_ids` are [b, s] on the victim's device, or
        `pixel_values` [b, c, y, x], normalised as the model wants it.

    Raises:
        DataError: the source cannot be read, is empty, or its labels do not fit the task.
    """
    from lmleak.data._batches import batches
    from lmleak.data._pictures import Pictures, picture_batches
    from lmleak.errors import DataError
    from lmleak.models._fields import validated

    module = registry.load("data", kind)
    config = validated(module.Config, fields, "data", DataError)
    images = victim.task == "image-classification"
    if images != hasattr(module, "IMAGES"):
        fitting = "photos, image_folder, idx, hub_images" if images else "sample, local, hub, ..."
        raise DataError(f"data.kind: '{kind}' is no data for {victim.task}; use one of {fitting}")
    found = module.load(config)
    return (
        picture_batches(victim, found, config, seed)
        if isinstance(found, Pictures)
        else batches(victim, found, config, seed)
    )


def load_pictures(shape: tuple[int, int, int], kind: str = "photos", *, seed: int = 0, **fields: Any) -> torch.Tensor:
    """Reads pictures for no model in particular, such as a gallery to compare with.

    Args:
        shape: channels, rows and columns.
        kind: file of `lmleak.data` that reads images.
        seed: of the order.
        fields: the recipe's `data` block.

    Returns:
        [n, c, y, x] float32 in [0, 1].

    Raises:
        DataError: the source cannot be read, is no source of pictures, or a picture has another shape.
    """
    from lmleak.data._pictures import plain
    from lmleak.errors import DataError
    from lmleak.models._fields import validated

    module = registry.load("data", kind)
    if not hasattr(module, "IMAGES"):
        raise DataError(f"data.kind: '{kind}' holds no pictures")
    config = validated(module.Config, fields, "data", DataError)
    return plain(module.load(config), config, shape, seed)
