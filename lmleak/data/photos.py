"""Built-in photos: eight colour pictures that scikit-image carries, cropped to the model's size; no network, no file.

Labels are made up: the place of the photo in the list. Cut into tiles, they are data enough to train on: which photo is
it a part of?
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lmleak.data._pictures import Cut
from lmleak.errors import DataError

if TYPE_CHECKING:
    from lmleak.data._pictures import Pictures

IMAGES = True
NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "ihc.png",
)


class Config(Cut):
    """How many, and how they are cut into batches."""

    fit: ClassVar[str] = "crop"
    convert: ClassVar[bool] = True

    tiles: int = Field(1, ge=1, le=16, description="rows and columns a photo is cut into, each piece a picture")


def load(config: Config) -> Pictures:
    """The pictures in the order of the list; of tiles the first of every photo, then the second."""
    from lmleak.data._pictures import Pictures, decode

    folder = resources.files("skimage").joinpath("data")

    @cache
    def photo(name: str):  # type: ignore[no-untyped-def]
        try:
            return decode(folder.joinpath(name).read_bytes(), name)
        except FileNotFoundError as error:
            raise DataError(f"data: the installed scikit-image has no '{name}'; reinstall it") from error

    def read(index: int):  # type: ignore[no-untyped-def]
        piece, place = divmod(index, len(NAMES))
        pixels, (row, column) = photo(NAMES[place]), divmod(piece, config.tiles)
        rows, columns = (side // config.tiles for side in pixels.shape[:2])
        return pixels[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]

    pieces = range(config.tiles**2)
    names = tuple(name if config.tiles == 1 else f"{name}, piece {piece}" for piece in pieces for name in NAMES)
    return Pictures(names, tuple(range(len(NAMES))) * len(pieces), read, {"kind": "photos"})
