"""Hugging Face data set of images by id, or a parquet copy of one; honours HF_HOME and HF_HUB_OFFLINE."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from lmleak.data import _tables
from lmleak.data._pictures import Fitted, Pictures, decode
from lmleak.errors import DataError

IMAGES = True
_WAY_OUT = (
    "read local files instead (data: {kind: image_folder, path: FOLDER} or {kind: hub_images, path: FILE.parquet}) "
    "or use the built-in data: {kind: photos}"
)


class Config(Fitted):
    """Which data set and columns, and how they are cut into batches."""

    id: str | None = Field(None, description="hub id, e.g. uoft-cs/cifar10")
    path: str | None = Field(None, description="instead of id: a parquet file, or a folder of one for each split")
    name: str | None = Field(None, description="configuration, where the data set has several")
    split: str = Field("train", description="with an optional slice: train[:100]")
    image_column: str | None = Field(None, description="default: the only column of images")
    label_column: str | None = Field(None, description="default: the only plausible one")

    @model_validator(mode="after")
    def _one_place(self) -> Config:
        if (self.id is None) == (self.path is None):
            raise ValueError("give either id or path")
        return self


def load(config: Config) -> Pictures:
    """Lists the rows; a picture is decoded when it is asked for.

    Raises:
        DataError: the data set cannot be had, or has no such columns.
    """
    import datasets

    if config.path is not None:
        table, source = _tables.path_table(config.path, config.split)
    else:
        table, source = _tables.hub_table(str(config.id), config.name, config.split, _WAY_OUT)
    where = _tables.place(source)
    images = _image_column(table, config.image_column, where)
    label, labels = _tables.labels_of(table, config.label_column, images, where)
    if label is None:
        raise DataError(
            f"data.label_column: which column of '{where}' is the label? It has: {', '.join(table.column_names)}"
        )
    # Bytes: decoding is this project's own, whose errors name the row.
    table = table.cast_column(images, datasets.Image(decode=False))
    names = tuple(f"{where}[{config.split}] row {row}" for row in range(1, len(table) + 1))

    def read(index: int) -> np.ndarray:
        return decode(_bytes(table[index][images], names[index]), names[index])

    return Pictures(names, labels, read, source | {"image_column": images, "label_column": label})


def _image_column(table: Any, wanted: str | None, where: Any) -> str:
    import datasets

    columns = table.column_names
    if wanted is not None:
        return _tables.column(columns, wanted, "image_column", where)
    found = [name for name in columns if isinstance(table.features[name], datasets.Image)]
    if len(found) != 1:
        raise DataError(f"data.image_column: which column of '{where}' is the image? It has: {', '.join(columns)}")
    return found[0]


def _bytes(cell: Any, name: str) -> bytes:
    if cell and cell.get("bytes"):
        return bytes(cell["bytes"])
    if not cell or not cell.get("path"):
        raise DataError(f"data: '{name}' has no image")
    try:
        with open(cell["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"data: '{name}' cannot be read: {error}") from error
