"""Local image files: a folder or zip of class folders, or of files listed in its labels.csv (file, label)."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
from pydantic import Field

from lmleak.data._pictures import SUFFIXES, Fitted, Pictures, decode, existing
from lmleak.errors import DataError

IMAGES = True
_LIST = "labels.csv"


class Config(Fitted):
    """Which files, and how they are cut into batches."""

    path: str = Field(description="a folder or a zip; class folders get labels in alphabetical order")


def load(config: Config) -> Pictures:
    """Lists the files; none is opened yet.

    Raises:
        DataError: no such folder or zip, no image in it, or a list that names what is not there.
    """
    root = existing(config.path)
    if root.is_dir():
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        fetch: Callable[[str], bytes] = lambda name: (root / name).read_bytes()  # noqa: E731
    else:
        # Opened once: its directory takes 50 ms to read for 5,000 pictures, a picture 0.04 ms.
        try:
            archive = zipfile.ZipFile(root)  # closed with the last picture that may be read
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"data.path: '{root}' is neither a folder nor a zip that can be read: {error}") from error
        names = sorted(archive.namelist())
        fetch = lambda name: _from_zip(archive, name)  # noqa: E731
    found = _listed(root, fetch, set(names)) if _LIST in names else _by_folder(names)
    if not found:
        raise DataError(f"data.path: '{root}' holds no image ({', '.join(SUFFIXES)}) in class folders, and no {_LIST}")
    files = tuple(name for name, _ in found)

    def read(index: int) -> np.ndarray:
        return decode(fetch(files[index]), f"{root}/{files[index]}")

    shown = tuple(f"{root}/{name}" for name in files)
    return Pictures(shown, tuple(label for _, label in found), read, {"path": str(root)})


def _by_folder(names: list[str]) -> list[tuple[str, int]]:
    images = [name for name in names if name.lower().endswith(SUFFIXES) and "/" in name]
    classes = {name: i for i, name in enumerate(sorted({str(PurePosixPath(name).parent) for name in images}))}
    return [(name, classes[str(PurePosixPath(name).parent)]) for name in images]


def _listed(root: Path, fetch: Callable[[str], bytes], names: set[str]) -> list[tuple[str, int]]:
    where = f"{root}/{_LIST}"
    try:
        rows = list(csv.DictReader(io.StringIO(fetch(_LIST).decode("utf-8-sig"))))
        found = [(str(row["file"]), int(row["label"])) for row in rows]
    except KeyError as error:
        raise DataError(f"data: '{where}' has no column {error}") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"data: '{where}': {error}") from error
    missing = next((name for name, _ in found if name not in names), None)
    if missing:
        raise DataError(f"data: '{where}' names '{missing}', which is not there")
    return found


def _from_zip(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (OSError, zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise DataError(f"data: '{archive.filename}/{name}' cannot be read: {error}") from error
