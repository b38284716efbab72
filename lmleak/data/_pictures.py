"""Pictures -> the client's batches: order, size and channels checked file by file, normalisation, the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import DataError
from lmleak.records import Batch, Reference, Victim
from lmleak.seeds import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Cut(BaseModel):
    """Fields that every source of pictures has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(1, ge=1)
    limit: int | None = Field(None, ge=1, description="pictures, counted before batching")
    shuffle: bool = True


class Fitted(Cut):
    """What is done with files that are not as the model wants them."""

    fit: Literal["exact", "crop"] = Field(
        "exact", description="exact: another size is an error; crop: the largest centred part of it, scaled"
    )
    convert: bool = Field(False, description="grey to RGB and back, where the model wants the other; else an error")


@dataclass(frozen=True)
class Pictures:
    """A source of pictures, opened one at a time."""

    names: tuple[str, ...]  #: file names, for error messages
    labels: tuple[int, ...]
    read: Callable[[int], np.ndarray]  #: index -> [y, x] or [y, x, channels] of bytes
    source: Mapping[str, Any] = field(default_factory=dict)


def decode(data: bytes, name: str) -> np.ndarray:
    """An image file's bytes -> [y, x] or [y, x, 3].

    Raises:
        DataError: not an image, a damaged one, or one of more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            if image.mode[0] in "IF":  # PIL would cut their levels off at 255
                raise DataError(
                    f"data: '{name}' has more than 256 levels ({image.mode}); save it with 8 bits a channel"
                )
            return np.asarray(image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"data: '{name}' is not an image that can be read, or is damaged: {error}") from error


def picture_batches(victim: Victim, pictures: Pictures, config: Any, seed: int) -> list[Batch]:
    """Shuffles, cuts, checks and normalises.

    Args:
        victim: its `processor` says size, channels, classes and normalisation.
        pictures: as a data kind returned them.
        config: batch_size, limit, shuffle, and for files fit and convert.
        seed: of the order.

    Raises:
        DataError: nothing to read, a file that cannot be read or does not fit the model, a label out of range.
    """
    form = victim.processor
    for name, label in zip(pictures.names, pictures.labels, strict=True):
        if not 0 <= label < form.classes:
            raise DataError(
                f"data: '{name}' has label {label}, outside 0..{form.classes - 1} (model.num_labels: {form.classes})"
            )
    order = _order(pictures, config, seed)
    size = config.batch_size
    if len(order) < size:
        raise DataError(f"data: {len(order)} pictures in {dict(pictures.source)}; a batch needs {size}")
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    return [_batch(victim, pictures, group, config, place) for place, group in enumerate(groups)]


def plain(pictures: Pictures, config: Any, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """The pictures alone, of channels, rows and columns as asked: [n, c, y, x] float32 in [0, 1].

    Raises:
        DataError: nothing to read, or a file that cannot be read or has another shape.
    """
    order = _order(pictures, config, seed)
    if not len(order):
        raise DataError(f"data: no picture in {dict(pictures.source)}")
    return torch.stack([_fitting(pictures.read(i), pictures.names[i], shape, config) for i in order])


def _order(pictures: Pictures, config: Any, seed: int) -> Sequence[int]:
    order: Sequence[int] = range(len(pictures.names))
    if config.shuffle:
        order = torch.randperm(len(pictures.names), generator=generator(seed, "data")).tolist()
    return order[: config.limit]


def _batch(victim: Victim, pictures: Pictures, group: Sequence[int], config: Any, index: int) -> Batch:
    weight = next(victim.module.parameters())
    form = victim.processor
    shape = (form.channels, form.height, form.width)
    images = torch.stack([_fitting(pictures.read(i), pictures.names[i], shape, config) for i in group])
    labels = tuple(pictures.labels[i] for i in group)
    pixels = form.normalised(images.double()).to(device=weight.device, dtype=weight.dtype)
    reference = Reference(images=images, labels=labels)
    return Batch({"pixel_values": pixels}, torch.tensor(labels, device=weight.device), reference, index)


def _fitting(pixels: np.ndarray, name: str, shape: tuple[int, int, int], config: Any) -> torch.Tensor:
    """Bytes -> [c, y, x] float32 in [0, 1], of the model's channels, rows and columns."""
    from PIL import Image

    wanted, height, width = shape
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels != wanted:
        if not getattr(config, "convert", False):
            raise DataError(
                f"data: '{name}' has {channels} channel{'s' * (channels > 1)}, the model reads {wanted}; "
                "set data.convert: true to change it"
            )
        pixels = np.asarray(Image.fromarray(pixels).convert("L" if wanted == 1 else "RGB"))
    if pixels.shape[:2] != (height, width):
        if getattr(config, "fit", "exact") != "crop":
            raise DataError(
                f"data: '{name}' is {pixels.shape[1]} x {pixels.shape[0]} pixels, the model reads "
                f"{width} x {height}; set data.fit: crop to cut and scale it"
            )
        pixels = _cropped(pixels, height, width)
    tensor = torch.from_numpy(np.array(pixels, dtype=np.float32) / 255)
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1).contiguous()


def _cropped(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest centred part of the wanted proportions, scaled with anti-aliasing."""
    from PIL import Image

    rows, columns = pixels.shape[:2]
    scale = min(rows / height, columns / width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (rows - tall) // 2, (columns - wide) // 2
    part = Image.fromarray(pixels[top : top + tall, left : left + wide])
    return np.asarray(part.resize((width, height), Image.Resampling.LANCZOS))


def existing(path: str, field_name: str = "path") -> Path:
    """The path, if there is something.

    Raises:
        DataError: there is nothing.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"data.{field_name}: there is no file or folder '{path}'")
    return found
