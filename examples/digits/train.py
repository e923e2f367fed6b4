"""Train the digits model and write weights.npz: `python train.py`. Seeded; under a minute."""

import time

import numpy as np
import torch
from data import split
from model import WEIGHTS, Digits
from torch import nn

EPOCHS = 10
BATCH = 32


def jitter(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each picture turned, scaled and moved a little: 898 pictures are few."""
    count = len(images)
    angle, scale = (torch.rand(2, count, generator=random) - 0.5) * torch.tensor([[0.5], [0.3]])
    move = (torch.rand(count, 2, generator=random) - 0.5) * 0.25
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    rows = [torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # fixed: the order of sums depends on it
    random = torch.Generator().manual_seed(0)
    images, labels = (torch.from_numpy(a) for a in split("train"))
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    begin = time.monotonic()
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(images), generator=random)
        for rows in order[: len(images) // BATCH * BATCH].view(-1, BATCH):
            logits = model(jitter(images[rows], random))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss:.4f}, {time.monotonic() - begin:.0f} s")
    model.eval()
    with torch.no_grad():
        tests, truth = (torch.from_numpy(a) for a in split("test"))
        print(f"test accuracy {(model(tests).argmax(1) == truth).float().mean():.4f}")
    state = {k: v.numpy() for k, v in model.state_dict().items() if "num_batches" not in k}
    np.savez_compressed(WEIGHTS, **state)


if __name__ == "__main__":
    main()
