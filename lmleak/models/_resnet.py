"""The CIFAR ResNet of He et al. (2015, arXiv 1512.03385, section 4.2) with shortcuts of option A."""

from __future__ import annotations

from types import SimpleNamespace

import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions and a shortcut that drops every other pixel and pads channels with zeros."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.pad = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Pictures [b, c, y, x] -> an object with `logits` [b, classes], as transformers' models give."""

    def __init__(self, channels: int, per_stage: int, width: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, before = [], width
        for stage in range(3):
            for block in range(per_stage):
                after = width * 2**stage
                blocks.append(Residual(before, after, 2 if stage and not block else 1))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.linear = nn.Linear(before, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.linear(x.mean((2, 3))))
