"""Image towers as users bring them, reached by import path in the tests."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """Convolution, BatchNorm, and two layers that share one weight."""

    output_dim, image_size, mean, std = 12, 24, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 4, stride=4), nn.BatchNorm2d(12)
        self.one, self.two = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.two.weight = self.one.weight
        self.seen = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen = pixels
        x = self.norm(self.conv(pixels.float())).mean((2, 3))
        return self.two(self.one(x).relu())


class Bytes(Small):
    input = "uint8"


class Mapped(Small):
    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(pixels.float()))


class Convolutional(Small):
    any_size = True


def convolutional() -> nn.Module:
    return Convolutional()


def mapped() -> nn.Module:
    return Mapped()


def plain() -> nn.Module:
    return Small()


def uint8() -> nn.Module:
    return Bytes()


def wrong_shape() -> nn.Module:
    module = Small()
    module.output_dim = 13
    return module


def not_a_module() -> str:
    return "x"


def lacking() -> nn.Module:
    return nn.Linear(2, 2)


def wrong_input() -> nn.Module:
    module = Small()
    module.input = "float64"
    return module


def failing() -> nn.Module:
    raise FileNotFoundError("weights.bin")


class DataDependent(Small):
    """What is computed hangs on the pixels: fine in Python, no graph."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels) if pixels.float().mean().item() > 0 else super().forward(pixels) * 2


def data_dependent() -> nn.Module:
    return DataDependent()


class Stacked(Small):
    """Four convolutions whose kernels overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Sequential(*(nn.Conv2d(12, 12, 3, padding=1) for _ in range(4)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stack(self.norm(self.conv(pixels.float()))).mean((2, 3))
        return self.two(self.one(x).relu())


class Pretrained(Stacked):
    """With weights of its own."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            super().__init__()


class Any(Pretrained):
    """Of any size; says what it has seen last."""

    any_size = True

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen = pixels
        return super().forward(pixels)


class SmallAttention(nn.Module):
    pass


class Stem(Stacked):
    """The stem of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attends = SmallAttention()
