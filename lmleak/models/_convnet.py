"""The module of kind `convnet`."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor, nn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


class Step(NamedTuple):
    """One convolution: output channels, kernel, stride, padding, and the pooling behind it (1: none)."""

    channels: int
    kernel: int
    stride: int
    padding: int
    pool: int

    def after(self, size: int) -> int:
        """Pixels a side that leave the step, of `size` that enter it; 0 or less: too few."""
        return ((size + 2 * self.padding - self.kernel) // self.stride + 1) // self.pool


class Convolution(nn.Module):
    """Convolution, batch norm if asked for, activation, largest value of `pool` x `pool` places."""

    def __init__(self, before: int, step: Step, activation: str, norm: bool, bias: bool):
        super().__init__()
        self.conv = nn.Conv2d(before, step.channels, step.kernel, step.stride, step.padding, bias=bias)
        self.norm = nn.BatchNorm2d(step.channels) if norm else nn.Identity()
        self.activation = ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(step.pool) if step.pool > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.norm(self.conv(x))))


class Dense(nn.Module):
    """Fully connected layer over all that enters it, and its activation."""

    def __init__(self, before: int, after: int, activation: str, bias: bool):
        super().__init__()
        self.dense = nn.Linear(before, after, bias=bias)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x.flatten(1)))


class ConvNet(nn.Module):
    """Pictures [b, c, y, x] -> an object with `logits` [b, classes], as transformers' models give.

    `layers` are the convolutions, then the hidden fully connected layers; `linear` is the head.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        steps: Sequence[Step],
        hidden: Sequence[int],
        classes: int,
        *,
        activation: str,
        norm: bool,
        bias: bool,
    ):
        super().__init__()
        self.layers = nn.ModuleList()
        for step in steps:
            self.layers.append(Convolution(channels, step, activation, norm, bias))
            channels, size = step.channels, step.after(size)
        width = channels * size**2
        for after in hidden:
            self.layers.append(Dense(width, after, activation, bias))
            width = after
        self.linear = nn.Linear(width, classes, bias=bias)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x = pixel_values
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.linear(x.flatten(1)))
