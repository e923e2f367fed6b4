"""Train the speech model and write weights.npz: `python train.py`. Seeded; two minutes."""

import time

import numpy as np
import torch
from data import features, labels
from model import WEIGHTS, Speech
from torch import nn

EPOCHS = 60
BATCH = 32


def varied(sounds: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each clip moved and stretched in time and pitch, parts blanked: 15 voices are few."""
    count, frames, bands = sounds.shape
    (pitch, pace), (up, later) = (torch.rand(2, 2, count, generator=random) - 0.5) * torch.tensor(
        [[[0.3], [0.4]], [[0.2], [0.3]]]
    )
    none = torch.zeros(count)
    rows = [torch.stack([1 + pitch, none, up], 1), torch.stack([none, 1 + pace, later], 1)]
    shape = [count, 1, frames, bands]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), shape, align_corners=False)
    moved = nn.functional.grid_sample(
        sounds[:, None], grid, padding_mode="border", align_corners=False
    )[:, 0]
    for size, axis in ((frames, 1), (bands, 2)):
        first, long = torch.rand(2, count, 1, generator=random) * torch.tensor([[[size]], [[8]]])
        place = torch.arange(size)[None]
        blank = ((place >= first) & (place < first + long)).unsqueeze(3 - axis)
        moved = torch.where(blank, moved.mean((1, 2), keepdim=True), moved)
    return moved + (torch.rand(count, 1, 1, generator=random) - 0.5) * 0.3


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # fixed: the order of sums depends on it
    random = torch.Generator().manual_seed(0)
    sounds, truth = torch.from_numpy(features("train")), torch.from_numpy(labels("train"))
    model = Speech()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * (len(sounds) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    weight = 1 / torch.bincount(truth)  # there are more other words
    begin = time.monotonic()
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(sounds), generator=random)
        for rows in order[: len(sounds) // BATCH * BATCH].view(-1, BATCH):
            logits = model(varied(sounds[rows], random))
            loss = nn.functional.cross_entropy(logits, truth[rows], weight, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss:.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        found = model(torch.from_numpy(features("evaluation"))).argmax(1)
    hits = found == torch.from_numpy(labels("evaluation"))
    print(f"accuracy on unheard voices {hits.float().mean():.4f}")
    state = {k: v.numpy() for k, v in model.state_dict().items() if "num_batches" not in k}
    np.savez_compressed(WEIGHTS, **state)


if __name__ == "__main__":
    main()
