"""Images in idx files, plain or gzipped, as MNIST comes: one file of images, one of labels."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from pydantic import Field

from lmleak.data._pictures import Fitted, Pictures, existing
from lmleak.errors import DataError

IMAGES = True


class Config(Fitted):
    """Which files, and how they are cut into batches."""

    path: str = Field(description="the file of images, e.g. t10k-images-idx3-ubyte.gz")
    labels: str | None = Field(None, description="the file of labels; default: images-idx3 read as labels-idx1")


def load(config: Config) -> Pictures:
    """Reads both files.

    Raises:
        DataError: a file is missing, damaged, or not of the kind; they are not of one length.
    """
    path = existing(config.path)
    other = config.labels or str(path.with_name(path.name.replace("images-idx3", "labels-idx1")))
    images, labels = _idx(path, 3), _idx(existing(other, "labels"), 1)
    if len(images) != len(labels):
        raise DataError(f"data: '{path}' has {len(images)} images, '{other}' {len(labels)} labels")
    names = tuple(f"{path}#{i}" for i in range(len(images)))
    return Pictures(names, tuple(labels.tolist()), images.__getitem__, {"path": str(path)})


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """Bytes of an idx file, as [n, ...]: two zero bytes, type 8, dimensions, their sizes as 4 bytes, the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data: '{path}' cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < head:
        raise DataError(f"data: '{path}' is no idx file of bytes with {dimensions} dimension{'s' * (dimensions > 1)}")
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    if len(data) - head != int(np.prod(shape)):
        raise DataError(f"data: '{path}' is damaged: {len(data) - head} values, its head says {shape}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
