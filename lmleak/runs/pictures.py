"""Recovered images and their references: one safetensors file a unit, exact, beside the lines that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "images"


def save(folder: Path, cell: str, batch: int, reference: Any, reconstruction: Any) -> str | None:
    """Writes the images of a unit, [b, c, y, x] float32 in [0, 1]; an answer without images has the references alone.

    Returns:
        the file's path inside the run folder, or None where the reference is no image.
    """
    if reference.images is None:
        return None
    import torch
    from safetensors.torch import save as to_bytes

    from lmleak.runs.store import replace

    name = f"{FOLDER}/{cell}-{batch}.safetensors"
    (folder / FOLDER).mkdir(exist_ok=True)
    made = {"reference": reference.images, "reconstruction": reconstruction.images}
    tensors = {
        key: images.detach().to("cpu", torch.float32).contiguous() for key, images in made.items() if images is not None
    }
    replace(folder / name, to_bytes(tensors))
    return name


def load(folder: Path, name: Any) -> dict[str, Any]:
    """`reference` and, where there was an answer, `reconstruction`; nothing where the line names no file.

    Raises:
        RunError: the file is gone, damaged, or not in the run's folder of images.
    """
    if name is None:
        return {}
    from safetensors.torch import load_file

    from lmleak.errors import RunError

    path = folder / str(name)
    if path.parent != folder / FOLDER or path.name in ("", ".", ".."):
        raise RunError(f"{folder}: a line names '{name}', which is not in {FOLDER}/")
    try:
        return dict(load_file(path))
    except Exception as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
