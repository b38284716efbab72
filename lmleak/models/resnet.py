"""ResNet for 32 x 32 pictures: 20, 32, 56, ... layers, shortcuts without weights (He et al., 2015, arXiv 1512.03385).

`weights` may be a checkpoint file whose `state_dict` has the names of a widely used CIFAR-10 training (layer1.0.conv1,
..., linear); it is read by `torch.load(weights_only=True)`, which runs no code. Here residual blocks are counted
through all stages, so that `layers: [0]` is the first of them.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lmleak.errors import ModelError
from lmleak.models import _images

if TYPE_CHECKING:
    from lmleak.records import Victim

__all__ = ["BLOCK", "CAUSAL", "COMPONENTS", "Config", "build", "load"]

MODEL_TYPES = ()  #: a Hugging Face `resnet` has another architecture
TASKS = ("image-classification",)
CAUSAL = False
BLOCK = r"blocks\.(\d+)"
COMPONENTS = {
    "conv": ("conv1", "conv2"),
    "norm": ("bn1", "bn2"),
    "stage": (BLOCK,),
    "head": ("linear",),
}
#: Statistics of ImageNet, which such checkpoints were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shape(_images.Shape):
    """The architecture."""

    depth: int = Field(20, ge=8, description="6 n + 2 layers: n residual blocks in each of three stages")
    width: int = Field(16, ge=1, description="channels of the first stage")
    image_size: int = Field(32, ge=8, multiple_of=4)


class Config(_images.Common):
    """Which weights, and how pixels are normalised."""

    weights: str = Field("random", description="a checkpoint file, or `random`")
    config: Shape = Field(default_factory=lambda: Shape.model_validate({}))


def load(config: Config, seed: int) -> Victim:
    """See `lmleak.models.load_model`."""
    return _images.build(config, seed, sys.modules[__name__], "resnet")


def build(config: Config) -> Any:
    """The module, its weights drawn by He's rule."""
    from lmleak.models._resnet import CifarResNet

    shape = config.config
    if (shape.depth - 2) % 6:
        raise ModelError(f"model.config.depth: {shape.depth} is not 6 n + 2 (20, 32, 44, 56, 110)")
    return CifarResNet(shape.channels, (shape.depth - 2) // 6, shape.width, config.num_labels)


def renamed(name: str, module: Any) -> str:
    """A name in a checkpoint -> ours: layer2.0.conv1 is the first block behind those of the first stage."""
    stage = re.match(r"layer(\d)\.(\d+)\.", name)
    if not stage:
        return name
    return f"blocks.{(int(stage[1]) - 1) * (len(module.blocks) // 3) + int(stage[2])}.{name[stage.end() :]}"
