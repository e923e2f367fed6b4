"""Convolutions and an LSTM over log-mel energies, with the weights committed beside this file."""

from pathlib import Path

import numpy as np
import torch
from features import BANDS, FRAMES
from torch import nn

WEIGHTS = Path(__file__).with_name("weights.npz")
WORDS = 11  # ten words, and everything else
HIDDEN = 64


class Speech(nn.Module):
    """features (N, 49, 32) -> logits (N, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Sequential(
            nn.Conv2d(1, 24, 3, 2, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, (1, 2), 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.narrow = nn.Linear(32 * BANDS // 4, HIDDEN)
        self.act = nn.ReLU()
        self.order = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        maps = self.sound(features[:, None])  # (N, 32, 25, 8)
        steps = self.act(self.narrow(maps.transpose(1, 2).flatten(2)))  # (N, 25, 64)
        heard, _ = self.order(steps)
        return self.head(heard.mean(1))


def build() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The trained model in evaluation mode, and example inputs."""
    model = Speech()
    with np.load(WEIGHTS, allow_pickle=False) as stored:
        state = {name: torch.from_numpy(stored[name].copy()) for name in stored.files}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = value  # counts training steps; nothing reads it
    model.load_state_dict(state)
    return model.eval(), (torch.zeros(1, FRAMES, BANDS),)
