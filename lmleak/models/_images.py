"""What image models share: the recipe's `model:` block, what a picture must look like, and loading.

A family that builds its module itself has `build(config)` and a Config with `config: Shape`; the others load by
transformers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import ModelError
from lmleak.models import _loading
from lmleak.models._weights import digest, resolve
from lmleak.records import Victim

Triple = tuple[float, ...]


class Common(BaseModel):
    """Fields that every image model has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field("random", description="a local folder, a hub id, or `random`")
    task: Literal["image-classification"] = "image-classification"
    num_labels: int = Field(10, ge=1)
    mode: Literal["eval", "train"] = Field("eval", description="the client's mode; train: BatchNorm by the batch")
    mean: Triple | None = Field(None, description="a channel each; default: the weights' own, 0.5 for random ones")
    std: Triple | None = Field(None, description="as mean")
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: str | None = Field(None, description="default: accelerate's choice for this process")


class Shape(BaseModel):
    """What every architecture that is built here has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(3, ge=1)
    image_size: int = Field(32, ge=1)


@dataclass(frozen=True)
class ImageFormat:
    """A Victim's `processor` for images: all public. Pixels in [0, 1] enter the model as (x - mean) / std."""

    channels: int
    height: int
    width: int
    classes: int
    mean: Triple
    std: Triple

    def normalised(self, images: Any) -> Any:
        """[b, c, y, x] in [0, 1] -> what the model reads."""
        return (images - self._each(self.mean, images)) / self._each(self.std, images)

    def plain(self, pixels: Any) -> Any:
        """What the model reads -> [b, c, y, x] in [0, 1], clamped."""
        return (pixels * self._each(self.std, pixels) + self._each(self.mean, pixels)).clamp(0, 1)

    def _each(self, values: Triple, like: Any) -> Any:
        return like.new_tensor(values)[:, None, None]


def image_format(config: Any, channels: int, size: tuple[int, int], mean: Triple | None, std: Triple | None) -> Any:
    """The format of a model; the recipe's mean and std go before the weights' own.

    Raises:
        ModelError: neither the recipe nor the weights say how pixels are normalised, or not for every channel.
    """
    if config.weights == "random":
        mean = std = (0.5,) * channels
    mean, std = config.mean or mean, config.std or std
    if mean is None or std is None:
        raise ModelError(
            f"model.mean: '{config.weights}' does not say how its pixels are normalised "
            "(no preprocessor_config.json beside it); give model.mean and model.std, a number for each channel"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ModelError(f"model.{name}: {len(values)} values for {channels} channels")
    if min(std) <= 0:
        raise ModelError(f"model.std: {list(std)} is not above 0 everywhere")
    return ImageFormat(channels, *size, config.num_labels, tuple(map(float, mean)), tuple(map(float, std)))


def load(config: Any, seed: int, family: ModuleType, kind: str) -> Victim:
    """Loads a transformers image classifier and puts it into the client's mode; see `lmleak.models.load_model`."""
    import torch
    import transformers

    kwargs: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if hasattr(config, "attn_implementation"):
        kwargs["attn_implementation"] = config.attn_implementation
    auto = transformers.AutoModelForImageClassification
    mean = std = None
    with _loading._quiet(), _loading._own_generator(seed):
        if config.weights == "random":
            settings = _loading._random_settings(config, family, kind, {})
            module = _loading._call(auto.from_config, settings, **kwargs)
            name = drawn(kind, config.config | {"num_labels": config.num_labels}, seed)
        else:
            folder = resolve(config.weights)
            settings, version = _loading._settings(folder, config, family, kind), digest(folder)
            mean, std = _normalisation(folder)
            module = _loading._call(
                auto.from_pretrained,
                str(folder),
                config=settings,
                use_safetensors=True,
                local_files_only=True,
                **kwargs,
            )
            _loading.own_memory(module)
            name = f"{config.weights} sha256:{version}"
    size = getattr(config, "image_size", None) or settings.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return finished(config, module, image_format(config, settings.num_channels, size, mean, std), family, kind, name)


def build(config: Any, seed: int, family: ModuleType, kind: str) -> Victim:
    """The victim of a family that builds its own module: weights drawn, or read from a checkpoint file.

    `MEAN` and `STD` of the family are what checkpoints of its kind were trained with, `renamed(name, module)` turns
    their names into ours.
    """
    from lmleak.models._checkpoint import fill

    shape = config.config
    with _loading._own_generator(seed):
        module = family.build(config)
    if config.weights == "random":
        name = drawn(kind, shape.model_dump() | {"num_labels": config.num_labels}, seed)
    else:
        renamed = getattr(family, "renamed", None)
        name = fill(module, config.weights, renamed and (lambda name: renamed(name, module)))
    mean, std = getattr(family, "MEAN", None), getattr(family, "STD", None)
    form = image_format(config, shape.channels, (shape.image_size,) * 2, mean, std)
    return finished(config, module, form, family, kind, name)


def outline(config: Any, family: ModuleType, kind: str) -> Victim:
    """Names and shapes alone of a family that builds its own module: on the meta device."""
    import torch

    with _loading._own_generator(0), torch.device("meta"):
        module = family.build(config)
    return Victim(module, None, _loading._adapted(family, module, config), kind, config.task, config.weights)


def finished(config: Any, module: Any, form: ImageFormat, family: ModuleType, kind: str, name: str) -> Victim:
    """The victim of a built module: mode, device and type set."""
    import torch

    module.train(config.mode == "train")
    module.to(device=_loading._device(config.device), dtype=getattr(torch, config.dtype))
    return Victim(module, form, _loading._adapted(family, module, config), kind, config.task, name, config.mode)


def drawn(kind: str, settings: Any, seed: int) -> str:
    """The name of random weights: the same exactly where the weights are."""
    text = json.dumps([kind, settings, seed], sort_keys=True, default=str)
    return f"random config:{hashlib.sha256(text.encode()).hexdigest()[:12]} (seed {seed})"


def _normalisation(folder: Path) -> tuple[Triple | None, Triple | None]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        mean, std = found.get("image_mean"), found.get("image_std")
        return mean and tuple(map(float, mean)), std and tuple(map(float, std))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: {error}") from error
