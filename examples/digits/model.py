"""A small residual CNN for 1x32x32 digits, with the weights committed beside this file."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

WEIGHTS = Path(__file__).with_name("weights.npz")


def unit(
    wide: int, out: int, size: int, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None
) -> nn.Sequential:
    """Convolution without bias, batch normalisation, activation (None: linear)."""
    layers = [
        nn.Conv2d(wide, out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class Residual(nn.Module):
    """x + f(x), then ReLU: two 3x3 convolutions of the same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            unit(width, width, 3, act=nn.ReLU), unit(width, width, 3, act=None)
        )
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.body(x))


class Inverted(nn.Module):
    """Widen (pointwise), filter (depthwise), narrow (pointwise, linear); adds x where it fits."""

    def __init__(self, width: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            unit(width, inner, 1, act=nn.ReLU6),
            unit(inner, inner, 3, stride=stride, groups=inner, act=nn.ReLU6),
            unit(inner, out, 1, act=None),
        )
        self.adds = stride == 1 and width == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class Digits(nn.Module):
    """image (N, 1, 32, 32) in 0..1 -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            unit(1, 32, 3, stride=2, act=nn.ReLU),
            Residual(32),
            Inverted(32, 128, 64, stride=2),
            Inverted(64, 128, 64, stride=1),
            Residual(64),
            Inverted(64, 128, 64, stride=2),
            unit(64, 128, 1, act=nn.ReLU6),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(image)).flatten(1))


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The trained model in evaluation mode, and example inputs."""
    model = Digits()
    with np.load(WEIGHTS, allow_pickle=False) as stored:
        state = {name: torch.from_numpy(stored[name].copy()) for name in stored.files}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value  # counts training steps; nothing reads it
    model.load_state_dict(state)
    return model.eval(), (torch.zeros(1, 1, 32, 32),)
