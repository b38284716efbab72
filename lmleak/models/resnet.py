"""ResNet for 32 x 32 pictures: 20, 32, 56, ... layers, shortcuts without weights (He et al., 2015, arXiv 1512.03385).

`weights` may be a checkpoint file whose `state_dict` has the names of a widely used CIFAR-10 training (layer1.0.conv1,
..., linear); it is read by `torch.load(weights_only=True)`, which runs no code. Here residual blocks are counted
through all stages, so that `layers: [0]` is the first of them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lmleak.errors import ModelError
from lmleak.models._images import Common

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "load", "outline"]

MODEL_TYPES = ()  #: a Hugging Face `resnet` has another architecture
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = r"blocks\.(\d+)"
COMPONENTS = {
    "conv": ("conv1", "conv2"),
    "norm": ("bn1", "bn2"),
    "head": ("linear",),
}
#: Statistics of ImageNet, which such checkpoints were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shape(BaseModel):
    """The architecture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: int = Field(20, ge=8, description="6 n + 2 layers: n residual blocks in each of three stages")
    width: int = Field(16, ge=1, description="channels of the first stage")
    image_size: int = Field(32, ge=8, multiple_of=4)


class Config(Common):
    """Which weights, and how pixels are normalised."""

    weights: str = Field("random", description="a checkpoint file, or `random`")
    config: Shape = Field(default_factory=lambda: Shape.model_validate({}))


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    from lmleak.models import _images, _loading

    mean = std = None
    with _loading._own_generator(seed):
        module = _build(config)
    name = _images.drawn("resnet", config.config.model_dump() | {"num_labels": config.num_labels}, seed)
    if config.weights != "random":
        mean, std = MEAN, STD
        name = _fill(module, Path(config.weights).expanduser(), config)
    form = _images.image_format(config, 3, (config.config.image_size,) * 2, mean, std)
    return _images.finished(config, module, form, sys.modules[__name__], "resnet", name)


def outline(config: Config) -> Victim:
    """Names and shapes alone, on the meta device."""
    import torch

    from lmleak.records import Victim

    with torch.device("meta"):
        module = _build(config)
    return Victim(module, None, sys.modules[__name__], "resnet", config.task, config.weights)


def _build(config: Config) -> Any:
    from lmleak.models._resnet import CifarResNet

    depth = config.config.depth
    if (depth - 2) % 6:
        raise ModelError(f"model.config.depth: {depth} is not 6 n + 2 (20, 32, 44, 56, 110)")
    return CifarResNet((depth - 2) // 6, config.config.width, config.num_labels)


def _fill(module: Any, path: Path, config: Config) -> str:
    """Loads the checkpoint into the module; returns its name with a digest."""
    import torch

    from lmleak.models._weights import sha256

    if not path.is_file():
        raise ModelError(f"model.weights: there is no file '{path}'; use a checkpoint file, or weights: random")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"model.weights: '{path}' is no checkpoint that can be read without running code") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    per_stage = len(module.blocks) // 3

    def renamed(name: str) -> str:
        stage = re.match(r"layer(\d)\.(\d+)\.", name)
        return name if not stage else f"blocks.{(int(stage[1]) - 1) * per_stage + int(stage[2])}.{name[stage.end() :]}"

    state = {renamed(name): tensor for name, tensor in state.items()}
    # Files from before PyTorch counted batches lack the counters.
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += sorted(set(state) - set(own))
    if wrong:
        raise ModelError(
            f"model.weights: '{path}' does not fit depth {config.config.depth}, width {config.config.width} and "
            f"{config.num_labels} classes: {len(wrong)} names or shapes differ, first {wrong[0]}"
        )
    module.load_state_dict(state, strict=False)
    return f"{config.weights} sha256:{sha256(path)[:12]}"
