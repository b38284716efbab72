"""Share of recovered images whose nearest picture is the true one (as in Yin et al. 2021, arXiv:2104.07586).

The crowd in which an answer must find its picture is the batch's references and, if given, a `gallery`: a `data` block,
for example the data set that the batch came from. Near is small squared distance of pixels, or, with a `model` block,
of what that model's last linear layer reads. Chance is one by the size of the crowd; a crowd of one has no score.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lmleak.metrics._images import pairs

if TYPE_CHECKING:
    import numpy as np

    from lmleak.records import Reconstruction, Reference

IMAGES = True
KEYS = ("identification",)


class Config(BaseModel):
    """The crowd, and what near means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gallery: dict[str, Any] | None = Field(
        None, description="a data block: {kind: image_folder, path: ..., limit: 500}"
    )
    model: dict[str, Any] | None = Field(None, description="a model block whose features are compared; default: pixels")


def keys(config: Config) -> tuple[str, ...]:
    """Names of the values that `score` returns."""
    return KEYS


def score(config: Config, reconstruction: Reconstruction, reference: Reference) -> dict[str, float | None]:
    """Share of the references, 0..1; one without an answer is not found. None where there is no crowd.

    Raises:
        LmleakError: the gallery or the model cannot be had.
    """
    import numpy as np

    found = pairs(reconstruction, reference)
    if not found:
        return {"identification": None}
    truth = np.stack([x for x, _ in found])
    crowd = np.concatenate([truth, _gallery(json.dumps(config.gallery), truth.shape[1:])])
    if len(crowd) < 2:
        return {"identification": None}
    rows = _features(config, crowd)
    hits = 0
    for place, (_, answer) in enumerate(found):
        if answer is not None:
            # The references come first, so that a copy of one in the gallery does not take its place.
            hits += int(((rows - _features(config, answer[None])) ** 2).sum(1).argmin()) == place
    return {"identification": hits / len(found)}


def _features(config: Config, images: np.ndarray) -> np.ndarray:
    """[n, c, y, x] in [0, 1] -> [n, values]."""
    if config.model is None:
        return images.reshape(len(images), -1)
    import torch

    victim, head = _model(json.dumps(config.model))
    weight = next(victim.module.parameters())
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1).double().cpu()))
    try:
        with torch.no_grad():
            for part in torch.from_numpy(images).split(64):
                victim.module(pixel_values=victim.processor.normalised(part).to(weight))
    finally:
        hook.remove()
    return torch.cat(seen).numpy()


@lru_cache(maxsize=2)
def _model(block: str) -> tuple[Any, Any]:
    import torch

    from lmleak.models import load_model

    victim = load_model(**json.loads(block))
    linear = [part for part in victim.module.modules() if isinstance(part, torch.nn.Linear)]
    return victim, linear[-1]


@lru_cache(maxsize=2)
def _gallery(block: str, shape: tuple[int, ...]) -> np.ndarray:
    import numpy as np

    fields = json.loads(block)
    if fields is None:
        return np.zeros((0, *shape))
    from lmleak.data import load_pictures

    channels, rows, columns = shape
    return load_pictures((channels, rows, columns), **fields).double().numpy()
