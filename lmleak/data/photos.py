"""Built-in photos: eight colour pictures that scikit-image carries, cropped to the model's size; no network, no file.

Labels are made up: the place of the picture in the list.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, ClassVar

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


def load(config: Config) -> Pictures:
    """The pictures in the order of the list."""
    from lmleak.data._pictures import Pictures, decode

    folder = resources.files("skimage").joinpath("data")

    def read(index: int):  # type: ignore[no-untyped-def]
        try:
            return decode(folder.joinpath(NAMES[index]).read_bytes(), NAMES[index])
        except FileNotFoundError as error:
            raise DataError(f"data: the installed scikit-image has no '{NAMES[index]}'; reinstall it") from error

    return Pictures(NAMES, tuple(range(len(NAMES))), read, {"kind": "photos"})
